"""Whole weights out of the ranks' shards (L1), bucket by bucket, on the first rank: the publisher's snapshot is made of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dapo_async.model.buckets import buckets
from dapo_async.model.decoder import Decoder
from dapo_async.model.mesh import Mesh
from dapo_async.model.parallel import is_split, part_of, shard_of


@torch.no_grad()
def gather_weights(
    decoder: Decoder, mesh: Mesh, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Copies of all weights, whole and in `dtype`, on the first rank; every rank of `mesh` calls it, the others get none.

    A rank alone keeps them where they are; with others the first one has them in its host's memory, for its device has room for shards only.
    Cast before they travel; small ones travel together.
    """
    parameters = dict(decoder.named_parameters())
    if mesh.every.size == 1:
        return {
            name: parameter.detach().to(dtype, copy=True) for name, parameter in parameters.items()
        }
    device = decoder.rope_cos.device
    parts = mesh.every.stack(
        torch.tensor([_edges(parameter, mesh) for parameter in parameters.values()], device=device)
    ).tolist()
    whole: dict[str, Tensor] = {}
    for bucket in buckets(enumerate(parameters.items()), lambda item: item[1][1].numel()):
        sizes = [[_numel(edges[number]) for number, _ in bucket] for edges in parts]  # of each rank
        mine = [
            shard_of(parameter).to(dtype).reshape(-1)[:size]
            for (_, (_, parameter)), size in zip(bucket, sizes[mesh.every.rank], strict=True)
        ]
        flats = mesh.every.collect(torch.cat(mine), [sum(each) for each in sizes])
        if not mesh.is_first:
            continue
        for _, (name, parameter) in bucket:
            whole[name] = torch.empty(parameter.shape, dtype=dtype)
        for edges, flat, each in zip(parts, flats, sizes, strict=True):
            for (number, (name, _)), piece in zip(bucket, flat.split(each), strict=True):
                if piece.numel():
                    target = whole[name][
                        tuple(
                            slice(start, stop) for start, stop in edges[number][: whole[name].ndim]
                        )
                    ]
                    target.copy_(piece.view(target.shape))
    return whole


def _edges(parameter: Tensor, mesh: Mesh) -> list[list[int]]:
    """First and last index + 1 of this rank's part in two dimensions; empty where another rank of the tensor-parallel axis has the same one."""
    if mesh.tp.rank > 0 and not is_split(parameter):
        return [[0, 0], [0, 0]]
    return [[part.start, part.stop] for part in (*part_of(parameter), slice(0, 1))[:2]]


def _numel(edges: list[list[int]]) -> int:
    return math.prod(stop - start for start, stop in edges)
