"""How the heads of a layer are divided over the ranks of the `cp` axis. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """What each rank gets of the heads of a layer.

    Equal numbers: query heads that are missing for that are padding. Key-value heads that several
    ranks need are sent to each of them.
    """

    queries: int  # query heads of a rank
    keys: int  # key-value heads of a rank; each serves `queries / keys` of its query heads
    # The key-value heads of all ranks, one rank after the other. None: each once, in their order.
    kv_heads: tuple[int, ...] | None

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, ranks: int) -> HeadSplit:
        """Of `num_heads` query heads, which key-value heads serve in equal runs."""
        queries, run = -(-num_heads // ranks), num_heads // num_kv_heads
        shared = math.gcd(queries, run)  # neighbours from here on always have one key-value head
        keys = queries // shared
        firsts = range(0, ranks * queries, shared)
        kv_heads = tuple(min(first // run, num_kv_heads - 1) for first in firsts)
        return cls(queries, keys, None if kv_heads == tuple(range(num_kv_heads)) else kv_heads)
