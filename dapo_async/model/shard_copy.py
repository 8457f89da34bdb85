"""A copy of this rank's shards in the engines' dtype, and whole weights made of all ranks' copies.

The copy is all that a publish takes of a rank's time between two steps. Beside the next step the
ranks deal their parts to the owners of units, which send them on:

    unit 0 ──▶ rank 0      unit 1 ──▶ rank 1      unit 2 ──▶ rank 0      …

So no rank ever holds the whole model, and nothing passes through host memory. What a large unit
needs besides itself is bounded, too: its parts come in pieces. `weights/sending.py`
sends the units, and `collect` brings them to the host of the first rank for what is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain

import torch
from torch import Tensor

from dapo_async.model.content import as_checksum, sum_of_part
from dapo_async.model.decoder import Decoder
from dapo_async.model.expert_names import one_by_one, pieces
from dapo_async.model.gather import BUCKET_ELEMENTS, Layout, Unit
from dapo_async.model.mesh import ALONE, Axis
from dapo_async.model.parallel import shard_of
from dapo_async.model.parameters import Shape
from dapo_async.model.transfer import Fetcher


@dataclass(frozen=True, slots=True)
class ShardCopy:
    """One rank's parts of all parameters, one after the other."""

    layout: Layout
    flat: Tensor  # [numbers of this rank], on its device, or on the host while the rank sleeps
    device: torch.device
    copied: torch.cuda.Event | None  # on CUDA: the copy is complete

    @classmethod
    @torch.no_grad()
    def of(
        cls, decoder: Decoder, layout: Layout, dtype: torch.dtype, *, over: ShardCopy | None = None
    ) -> ShardCopy:
        """Copies the shards. `over`: a copy that nobody reads any more, whose memory is taken."""
        device = decoder.rope_cos.device
        counts = [layout.numel(index, layout.rank) for index in range(len(layout.names))]
        if over is not None and over.flat.device == device and over.flat.dtype is dtype:
            flat = over.flat
        else:
            flat = torch.empty(sum(counts), dtype=dtype, device=device)
        # Shards end in padding where the rows do not divide.
        shards = [
            shard_of(each).reshape(-1)[:count]
            for each, count in zip(decoder.parameters(), counts, strict=True)
        ]
        torch._foreach_copy_([*flat.split(counts)], shards)
        copied = None
        if device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        return cls(layout, flat, device, copied)

    def on_host(self) -> ShardCopy:
        """In host memory, so that the device is free for others."""
        return replace(self, flat=self.flat.cpu(), copied=None)

    def tensors(self) -> Iterator[tuple[int, str, Shape]]:
        """What is sent: the number of its unit, its name in a Hugging Face folder and its shape."""
        layout = self.layout
        for number, unit in enumerate(layout.units):
            for index in unit:
                for piece in pieces(layout.names[index], layout.shapes[index], layout.config):
                    yield number, piece.name, piece.shape

    def checksum(self) -> str:
        """This rank's share in the `checksum` of the whole weights; shares add up modulo 2^64."""
        layout, rank = self.layout, self.layout.rank
        with self.beside_the_step():
            total = torch.zeros((), dtype=torch.int64, device=self.flat.device)
            for index, part in enumerate(self._parts()):
                if part.numel():
                    place = layout.place(index, rank)
                    total += sum_of_part(
                        layout.names[index],
                        part,
                        place,
                        shape=layout.shapes[index],
                        config=layout.config,
                    )
            return as_checksum(total)

    def stream(
        self, axis: Axis, *, num_owners: int = 1, units: Sequence[Unit] | None = None
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Whole weights by their names in a folder, unit after unit, on the device.

        Unit u is yielded, with its number, on rank u mod `num_owners`. All ranks of `axis` iterate
        to the end, at the same time. Without `units` these are all of the layout.
        """
        layout, parts = self.layout, self._parts()
        units = layout.units if units is None else units
        for first in range(0, len(units), num_owners):
            dealt = units[first : first + num_owners]
            own = dealt[axis.rank] if axis.rank < len(dealt) else ()
            if axis.size == 1:
                whole = {index: parts[index] for index in own}
            else:
                whole = self._dealt(parts, dealt, own, axis)
            if own:
                named = {layout.names[index]: tensor for index, tensor in whole.items()}
                yield first + axis.rank, one_by_one(named, layout.config)

    def _dealt(
        self, parts: Sequence[Tensor], dealt: Sequence[Unit], own: Unit, axis: Axis
    ) -> dict[int, Tensor]:
        """The whole parameters of this rank's unit; `dealt[rank]` is the unit of each rank.

        Large units go in pieces, each some rows of every part.
        """
        layout = self.layout
        largest = max(sum(math.prod(layout.shapes[index]) for index in unit) for unit in dealt)
        count = -(-largest // BUCKET_ELEMENTS)
        whole = {
            index: torch.empty(layout.shapes[index], dtype=self.flat.dtype, device=self.device)
            for index in own
        }
        for piece in range(count):
            mine = [
                [_rows_of(parts[index], piece, count).reshape(-1) for index in unit]
                for unit in dealt
            ]
            sent = [sum(map(len, each)) for each in mine] + [0] * (axis.size - len(dealt))
            places = [
                [(index, _rows(layout.place(index, other), piece, count)) for index in own]
                for other in range(axis.size)
            ]
            counts = [[math.prod(_shape(place)) for _, place in each] for each in places]
            flat = torch.cat([part for each in mine for part in each]).to(self.device)
            got = axis.deal(flat, sent, [sum(each) for each in counts])
            splits = got.split([*chain.from_iterable(counts)]) if own else ()
            for (index, place), part in zip(chain.from_iterable(places), splits, strict=True):
                if part.numel():
                    whole[index][place].copy_(part.view(_shape(place)))
        return whole

    def whole(self, axis: Axis = ALONE) -> dict[str, Tensor]:
        """All weights on the host of the first rank of `axis`; the others get none.

        Every rank calls it.
        """
        weights: dict[str, Tensor] = {}
        with self.beside_the_step():
            fetcher = Fetcher(self.device) if self.device.type == "cuda" else None
            for _, unit in self.stream(axis):
                for name, tensor in unit.items():
                    weights[name] = tensor.clone() if fetcher is None else fetcher.fetch(tensor)
        return weights

    @contextmanager
    def beside_the_step(self) -> Iterator[None]:
        """On CUDA: the body's work runs on a stream of its own, after the copy, and is complete at
        the end. So the memory of the copy may then be overwritten, or given to others."""
        if self.device.type != "cuda":
            yield
            return
        stream = _side_stream(self.device)
        if self.copied is not None:
            stream.wait_event(self.copied)
        with torch.cuda.stream(stream):
            try:
                yield
            finally:
                stream.synchronize()

    def _parts(self) -> list[Tensor]:
        """This rank's part of each parameter."""
        layout = self.layout
        shapes = [_shape(layout.place(index, layout.rank)) for index in range(len(layout.names))]
        parts = self.flat.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _rows(place: Sequence[slice], piece: int, count: int) -> tuple[slice, ...]:
    """Of `count` runs of rows of a part that lies at `place`, the one with this number."""
    rows, *columns = place
    height = rows.stop - rows.start
    bounds = (rows.start + height * each // count for each in (piece, piece + 1))
    return (slice(*bounds), *columns)


def _rows_of(part: Tensor, piece: int, count: int) -> Tensor:
    (rows,) = _rows([slice(0, len(part))], piece, count)
    return part[rows]


def _shape(place: Sequence[slice]) -> Shape:
    return tuple(part.stop - part.start for part in place)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
