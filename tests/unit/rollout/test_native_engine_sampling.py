"""Noise against a plain integer reference; uniformity, independence and distribution of draws."""

from typing import Any

import numpy as np
import pytest
import torch

from dapo_async.rollout import SamplingParams
from dapo_async.rollout.native.sampling import draw_tokens, keyed_uniforms, truncate

WORD = (1 << 64) - 1
LARGEST = 1 - 2.0**-52


def reference_uniform(*scalars: int) -> float:
    """SplitMix64's finaliser chained over the scalars, in Python integers."""
    word = 0
    for scalar in scalars:
        word = (word + 0x9E3779B97F4A7C15 * (scalar + 1)) & WORD
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
        word ^= word >> 31
    return (word >> 12) / 2**52


def test_noise_equals_a_plain_integer_reference() -> None:
    noise = keyed_uniforms(7, group_id=123456789, siblings=range(2, 5), num_tokens=4)
    expected = [
        [reference_uniform(7, 123456789, sibling, token) for token in range(4)]
        for sibling in range(2, 5)
    ]
    assert noise.tolist() == expected
    assert 0 <= keyed_uniforms(-3, group_id=2**63, siblings=range(1), num_tokens=1)[0, 0] < 1


def test_noise_is_uniform_and_independent_between_neighbouring_keys() -> None:
    noise = np.stack(
        [
            [
                keyed_uniforms(seed, group_id=group_id, siblings=range(16), num_tokens=64)
                for group_id in range(32)
            ]
            for seed in range(4)
        ]
    )
    size = noise.size  # 131072
    counts, _ = np.histogram(noise, bins=64, range=(0, 1))
    assert (
        (counts - size / 64) ** 2 / (size / 64)
    ).sum() < 125  # chi-square with 63 degrees of freedom: p < 1e-5 beyond
    for axis in range(4):
        one, other = (
            np.moveaxis(noise, axis, 0)[:-1].ravel(),
            np.moveaxis(noise, axis, 0)[1:].ravel(),
        )
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(len(one))


@pytest.mark.parametrize("vocabulary", [5, 64, 300, 1500])
def test_draws_follow_the_distribution(vocabulary: int) -> None:
    probabilities = (
        torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)).mul(1.5).softmax(-1)
    )
    uniforms = torch.from_numpy(
        keyed_uniforms(0, group_id=0, siblings=range(20), num_tokens=1000).ravel()
    )
    tokens = draw_tokens(probabilities.expand(len(uniforms), -1), uniforms)
    expected = probabilities.double() * len(uniforms)
    often = expected > 5
    chi_square = ((torch.bincount(tokens, minlength=vocabulary) - expected) ** 2 / expected)[
        often
    ].sum()
    degrees = int(often.sum()) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("vocabulary", [4, 2000])
def test_draws_invert_the_distribution_function(vocabulary: int) -> None:
    probabilities = torch.zeros(6, vocabulary)
    probabilities[:, :4] = torch.tensor([0.25, 0.0, 0.5, 0.25])
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, LARGEST], dtype=torch.float64)
    assert draw_tokens(probabilities, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("vocabulary", [200, 2000])
def test_a_token_of_probability_zero_is_never_drawn(vocabulary: int) -> None:
    probabilities = torch.zeros(1000, vocabulary)
    rows = torch.arange(1000)
    first, second = rows % 200, (rows * 7 + 3) % 200
    probabilities[rows, first], probabilities[rows, second] = 0.3, 1e-30
    for uniform in (0.0, 0.5, LARGEST):
        tokens = draw_tokens(probabilities, torch.full((1000,), uniform, dtype=torch.float64))
        assert bool(((tokens == first) | (tokens == second)).all())


def test_top_k_comes_before_top_p_which_keeps_the_fewest_tokens_that_hold_its_share() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).expand(5, -1)
    top_p, top_k = torch.tensor([1.0, 1.0, 0.65, 0.75, 1e-9]), torch.tensor([4, 2, 4, 3, 4])
    kept = truncate(probabilities, top_p=top_p, top_k=top_k)
    # 0.75 of what three tokens hold (0.9) is 0.675: 0.4 is too little, 0.4 + 0.3 is enough
    expected = [
        [0.1, 0.4, 0.2, 0.3],
        [0, 0.4, 0, 0.3],
        [0, 0.4, 0, 0.3],
        [0, 0.4, 0, 0.3],
        [0, 0.4, 0, 0],
    ]
    torch.testing.assert_close(kept, torch.tensor(expected))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "not negative"),
        ({"top_p": 0.0}, r"\(0, 1\]"),
        ({"top_k": 0}, "at least 1"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(
            **{"max_tokens": 1, "temperature": 1.0, "stop_token_ids": (), "seed": 0, **wrong}
        )
