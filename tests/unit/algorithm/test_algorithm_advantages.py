"""Group-relative advantages against hand-computed numbers."""

from __future__ import annotations

import pytest
import torch

from dapo_async.algorithm import group_advantages


def test_advantages_are_centred_and_divided_by_the_unbiased_std_of_their_group() -> None:
    # Group 9: mean 2, deviations −2, 0, 2, unbiased variance 8 / 2.
    # Group 4: mean 5, deviations ±1, variance 2.
    rewards, group_ids = torch.tensor([0.0, 4.0, 2.0, 6.0, 4.0]), torch.tensor([9, 4, 9, 4, 9])
    assert group_advantages(rewards, group_ids, eps=0.0).tolist() == pytest.approx(
        [-1.0, -0.70710678, 0.0, 0.70710678, 1.0]
    )
    assert group_advantages(rewards, group_ids, eps=2.0).tolist() == pytest.approx(
        [-0.5, -0.29289322, 0.0, 0.29289322, 0.5]
    )


def test_without_std_normalisation_advantages_are_the_deviations() -> None:
    rewards, group_ids = torch.tensor([0.0, 4.0, 2.0, 6.0, 4.0]), torch.tensor([9, 4, 9, 4, 9])
    assert group_advantages(rewards, group_ids, normalize_std=False).tolist() == [
        -2.0,
        -1.0,
        0.0,
        1.0,
        2.0,
    ]


def test_a_group_of_one_has_advantage_zero() -> None:
    advantages = group_advantages(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([0, 1, 1]), eps=0.0)
    assert advantages.tolist() == pytest.approx([0.0, -0.70710678, 0.70710678])


def test_equal_rewards_have_advantage_zero_and_rounding_is_not_amplified() -> None:
    # In float32 their mean is off by 7e-9, which 1 / (std + 1e-6) would turn into 0.007.
    assert (
        group_advantages(torch.full((6,), 0.1), torch.zeros(6, dtype=torch.int64))
        .abs()
        .max()
        .item()
        < 1e-9
    )
    assert (
        group_advantages(torch.ones(4), torch.zeros(4, dtype=torch.int64), eps=0.0).tolist()
        == [0.0] * 4
    )


def test_integer_rewards_and_empty_rewards_are_accepted() -> None:
    assert group_advantages(torch.tensor([1, -1]), torch.tensor([0, 0])).tolist() == pytest.approx(
        [0.70710628, -0.70710628]
    )
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_shapes_that_do_not_fit_and_a_negative_eps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards \(3,\) and group_ids \(2,\)"):
        group_advantages(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"eps \(-1\.0\)"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.int64), eps=-1.0)
