"""Group-relative advantages.

In: the shaped rewards of whole groups. Out: one advantage per rollout. The learner's batching calls
it once per step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """Group-relative advantages A_i = (R_i − mean(R)) / (std(R) + eps).

    Mean and unbiased std are those of the rollout's group. Sources: GRPO (2402.03300), DAPO
    (2503.14476). `normalize_std=False` returns R_i − mean(R), as in Dr.GRPO (2503.20783).

    A group of one has advantage 0 for any reward, because there is no sibling to compare it with.
    (The std of one value is undefined. Dividing by 1 without subtracting the mean would train on
    the bare reward.) A group of equal rewards has advantage 0 too.

    `rewards` [B], `group_ids` [B] integers in any order. Returns [B] in the dtype of `rewards`
    (float32 for integers), without gradient. Computed in float64, because equal rewards such as 0.1
    must not leave a rounding error of the mean that 1 / eps amplifies. Raises ValueError on other
    shapes or a negative eps.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must both be "
            "[B]; give one group id per rollout"
        )
    if eps < 0:
        raise ValueError(f"eps ({eps}) must not be negative; set 1e-6, or 0 for none")
    values = rewards.detach().double()
    _, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    zeros = values.new_zeros(sizes.shape)
    centred = values - (zeros.index_add(0, index, values) / sizes)[index]
    if normalize_std:
        variance = zeros.index_add(0, index, centred.square()) / (sizes - 1).clamp(min=1)
        scale = (variance.sqrt() + eps)[index]
        # Without eps a group of equal rewards would be 0 / 0.
        centred = torch.where(centred == 0, centred, centred / scale)
    advantages: Tensor = centred.to(rewards.dtype if rewards.is_floating_point() else torch.float32)
    return advantages
