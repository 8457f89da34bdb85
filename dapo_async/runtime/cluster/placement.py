"""Plans which node of a joined cluster gets which actors. Imports no Ray.

In: the config, and the nodes with their total and free resources. Out: gangs of actors, a node for
each gang, and lines about the plan. `misfit` says why a cluster is too small, `reservation`
reserves the gangs, and `dapo-async launch` sizes a cluster with them.

A gang is on one node:

learner    each tensor-parallel group of ranks is one gang. Its ranks reduce activations in every
           layer, so a group that is split over nodes is many times slower. The gangs fill as few
           nodes as possible, because data-parallel ranks reduce their gradients once per update.
engine     one gang each, spread: a lost node takes few engines, and hosts share the server load.
shared     with model.placement=shared a tensor-parallel group and its engines are one gang: each
           rank and one engine reserve the same bundle, of one GPU.

The replay actor reserves nothing. It is on the first node of the learner, wherever the driver is:
batches then go through the shared memory of that node, and no further node can end the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

from dapo_async.config import Config
from dapo_async.runtime.cluster.planned_actors import rank_names

CPU, GPU = "CPU", "GPU"
KINDS = (GPU, CPU)
MARK = 0.001  # of a custom resource, for each actor: it chooses nodes and is never used up
UNLIMITED = 1_000_000  # gangs that reserve nothing
ROUNDING = 1e-6  # of Ray's fractions
MAX_LINES = 16  # of a plan


class Side(StrEnum):
    """What the actors of a gang do."""

    LEARNER = "learner"
    ENGINE = "engine"
    EVALUATOR = "evaluator"


@dataclass(frozen=True, slots=True)
class Node:
    """One live node of a cluster, by Ray's id and its address."""

    node_id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Gang:
    """Actors of one node. `bundle` is reserved `count` times: for each actor, or for each rank and
    the engine that shares its device."""

    side: Side
    names: tuple[str, ...]
    bundle: Mapping[str, float]  # without zeros; empty: nothing is reserved
    per_bundle: int = 1  # actors; the names are those of all ranks, then those of all engines

    @property
    def count(self) -> int:
        return len(self.names) // self.per_bundle

    def bundle_of(self, name: str) -> int:
        """The number of an actor's bundle."""
        return self.names.index(name) % self.count

    @property
    def needs(self) -> dict[str, float]:
        """All that is reserved on its node."""
        return {kind: share * self.count for kind, share in self.bundle.items()}


def planned_gangs(config: Config) -> list[Gang]:
    """The gangs of a run in starting order: learner, engines, a dedicated evaluator."""
    learner, rollout, names = config.learner, config.rollout, rank_names(config)
    num_cpus = config.model.num_cpus
    marks = {learner.node_resource: MARK}, {rollout.node_resource: MARK}
    engines = [f"rollout-{number}" for number in range(rollout.num_workers)]
    tp = learner.tensor_parallel
    firsts = range(0, len(names), tp)
    if config.model.is_shared:
        gpus = config.gpus_per_rank + config.gpus_per_worker
        bundle = _bundle({CPU: 2 * num_cpus, GPU: gpus, **marks[0], **marks[1]})
        pairs = [(*names[first : first + tp], *engines[first : first + tp]) for first in firsts]
        gangs = [Gang(Side.LEARNER, pair, bundle, per_bundle=2) for pair in pairs]
    else:
        bundle = _bundle({CPU: num_cpus, GPU: config.gpus_per_rank, **marks[0]})
        groups = [tuple(names[first : first + tp]) for first in firsts]
        gangs = [Gang(Side.LEARNER, group, bundle) for group in groups]
        bundle = _bundle({CPU: num_cpus, GPU: config.gpus_per_worker, **marks[1]})
        gangs += [Gang(Side.ENGINE, (name,), bundle) for name in engines]
    if config.evaluation.during_training and config.evaluation.engine == "dedicated":
        bundle = _bundle({CPU: num_cpus, GPU: config.gpus_of_evaluator, **marks[1]})
        gangs.append(Gang(Side.EVALUATOR, ("evaluator",), bundle))
    return gangs


def _bundle(shares: Mapping[str, float]) -> dict[str, float]:
    return {kind: share for kind, share in shares.items() if kind and share}


def assign(gangs: Sequence[Gang], capacities: Sequence[Mapping[str, float]]) -> list[int | None]:
    """The node of each gang, by its place in `capacities`; None: there is no room for it.

    Finds a node for every gang if that is possible. The driver's node comes first in `capacities`:
    it gets the learner where it has room for all of it.
    """
    packed = _assign(gangs, capacities, _packed(gangs, capacities), None)
    if None not in packed:
        return packed
    best = _best(gangs, capacities)
    if best is None or best.engines < len(gangs_of(gangs, Side.ENGINE)):
        return packed
    return _assign(gangs, capacities, best.groups, best.evaluator)


def most_engines(gangs: Sequence[Gang], capacities: Sequence[Mapping[str, float]]) -> int:
    """The largest number of engines beside learner and evaluator; 0 if these have no room."""
    best = _best(gangs, capacities)
    return 0 if best is None else best.engines


@dataclass(frozen=True, slots=True)
class _Best:
    """A way to place the learner that leaves room for the most engines."""

    engines: int
    groups: Sequence[int]  # gangs of the learner on each node
    evaluator: int | None  # its node


def gangs_of(gangs: Sequence[Gang], side: Side) -> list[Gang]:
    """Those of one side."""
    return [gang for gang in gangs if gang.side is side]


def room_for(capacity: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many gangs with these needs fit."""
    return min(
        (int((capacity.get(kind, 0.0) + ROUNDING) / need) for kind, need in needs.items()),
        default=UNLIMITED,
    )


def _without(
    capacity: Mapping[str, float], needs: Mapping[str, float], count: int = 1
) -> dict[str, float]:
    return {kind: there - count * needs.get(kind, 0.0) for kind, there in capacity.items()}


def _packed(gangs: Sequence[Gang], capacities: Sequence[Mapping[str, float]]) -> list[int]:
    """Gangs of the learner per node, on as few nodes as possible."""
    learner = gangs_of(gangs, Side.LEARNER)
    counts, left = [0] * len(capacities), len(learner)
    if not learner:
        return counts
    rooms = [min(left, room_for(capacity, learner[0].needs)) for capacity in capacities]
    for place in sorted(range(len(rooms)), key=lambda each: -rooms[each]):  # stable
        counts[place] = min(left, rooms[place])
        left -= counts[place]
    return counts


def _best(gangs: Sequence[Gang], capacities: Sequence[Mapping[str, float]]) -> _Best | None:
    """Exact: all gangs of one side are equal, so only their numbers per node matter."""
    evaluators = gangs_of(gangs, Side.EVALUATOR)
    if not evaluators:
        return _best_groups(gangs, capacities, None)
    needs, found, tried = evaluators[0].needs, None, set()
    for place, capacity in enumerate(capacities):
        kind_of_node = tuple(sorted(capacity.items()))
        if kind_of_node in tried or not room_for(capacity, needs):
            continue
        tried.add(kind_of_node)
        rest = [*capacities[:place], _without(capacity, needs), *capacities[place + 1 :]]
        best = _best_groups(gangs, rest, place)
        if best is not None and (found is None or best.engines > found.engines):
            found = best
    return found


def _best_groups(
    gangs: Sequence[Gang], capacities: Sequence[Mapping[str, float]], evaluator: int | None
) -> _Best | None:
    """Dynamic programming over the nodes: learner gangs so far → most engines so far."""
    learner, engines = gangs_of(gangs, Side.LEARNER), gangs_of(gangs, Side.ENGINE)
    needs, total = learner[0].needs if learner else {}, len(learner)
    best, choices = {0: 0}, []
    for capacity in capacities:
        most = min(total, room_for(capacity, needs))
        beside = [
            room_for(_without(capacity, needs, count), engines[0].needs) if engines else 0
            for count in range(most + 1)
        ]
        after: dict[int, int] = {}
        choice: dict[int, int] = {}
        for placed, so_far in best.items():
            for count in range(min(most, total - placed) + 1):
                if so_far + beside[count] > after.get(placed + count, -1):
                    after[placed + count] = so_far + beside[count]
                    choice[placed + count] = count
        best = after
        choices.append(choice)
    if total not in best:
        return None
    groups, left = [], total
    for choice in reversed(choices):
        groups.append(choice[left])
        left -= choice[left]
    return _Best(best[total], groups[::-1], evaluator)


def _assign(
    gangs: Sequence[Gang],
    capacities: Sequence[Mapping[str, float]],
    groups: Sequence[int],
    evaluator: int | None,
) -> list[int | None]:
    """Places learner gangs by `groups`; then engines on the nodes that have the fewest."""
    left = [dict(capacity) for capacity in capacities]

    def take(place: int, gang: Gang) -> int:
        left[place] = _without(left[place], gang.needs)
        return place

    fullest = sorted(range(len(groups)), key=lambda place: -groups[place])
    learner_places = [place for place in fullest for _ in range(groups[place])]
    if evaluator is not None:
        take(evaluator, gangs_of(gangs, Side.EVALUATOR)[0])
    for place, gang in zip(learner_places, gangs_of(gangs, Side.LEARNER), strict=False):
        take(place, gang)
    engines = gangs_of(gangs, Side.ENGINE)
    engine_places = iter(spread(left, engines[0].needs, len(engines)) if engines else ())
    learner = iter(learner_places)
    placed: list[int | None] = []
    for gang in gangs:
        if gang.side is Side.LEARNER:
            placed.append(next(learner, None))
        elif gang.side is Side.ENGINE:
            free = next(engine_places, None)
            placed.append(None if free is None else take(free, gang))
        else:
            rooms = [room_for(capacity, gang.needs) for capacity in left]
            emptiest = max(range(len(rooms)), key=rooms.__getitem__)
            found = emptiest if rooms[emptiest] else None
            placed.append(evaluator if evaluator is not None else found)
    return placed


def spread(
    capacities: Sequence[Mapping[str, float]],
    needs: Mapping[str, float],
    count: int,
    *,
    there: Sequence[int] = (),
) -> list[int]:
    """Nodes of up to `count` engines: each goes where the fewest are, then where the most fit.

    `there`: engines that each node has already; empty: none.
    """
    rooms = [room_for(capacity, needs) for capacity in capacities]
    counts = [*there] or [0] * len(rooms)
    places: list[int] = []
    while len(places) < count and any(rooms):
        place = min(
            (each for each, room in enumerate(rooms) if room),
            key=lambda each: (counts[each], -rooms[each]),
        )
        places.append(place)
        rooms[place] -= 1
        counts[place] += 1
    return places


def plan_lines(
    gangs: Sequence[Gang], nodes: Sequence[Node], placed: Sequence[int | None]
) -> Iterator[str]:
    """What goes where, what is free there, and what has no room yet."""
    kind = next((kind for kind in KINDS if any(gang.needs.get(kind) for gang in gangs)), CPU)
    names: dict[int, list[str]] = {}
    for gang, place in zip(gangs, placed, strict=True):
        if place is not None:
            names.setdefault(place, []).extend(gang.names)
    learner_place = placed[0]
    if learner_place is not None:
        names[learner_place].append("replay")
    width = max((len(nodes[place].address) for place in names), default=0)
    for place in sorted(names)[:MAX_LINES]:
        node = nodes[place]
        free, total = (each.get(kind, 0.0) for each in (node.free, node.total))
        yield (
            f"  {node.address:<{width}}  {free:g} of {total:g} {kind}s free: "
            f"{short_names(names[place])}"
        )
    if len(names) > MAX_LINES:
        yield f"  and {len(names) - MAX_LINES} further nodes"
    if missing := missing_line(gangs, [place is None for place in placed]):
        yield f"  no room yet: {missing}"


def missing_line(gangs: Sequence[Gang], is_missing: Sequence[bool]) -> str:
    """The gangs that are not placed, with what they need; empty if all are."""
    missing = [gang for gang, lacks in zip(gangs, is_missing, strict=True) if lacks]
    parts = []
    for _, members in groupby(missing, key=lambda gang: gang.side):
        each = list(members)
        needs = ", ".join(
            f"{amount:g} {kind}" + ("s" if kind in KINDS and amount != 1 else "")
            for kind, amount in each[0].needs.items()
            if kind in KINDS
        )
        names = short_names([name for gang in each for name in gang.names])
        parts.append(f"{names} ({needs} on one node each)" if needs else names)
    return ", ".join(parts)


def short_names(names: Sequence[str]) -> str:
    """Numbers in a row are joined: learner-0..7, rollout-0, rollout-2."""
    parts: list[str] = []
    rows: list[list[int]] = []
    for name in names:
        match = re.fullmatch(r"(.+-)(\d+)", name)
        if match is None:
            parts.append(name)
            rows.append([])
        elif rows and rows[-1] and parts[-1] == match[1] and rows[-1][-1] == int(match[2]) - 1:
            rows[-1].append(int(match[2]))
        else:
            parts.append(match[1])
            rows.append([int(match[2])])
    return ", ".join(
        part + (f"{row[0]}..{row[-1]}" if len(row) > 1 else str(row[0]) if row else "")
        for part, row in zip(parts, rows, strict=True)
    )
