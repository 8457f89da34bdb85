"""How a rollout worker's exchange travels to the replay actor: by value, in one call.

The packed groups are arguments of the call, not objects of the worker, so they reach the replay
actor's process with the call and outlive the worker and its node. Ray passes an argument below
100 KB in the message itself. It puts a larger one into its object store, which costs more than
twice as much for one group and less for many (benchmarks/control_plane.py).

Each argument costs the replay actor CPU time, whatever its size. So everything but the groups is
one argument. Ray copies plain bytes as they are, where an array would be unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_async.types import GroupFacts

INLINE_BYTES = 90_000  # below Ray's limit for an argument within the message
MAX_INLINE_BYTES = 3 * INLINE_BYTES  # above it one object in the store is cheaper

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a worker offers and asks for. The groups of `facts` come as further arguments."""

    worker: str
    num_free: int  # the most groups that the worker can start
    num_open: int  # groups that it has in hand, without those offered
    facts: Sequence[GroupFacts] = ()
    sizes: Sequence[int] = ()  # bytes of each packed group
    start: int = 0  # how many processes the worker has had before
    records: Sequence[str] = ()  # of each group, see `rollout/group_record.py`
    number: int = -1  # of the call among those of the worker; -1: it is not repeated
    again: bool = False  # the replay actor may have got a call with this number before it died


def to_arguments(groups: Sequence[Bytes]) -> list[bytes]:
    """The packed groups, joined, as the arguments of one call."""
    if not groups:
        return []
    joined = groups[0] if len(groups) == 1 else np.concatenate(groups)
    if len(joined) > MAX_INLINE_BYTES:
        return [joined.tobytes()]
    return [part.tobytes() for part in np.array_split(joined, -(-len(joined) // INLINE_BYTES))]


def from_arguments(arguments: Sequence[bytes], sizes: Sequence[int]) -> list[Bytes]:
    """The packed groups, `sizes` bytes each, as views of what has arrived."""
    if not sizes:
        return []
    joined = np.frombuffer(arguments[0] if len(arguments) == 1 else b"".join(arguments), np.uint8)
    ends = np.cumsum(sizes)
    return [joined[end - size : end] for end, size in zip(ends.tolist(), sizes, strict=True)]
