"""Sums and clips the gradient of a minibatch before the update.

FSDP2 has already summed it over the data- and context-parallel ranks. The learner rank calls these
functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dapo_async.model import Decoder, Mesh, buckets, is_split, shard_of


def sum_gradients(decoder: Decoder, mesh: Mesh) -> None:
    """Sums over the tensor-parallel axis the gradients of parameters that every rank has whole.

    Before, each rank has the gradient of its own tokens or heads only.
    """
    if mesh.tp.size == 1:
        return
    whole = [
        shard_of(parameter.grad)
        for parameter in decoder.parameters()
        if parameter.grad is not None and not is_split(parameter)
    ]
    for bucket in buckets(whole, Tensor.numel):
        flat = mesh.tp.sum(torch.cat([gradient.reshape(-1) for gradient in bucket]))
        parts = flat.split([each.numel() for each in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def clip_gradients(decoder: Decoder, max_norm: float, mesh: Mesh) -> Tensor:
    """Scales the gradient down to the global norm `max_norm`, and returns the norm before.

    The same formula as torch's clip_grad_norm_; every part counts once. Nothing is read back from
    the device.
    """
    split: list[Tensor] = []
    whole: list[Tensor] = []
    for parameter in decoder.parameters():
        if parameter.grad is not None:
            (split if is_split(parameter) else whole).append(shard_of(parameter.grad))
    squares = mesh.shards.sum(mesh.tp.sum(_square_norm(split)) + _square_norm(whole))
    norm = squares.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*split, *whole):
        gradient.mul_(scale)
    return norm


def _square_norm(gradients: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(gradients).square()
