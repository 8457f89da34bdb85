"""A 64-bit sum over the content of all weights, which any layout of the ranks gives.

In: weights, whole or in parts. Out: one number that shows whether two sides hold the same bits. The
learner sums its shards where they lie, and an engine its whole weights: neither copies a weight to
the host. Called for publishes, for the handshake, and for the reference policy.

    sum = Σ bits(w[r, c]) · row(r) · column(c) · tensor(name, dtype, shape)    modulo 2^64

bits() is the stored number as a signed integer; row, column and tensor are odd pseudo-random 64-bit
numbers. So the sum of the parts is the sum of the whole, one changed bit always changes it, and
swapped rows or tensors change it with a probability of about 1 − 2^−31 or more. It finds faults; it
is no protection against somebody who looks for a collision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dapo_async.model.config import ModelConfig
from dapo_async.model.decoder import Decoder
from dapo_async.model.expert_names import pieces
from dapo_async.model.mesh import Mesh
from dapo_async.model.parallel import is_split, part_of, shard_of

CHUNK_NUMBERS = 2**20  # elements that are widened to 64 bits at a time: 8 MiB
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
STEP, MIX = -7046029254386353131, -4658895280553007687  # of splitmix64
ROWS, COLUMNS = 1, 2  # seeds


@torch.no_grad()
def checksum(weights: Mapping[str, Tensor]) -> str:
    """The content sum of whole weights, as 16 hexadecimal digits."""
    device = next(iter(weights.values())).device
    total = torch.zeros((), dtype=torch.int64, device=device)
    for name, tensor in weights.items():
        whole = [slice(0, size) for size in tensor.shape]
        total += _part_sum(name, tensor.detach(), whole, shape=tensor.shape).to(device)
    return as_checksum(total)


@torch.no_grad()
def checksum_of_parts(decoder: Decoder, mesh: Mesh, dtype: torch.dtype) -> str:
    """`checksum` of the whole weights, rounded to `dtype`, without gathering them.

    All ranks of the mesh call it and get the same. They exchange one number.
    """
    total = torch.zeros((), dtype=torch.int64, device=decoder.rope_cos.device)
    for name, parameter in decoder.named_parameters():
        if mesh.tp.rank > 0 and not is_split(parameter):
            continue  # another rank of the axis has the same part
        place = part_of(parameter)
        # With more ranks than rows, some ranks have padding only.
        part = shard_of(parameter)[: place[0].stop - place[0].start].to(dtype)
        total += sum_of_part(name, part, place, shape=parameter.shape, config=decoder.config)
    return as_checksum(mesh.every.sum(total))


def sum_of_part(
    name: str, part: Tensor, place: Sequence[slice], *, shape: Sequence[int], config: ModelConfig
) -> Tensor:
    """The share in the sum of a part of a decoder's parameter of this name and whole shape."""
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    start, stop = place[0].start, place[0].start + len(part)
    for piece in pieces(name, tuple(shape), config):
        first = max(start, piece.first_row)
        last = min(stop, piece.first_row + piece.shape[0])
        if first < last:
            rows = slice(first - piece.first_row, last - piece.first_row)
            values = part[first - start : last - start]
            total += _part_sum(piece.name, values, (rows, *place[1:]), shape=piece.shape)
    return total


def _part_sum(name: str, part: Tensor, place: Sequence[slice], *, shape: Sequence[int]) -> Tensor:
    """The share of `part`, which lies at `place` in the tensor of this name and shape."""
    matrix = part.reshape(part.shape[0], -1) if part.ndim > 1 else part.reshape(-1, 1)
    device, width = part.device, matrix.shape[1]
    first_column = place[1].start if part.ndim > 1 else 0
    columns = _odd(COLUMNS, first_column, width, device)
    rows = _odd(ROWS, place[0].start, len(matrix), device)
    bits = matrix.contiguous().view(INTEGERS[part.element_size()])
    sums = torch.empty_like(rows)
    step = max(1, CHUNK_NUMBERS // max(1, width))
    for start in range(0, len(bits), step):
        wide = bits[start : start + step].to(torch.int64)
        sums[start : start + step] = wide.mul_(columns).sum(1)
    return sums.mul_(rows).sum() * _factor(name, part.dtype, shape)


def _odd(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Odd pseudo-random numbers of the indices `first …`, equal on every device."""
    mixed = torch.arange(first, first + count, device=device).add_(seed << 40).mul_(STEP)
    mixed = (mixed ^ (mixed >> 30)).mul_(MIX)
    return (mixed ^ (mixed >> 27)).mul_(STEP) | 1


def _factor(name: str, dtype: torch.dtype, shape: Sequence[int]) -> int:
    digest = hashlib.sha256(f"{name} {dtype} {tuple(shape)}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True) | 1


def as_checksum(total: Tensor | int) -> str:
    """A sum of parts as `checksum` gives it."""
    return f"{int(total) % 2**64:016x}"
