"""Whole weights from the ranks' shards, bucket by bucket, on the first rank.

The publisher's snapshot consists of these weights. `buckets` also cuts other long lists of tensors
into few collectives or few files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dapo_async.model.decoder import Decoder
from dapo_async.model.expert_names import one_by_one
from dapo_async.model.mesh import Mesh
from dapo_async.model.parallel import is_split, part_of, shard_of

T = TypeVar("T")
BUCKET_ELEMENTS = 16 * 2**20  # 64 MiB of float32
Edges = list[list[int]]  # start and stop index of a part, in two dimensions


def buckets(
    items: Iterable[T],
    size: Callable[[T], int],
    *,
    limit: int = BUCKET_ELEMENTS,
    kind: Callable[[T], Hashable] = lambda _: None,
) -> Iterator[list[T]]:
    """Cuts `items` into runs of one kind whose sizes add up to at most `limit`.

    Keeps the order. An item larger than `limit` gets a bucket of its own. The default `kind` puts
    all items into one kind.
    """
    bucket: list[T] = []
    filled = 0
    for item in items:
        if bucket and (filled + size(item) > limit or kind(item) != kind(bucket[0])):
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += size(item)
    if bucket:
        yield bucket


@torch.no_grad()
def gather_weights(
    decoder: Decoder, mesh: Mesh, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Copies of all weights, whole and in `dtype`, on the first rank; the other ranks get none.

    Their names are those of a Hugging Face folder: experts one by one.
    Every rank of `mesh` calls it. A single rank keeps the copies on its device. With several ranks
    the first rank holds them in host memory, because its device has room for shards only. Weights
    are cast before they are sent, and small ones are sent together.
    """
    parameters = dict(decoder.named_parameters())
    if mesh.every.size == 1:
        copies = {name: each.detach().to(dtype, copy=True) for name, each in parameters.items()}
        return one_by_one(copies, decoder.config)
    own_edges = torch.tensor(
        [_edges(parameter, mesh) for parameter in parameters.values()],
        device=decoder.rope_cos.device,
    )
    edges_by_rank: list[list[Edges]] = mesh.every.stack(own_edges).tolist()
    whole: dict[str, Tensor] = {}
    numbered = enumerate(parameters.items())
    for bucket in buckets(numbered, lambda item: item[1][1].numel()):
        edges = [[each[number] for number, _ in bucket] for each in edges_by_rank]
        _gather_bucket(dict(item for _, item in bucket), edges, mesh, dtype, into=whole)
    return one_by_one(whole, decoder.config)


def _gather_bucket(
    parameters: dict[str, Tensor],
    edges_by_rank: Sequence[Sequence[Edges]],
    mesh: Mesh,
    dtype: torch.dtype,
    *,
    into: dict[str, Tensor],
) -> None:
    """Sends this rank's parts of a few parameters; the first rank puts them together."""
    sizes = [[_numel(edges) for edges in each] for each in edges_by_rank]
    mine = [
        shard_of(parameter).to(dtype).reshape(-1)[:size]
        for parameter, size in zip(parameters.values(), sizes[mesh.every.rank], strict=True)
    ]
    flats = mesh.every.collect(torch.cat(mine), [sum(each) for each in sizes])
    if not mesh.is_first:
        return
    for name, parameter in parameters.items():
        into[name] = torch.empty(parameter.shape, dtype=dtype)
    for edges, flat, each in zip(edges_by_rank, flats, sizes, strict=True):
        for name, part, piece in zip(parameters, edges, flat.split(each), strict=True):
            if piece.numel():
                target = _place(into[name], part)
                target.copy_(piece.view(target.shape))


def _place(whole: Tensor, edges: Edges) -> Tensor:
    return whole[tuple(slice(start, stop) for start, stop in edges[: whole.ndim])]


def _edges(parameter: Tensor, mesh: Mesh) -> Edges:
    """Where this rank's part lies in the parameter.

    Empty if another rank of the tensor-parallel axis has the same part.
    """
    if mesh.tp.rank > 0 and not is_split(parameter):
        return [[0, 0], [0, 0]]
    return [[part.start, part.stop] for part in (*part_of(parameter), slice(0, 1))[:2]]


def _numel(edges: Edges) -> int:
    return math.prod(stop - start for start, stop in edges)
