"""Shaped rewards of whole groups come in, one advantage per rollout leaves; the learner's batching calls it once per step."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """Group-relative advantages A_i = (R_i − mean(R)) / (std(R) + eps), mean and unbiased std over the rollout's group.

    Sources: GRPO (2402.03300), DAPO (2503.14476); `normalize_std=False` leaves R_i − mean(R), Dr.GRPO (2503.20783).
    A group of one has advantage 0, whatever its reward: there is no sibling to compare with, so it carries no signal. (The std of one value is
    undefined; dividing by 1 without subtracting the mean would train on the bare reward.) A group of equal rewards has advantage 0 too.

    `rewards` [B], `group_ids` [B] integers in any order; returns [B] in the dtype of `rewards` (float32 for integers), without gradient.
    Computed in float64: equal rewards such as 0.1 must not leave a rounding error of the mean for 1 / eps to blow up.
    Raises ValueError on other shapes or a negative eps.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must both be [B]; give one group id per rollout"
        )
    if eps < 0:
        raise ValueError(f"eps ({eps}) must not be negative; set 1e-6, or 0 for none")
    values = rewards.detach().double()
    _, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    nothing = values.new_zeros(sizes.shape)
    centred = values - (nothing.index_add(0, index, values) / sizes)[index]
    if normalize_std:
        variance = nothing.index_add(0, index, centred.square()) / (sizes - 1).clamp(min=1)
        scale = (variance.sqrt() + eps)[index]
        # Without eps a group of equal rewards would be 0 / 0.
        centred = torch.where(centred == 0, centred, centred / scale)
    return centred.to(rewards.dtype if rewards.is_floating_point() else torch.float32)
