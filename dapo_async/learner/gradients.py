"""What the ranks do to a minibatch's gradient before the update. FSDP2 has summed it over the data-parallel axis by then."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dapo_async.model import Decoder, Mesh, buckets, is_split, shard_of


def sum_gradients(decoder: Decoder, mesh: Mesh) -> None:
    """Adds up over the tensor-parallel axis what is whole on each of its ranks: each has the gradient of its own tokens, or heads, only."""
    if mesh.tp.size == 1:
        return
    whole = [
        shard_of(parameter.grad)
        for parameter in decoder.parameters()
        if parameter.grad is not None and not is_split(parameter)
    ]
    for bucket in buckets(whole, Tensor.numel):
        flat = mesh.tp.sum(torch.cat([gradient.reshape(-1) for gradient in bucket]))
        for gradient, part in zip(
            bucket, flat.split([each.numel() for each in bucket]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))


def clip_gradients(decoder: Decoder, max_norm: float, mesh: Mesh) -> float:
    """Scales the gradient down to the global norm `max_norm`, as torch's own does; returns the norm before. Every part counts once."""
    split: list[Tensor] = []
    whole: list[Tensor] = []
    for parameter in decoder.parameters():
        if parameter.grad is not None:
            (split if is_split(parameter) else whole).append(shard_of(parameter.grad))
    squares = mesh.dp.sum(mesh.tp.sum(_square_norm(split)) + _square_norm(whole))
    norm = squares.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*split, *whole):
        gradient.mul_(scale)
    return float(norm)


def sum_numbers(values: Sequence[float], mesh: Mesh, device: torch.device) -> list[float]:
    """Plain numbers added up over the data-parallel axis, in float64."""
    if mesh.dp.size == 1:
        return list(values)
    total: list[float] = mesh.dp.sum(
        torch.tensor(values, dtype=torch.float64, device=device)
    ).tolist()
    return total


def _square_norm(gradients: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(gradients).square()
