"""Which part of each parameter each rank holds, and how weights are cut into units to be sent.

`shard_copy.py` copies the parts and makes whole weights of them, one unit after the other.
`buckets` also cuts other long lists of tensors into few messages or few files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dapo_async.model.config import ModelConfig
from dapo_async.model.decoder import Decoder
from dapo_async.model.mesh import Mesh
from dapo_async.model.parallel import is_split, part_of
from dapo_async.model.parameters import Shape

T = TypeVar("T")
BUCKET_ELEMENTS = 16 * 2**20  # 64 MiB of float32
Unit = tuple[int, ...]  # parameters that are gathered and sent together
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


@dataclass(frozen=True, slots=True)
class Layout:
    """The parameters of a decoder in their order, and where each rank's part of each one lies."""

    config: ModelConfig
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]  # of the whole parameters
    edges: tuple[tuple[Edges, ...], ...]  # by rank of `Mesh.every` and parameter
    rank: int  # this one

    @classmethod
    def of(cls, decoder: Decoder, mesh: Mesh) -> Layout:
        """All ranks of the mesh call it: they tell each other their parts."""
        parameters = dict(decoder.named_parameters())
        own = [_edges(parameter, mesh) for parameter in parameters.values()]
        every = mesh.every.stack(torch.tensor(own, device=decoder.rope_cos.device))
        return cls(
            decoder.config,
            tuple(parameters),
            tuple(tuple(parameter.shape) for parameter in parameters.values()),
            tuple(map(tuple, every.tolist())),
            mesh.every.rank,
        )

    @property
    def units(self) -> tuple[Unit, ...]:
        """Neighbouring whole layers, up to `BUCKET_ELEMENTS` or at least one; so are the parameters
        outside of the layers."""
        runs: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            layer = name.split(".")[2] if ".layers." in name else name
            runs.setdefault(layer, []).append(index)

        def numel(run: list[int]) -> int:
            return sum(math.prod(self.shapes[index]) for index in run)

        return tuple(
            tuple(index for run in unit for index in run) for unit in buckets(runs.values(), numel)
        )

    def place(self, index: int, rank: int) -> tuple[slice, ...]:
        """Where the part of `rank` lies in the whole parameter: one slice per dimension."""
        edges = self.edges[rank][index][: len(self.shapes[index])]
        return tuple(slice(start, stop) for start, stop in edges)

    def numel(self, index: int, rank: int) -> int:
        """The numbers in the part of `rank`."""
        return math.prod(stop - start for start, stop in self.edges[rank][index])


def _edges(parameter: Tensor, mesh: Mesh) -> Edges:
    """Where this rank's part lies in the parameter.

    Empty if another rank of the tensor-parallel axis has the same part.
    """
    if mesh.tp.rank > 0 and not is_split(parameter):
        return [[0, 0], [0, 0]]
    return [[part.start, part.stop] for part in (*part_of(parameter), slice(0, 1))[:2]]
