"""How offered groups travel from a rollout worker to the replay actor: by value, in one call.

The bytes are arguments of the call, not objects of the worker, so they reach the replay actor's
process with the call and outlive the worker and its node. Ray passes an argument below 100 KB in
the message itself. It puts a larger one into its object store, which costs more than twice as much
for one group and less for many (benchmarks/control_plane.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

INLINE_BYTES = 90_000  # below Ray's limit for an argument within the message
MAX_INLINE_BYTES = 3 * INLINE_BYTES  # above it one object in the store is cheaper

Bytes = NDArray[np.uint8]


def to_arguments(groups: Sequence[Bytes]) -> list[Bytes]:
    """The packed groups, joined, as the arguments of one call."""
    if not groups:
        return []
    joined = groups[0] if len(groups) == 1 else np.concatenate(groups)
    if len(joined) > MAX_INLINE_BYTES:
        return [joined]
    return np.array_split(joined, -(-len(joined) // INLINE_BYTES))


def from_arguments(arguments: Sequence[Bytes], sizes: Sequence[int]) -> list[Bytes]:
    """The packed groups, `sizes` bytes each, as views of what has arrived."""
    if not sizes:
        return []
    joined = arguments[0] if len(arguments) == 1 else np.concatenate(arguments)
    ends = np.cumsum(sizes)
    return [joined[end - size : end] for end, size in zip(ends.tolist(), sizes, strict=True)]
