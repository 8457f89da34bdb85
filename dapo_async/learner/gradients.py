"""What the ranks do to a minibatch's gradient before the update: add it up over the data-parallel axis, and clip its norm over all shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dapo_async.model import Axis, Mesh, buckets, split_dim


def sum_gradients(parameters: Iterable[nn.Parameter], dp: Axis) -> None:
    """Sums over `dp`, bucket by bucket; a rank without rows in this minibatch gives zeros. The loss is over the global token count already."""
    if dp.size == 1:
        return
    for bucket in buckets(parameters, nn.Parameter.numel):
        flat = torch.cat([(torch.zeros_like(each) if each.grad is None else each.grad).reshape(-1) for each in bucket])
        dp.sum(flat)
        for parameter, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            parameter.grad = part.view_as(parameter).clone()


def clip_gradients(model: nn.Module, max_norm: float, tp: Axis) -> float:
    """Scales the gradient down to the global norm `max_norm`, as torch's own does; returns the norm before. Shards count once each."""
    if tp.size == 1:
        return float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    split: list[Tensor] = []
    whole: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            (whole if split_dim(name) is None else split).append(parameter.grad)
    squares = tp.sum(_square_norm(split)) + _square_norm(whole)
    norm = squares.sqrt()
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return float(norm)


def sum_numbers(values: Sequence[float], mesh: Mesh, device: torch.device) -> list[float]:
    """Plain numbers added up over the data-parallel axis, in float64."""
    if mesh.dp.size == 1:
        return list(values)
    total: list[float] = mesh.dp.sum(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
    return total


def _square_norm(gradients: list[Tensor]) -> Tensor:
    return nn.utils.get_total_norm(gradients).square()
