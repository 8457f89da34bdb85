"""Which rollout workers start and which leave, so that a run has the number asked for. Pure.

In: the workers of the run, and nodes that are about to go. Out: names. `fleet` starts and drains
them. A worker on a node that goes is replaced by one with another name, which starts elsewhere
while the first one is drained.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count, islice

WORKER = "rollout-"  # and its number: the name of a worker


def number_of(name: str) -> int:
    """Of the worker with this name."""
    return int(name.removeprefix(WORKER))


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that is in the run or comes into it, and is not leaving."""

    name: str
    serves: bool  # False: it starts, or its engine or process is being replaced
    node_id: str | None = None  # Ray's; None: not known yet


@dataclass(frozen=True, slots=True)
class Change:
    """What is missing to the number asked for; each in the order of names."""

    start: tuple[str, ...] = ()
    drain: tuple[str, ...] = ()


def next_change(
    wanted: int,
    members: Sequence[Member],
    *,
    leaving: Collection[str] = (),
    going_nodes: Collection[str] = (),
) -> Change:
    """`leaving`: workers that are being drained; their names are free only when they have left.

    `going_nodes`: nodes whose workers have to leave. Of the others those leave first that do not
    serve, then those with the highest numbers.
    """
    evicted = [each for each in members if each.node_id in going_nodes]
    staying = [each for each in members if each.node_id not in going_nodes]
    by_worth = sorted(staying, key=lambda each: (not each.serves, number_of(each.name)))
    drained = sorted((*evicted, *by_worth[wanted:]), key=lambda each: number_of(each.name))
    taken = {each.name for each in members} | {*leaving}
    free = (f"{WORKER}{number}" for number in count() if f"{WORKER}{number}" not in taken)
    missing = max(0, wanted - len(staying))
    return Change(tuple(islice(free, missing)), tuple(each.name for each in drained))
