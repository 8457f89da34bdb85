"""Token-mean exactness of the loss.

Loss, gradient, diagnostics and M2PO's mask do not depend on cuts, packing or padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dapo_async.algorithm import (
    policy_loss,
    second_moment_mask,
    sequence_mean_weights,
    step_metrics,
    summarise,
)
from dapo_async.types import StepMetrics

CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
LENGTHS = (3, 17, 1, 9, 5, 12)
FORMS: list[dict[str, Any]] = [
    {},
    {"dual_clip": 1.5},
    {"correction": "mask", "correction_floor": 0.7, "correction_cap": 1.4},
    {"correction_level": "sequence"},
    {"sequence_band": (0.95, 1.05)},
    {
        "correction_level": "sequence_mean",
        "correction": "mask",
        "correction_cap": 1.1,
        "correction_floor": 0.9,
    },
    {"objective": "gspo"},
    {"objective": "cispo"},
]


def minibatch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    num_tokens = sum(LENGTHS)
    normal = [torch.randn(num_tokens, generator=generator, dtype=torch.float64) for _ in range(4)]
    proximal = -1.5 + 0.5 * normal[0]
    return {
        "current_logprobs": proximal + 0.3 * normal[1],
        "proximal_logprobs": proximal,
        "behaviour_logprobs": proximal + 0.3 * normal[2],
        "advantages": normal[3],
        "mask": torch.rand(num_tokens, generator=generator) > 0.2,
        "sequence_ids": torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)),
    }


def of_sequences(whole: dict[str, Any], sequences: Sequence[int]) -> Tensor:
    """Positions of these sequences' tokens, in this order."""
    return torch.cat(
        [(whole["sequence_ids"] == sequence).nonzero().flatten() for sequence in sequences]
    )


def padded(part: dict[str, Any], num_padding: int) -> dict[str, Any]:
    """Adds masked tokens with nan after the last token."""
    fill: dict[str, Any] = {
        "mask": False,
        "sequence_ids": -1,
        "keep": True,
        "token_weights": torch.nan,
    }
    return {
        name: torch.cat([value, value.new_full((num_padding,), fill.get(name, torch.nan))])
        for name, value in part.items()
    }


def accumulated(
    whole: dict[str, Any],
    cuts: Sequence[Tensor],
    *,
    num_tokens: float | Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, StepMetrics]:
    """Summed over microbatches, as the learner does."""
    current = whole["current_logprobs"].clone().requires_grad_()
    total, metrics = torch.zeros((), dtype=torch.float64), StepMetrics()
    for padding, cut in enumerate(cuts):
        part = padded(
            {name: value[cut] for name, value in (whole | {"current_logprobs": current}).items()},
            padding,
        )
        loss, diagnostics = policy_loss(**part, **CLIP, **options, num_tokens=num_tokens)
        loss.backward()
        total, metrics = total + loss.detach(), metrics + step_metrics(diagnostics)
    assert current.grad is not None
    return total, current.grad, metrics


def assert_same(
    one: tuple[Tensor, Tensor, StepMetrics], other: tuple[Tensor, Tensor, StepMetrics]
) -> None:
    for ours, theirs in zip(one[:2], other[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert summarise(one[2]) == pytest.approx(summarise(other[2]), abs=1e-12)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_loss_gradient_and_diagnostics_are_the_same_for_any_cut_into_microbatches(
    options: dict[str, Any],
) -> None:
    whole = minibatch()
    num_tokens = whole["mask"].sum().item()
    at_once = accumulated(whole, [torch.arange(sum(LENGTHS))], num_tokens=None, **options)
    for cuts in (
        [[0, 1, 2], [3, 4, 5]],
        [[5], [4, 1], [0, 3, 2]],
        [[0], [1], [2], [3], [4], [5]],
        [[], [2, 1, 0, 3, 4, 5]],
    ):
        positions = [
            of_sequences(whole, cut) if cut else torch.zeros(0, dtype=torch.int64) for cut in cuts
        ]
        assert_same(accumulated(whole, positions, num_tokens=num_tokens, **options), at_once)
        assert_same(
            accumulated(whole, positions, num_tokens=torch.tensor(float(num_tokens)), **options),
            at_once,
        )


def test_token_weights_give_the_mean_over_responses_for_any_cut() -> None:
    whole, num_tokens = minibatch(), float(minibatch()["mask"].sum())
    current = whole["current_logprobs"].clone().requires_grad_()
    means = []  # of each response over its own unmasked tokens, one call per response
    for sequence in range(len(LENGTHS)):
        part = {
            name: value[of_sequences(whole, [sequence])]
            for name, value in (whole | {"current_logprobs": current}).items()
        }
        if part["mask"].any():
            means.append(policy_loss(**part, **CLIP)[0])
    naive = torch.stack(means).mean()
    naive.backward()
    assert current.grad is not None
    for cuts in ([[0, 1, 2, 3, 4, 5]], [[5], [4, 1], [0, 3, 2]]):
        parts = [
            {name: value[of_sequences(whole, cut)] for name, value in whole.items()} for cut in cuts
        ]
        counts: dict[str, Any] = {
            "num_tokens": num_tokens,
            "num_sequences": float(len(means)),
        }
        weights = [
            sequence_mean_weights(part["mask"], sequence_ids=part["sequence_ids"], **counts)
            for part in parts
        ]
        whole_weights = torch.cat(weights)[
            torch.cat([of_sequences(whole, cut) for cut in cuts]).argsort()
        ].double()
        loss, gradient, metrics = accumulated(
            whole | {"token_weights": whole_weights},
            [of_sequences(whole, cut) for cut in cuts],
            num_tokens=num_tokens,
        )
        torch.testing.assert_close(loss, naive.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, current.grad, rtol=1e-6, atol=1e-12)
        assert summarise(metrics)["loss"] == pytest.approx(float(naive.detach()), rel=1e-6)


def test_weights_of_a_mean_over_responses() -> None:
    ids, mask = torch.tensor([7, 7, 7, 3, 9, 9]), torch.tensor([1, 1, 0, 1, 0, 0])
    weights = sequence_mean_weights(
        mask, sequence_ids=ids, num_tokens=3.0, num_sequences=2.0
    )  # the response 9 counts nowhere
    assert weights.tolist() == [0.75, 0.75, 0.0, 1.5, 0.0, 0.0]
    nothing = sequence_mean_weights(
        mask[:0], sequence_ids=ids[:0], num_tokens=1.0, num_sequences=1.0
    )
    assert nothing.tolist() == []


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "gspo"},
        {"correction_level": "sequence", "correction": "mask"},
        {"sequence_band": (0.9, 1.1)},
    ],
    ids=str,
)
def test_ids_whose_number_is_known_give_the_same_numbers(options: dict[str, Any]) -> None:
    """The number counts ids that no token has, too."""
    whole, count = minibatch(), len(LENGTHS) + 2
    other = whole | {"sequence_ids": 7 * whole["sequence_ids"] - 3}
    loss, diagnostics = policy_loss(**other, **CLIP, **options)
    same, same_diagnostics = policy_loss(**whole, **CLIP, **options, num_ids=count)
    assert torch.equal(loss, same)
    assert all(torch.equal(each, same_diagnostics[name]) for name, each in diagnostics.items())
    mask, ids = whole["mask"], whole["sequence_ids"]
    counts: dict[str, Any] = {"num_tokens": 9.0, "num_sequences": 2.0}
    assert torch.equal(
        sequence_mean_weights(mask, sequence_ids=7 * ids - 3, **counts),
        sequence_mean_weights(mask, sequence_ids=ids, num_ids=count, **counts),
    )


def test_averaging_the_means_of_microbatches_is_detected() -> None:
    """A broken sum: each microbatch divides by its own tokens, then all are averaged."""
    whole = minibatch()
    at_once = accumulated(whole, [torch.arange(sum(LENGTHS))], num_tokens=None)
    loss, gradient, metrics = accumulated(
        whole, [of_sequences(whole, [0, 2, 4]), of_sequences(whole, [1, 3, 5])], num_tokens=None
    )
    with pytest.raises(AssertionError):
        assert_same((loss / 2, gradient / 2, metrics), at_once)


def test_the_effective_sample_size_of_a_step_is_not_the_mean_of_its_microbatches() -> None:
    """It needs Σρ and Σρ² of the whole: ratios 1, 1 and 3, 3 have ESS 1 each, together 2² / 5."""
    ratios = torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64)
    zeros, ones = torch.zeros_like(ratios), torch.ones_like(ratios)
    metrics = StepMetrics()
    for half in (slice(0, 2), slice(2, 4)):
        given: dict[str, Any] = {
            "proximal_logprobs": zeros[half],
            "behaviour_logprobs": -ratios.log()[half],
            "advantages": ones[half],
            "mask": ones[half],
        }
        part = step_metrics(policy_loss(zeros[half], **given, **CLIP)[1])
        assert summarise(part)["behaviour_ess"] == pytest.approx(1.0)
        metrics = metrics + part
    summary = summarise(metrics)
    assert summary["behaviour_ess"] == pytest.approx(0.8)
    assert summary["behaviour_weight_ess"] == pytest.approx(
        1.5**2 / 2.5
    )  # truncated at 2: weights 1, 1, 2, 2
    assert (
        summary["behaviour_chi2"],
        summary["behaviour_weight"],
        summary["behaviour_weight_max"],
    ) == pytest.approx((4.0, 1.5, 2.0))
    assert (summary["behaviour_kl_k1"], summary["behaviour_kl_k3"]) == pytest.approx(
        (-0.54930614, 0.45069386)
    )
    assert (summary["behaviour_log_ratio_max"], summary["loss_tokens"]) == pytest.approx(
        (1.09861229, 4.0)
    )


def second_moment_case() -> dict[str, Any]:
    """log ρ and A; the candidates 0, 2, 3, 5 have the squares 0.01, 0.04, 0.09, 0.25."""
    log_ratio = torch.tensor([0.1, -0.9, -0.2, 0.3, 0.8, 0.5, 2.0], dtype=torch.float64)
    return {
        "proximal_logprobs": log_ratio - 1,
        "behaviour_logprobs": torch.full((7,), -1.0, dtype=torch.float64),
        "advantages": torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0], dtype=torch.float64),
        "mask": torch.tensor([1, 1, 1, 1, 1, 1, 0]),
    }


@pytest.mark.parametrize(
    ("threshold", "dropped"),
    [
        (1.0, []),
        (0.0976, []),
        (0.0974, [5]),
        (0.0468, [5]),
        (0.0465, [3, 5]),
        (0.04, [3, 5]),
        (0.026, [3, 5]),
        (0.02, [2, 3, 5]),
        (0.009, [0, 2, 3, 5]),
    ],
)
def test_the_second_moment_mask_drops_the_largest_until_the_mean_of_the_rest_fits(
    threshold: float, dropped: list[int]
) -> None:
    # Means of the smallest 1 to 4 candidates: 0.01, 0.025, 0.04667, 0.0975.
    keep = second_moment_mask(**second_moment_case(), threshold=threshold)
    assert (~keep).nonzero().flatten().tolist() == dropped


def test_the_second_moment_mask_does_not_depend_on_the_packing() -> None:
    whole = second_moment_case()
    keep = second_moment_mask(**whole)
    for seed in range(5):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(
            second_moment_mask(**{name: value[order] for name, value in whole.items()}), keep[order]
        )


def test_equal_squares_at_the_cut_are_dropped_together() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    keep = second_moment_mask(
        torch.tensor([0.25, 0.0625, 0.25]),
        behaviour_logprobs=zeros,
        advantages=ones,
        mask=ones,
        threshold=0.035,
    )
    assert keep.tolist() == [False, True, False]


def test_the_second_moment_mask_ignores_masked_tokens_and_refuses_a_zero_threshold() -> None:
    whole = second_moment_case()
    keep = second_moment_mask(**whole)
    for garbage in (torch.nan, torch.inf):
        dirty = whole | {
            "proximal_logprobs": torch.cat(
                [whole["proximal_logprobs"][:6], torch.tensor([garbage])]
            )
        }
        assert torch.equal(second_moment_mask(**dirty), keep)
    nothing = {name: value[:0] for name, value in whole.items()}
    assert second_moment_mask(**nothing).tolist() == []
    with pytest.raises(ValueError, match=r"threshold \(0\.0\)"):
        second_moment_mask(**whole, threshold=0.0)


def test_tokens_dropped_by_the_second_moment_of_the_whole_keep_law_four() -> None:
    whole = minibatch()
    names = ("proximal_logprobs", "behaviour_logprobs", "advantages", "mask")
    whole["keep"] = second_moment_mask(**{name: whole[name] for name in names})
    at_once = accumulated(whole, [torch.arange(sum(LENGTHS))], num_tokens=None)
    assert at_once[2].flat()["dropped_fraction"] > 0
    cuts = [of_sequences(whole, [5]), of_sequences(whole, [4, 1]), of_sequences(whole, [0, 3, 2])]
    assert_same(accumulated(whole, cuts, num_tokens=whole["mask"].sum().item()), at_once)
