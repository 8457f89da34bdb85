"""Which workers get the groups that may start, when several ask.

The replay actor and the simulator of the planner call it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import TypeVar

Worker = TypeVar("Worker", str, int)  # a name or a number


def share_grants(wanted: Mapping[Worker, int], admissible: int) -> dict[Worker, int]:
    """Groups for each worker, at most `wanted` each and `admissible` in all.

    Each group goes to the worker that still wants the most, so that engines run about equally many
    sequences. Of workers that want equally many, the earlier one in `wanted` gets it. Workers that
    get none are left out.
    """
    granted: dict[Worker, int] = {}
    if sum(wanted.values()) <= admissible:
        return {worker: count for worker, count in wanted.items() if count > 0}
    heap = [(-count, place, name) for place, (name, count) in enumerate(wanted.items()) if count]
    heapq.heapify(heap)
    for _ in range(admissible):
        count, place, name = heap[0]
        granted[name] = granted.get(name, 0) + 1
        heapq.heapreplace(heap, (count + 1, place, name))
    return granted
