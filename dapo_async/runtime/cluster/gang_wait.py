"""When a run makes its placement groups, and when it gives them back. Imports no Ray.

In: the gangs of a run, and the cluster behind `GangCluster`. Out: the groups, once all are there.

A run holds nothing while it waits for other jobs: it makes its groups when all of them have room at
once. If they are not all there within `MADE_S`, another run was faster: all are removed, and the
run plans again after a pause of random length. So two runs never hold a half each.

Ray's autoscaler sees demand only as groups that wait. With `ray.wait_for_nodes_s` a run therefore
makes its groups although some have no room, and Ray gives it piece by piece what is free. It gives
all back, and plans again, when they would fit if they were placed anew, and at least every
`TURN_S`, so that another run has its turn.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dapo_async.config import Config
from dapo_async.runtime.cluster.misfit import WAIT_KNOB, awaited, misfit
from dapo_async.runtime.cluster.placement import (
    KINDS,
    Gang,
    Node,
    assign,
    missing_line,
    plan_lines,
    planned_gangs,
)

POLL_S = 0.1
LOOK_S = 1.0  # between two looks at the nodes
SETTLE_S = 2.0  # Ray places waiting groups on new nodes, and frees removed ones, within this time
MADE_S = 10.0  # Ray makes groups that have room within this time
TURN_S = 60.0  # a run holds a part of what it needs at most for once to twice this time
REPORT_S = 20.0  # between two lines about a wait
Group = Any  # a placement group; None for a gang that reserves nothing


class GangCluster(Protocol):
    """What the wait asks of Ray, and of the clock."""

    def nodes(self) -> list[Node]:
        """The live nodes, the driver's first."""

    def make(self, gang: Gang, node_id: str | None) -> Group:
        """Returns at once; the group is made when it has room, on this node if possible."""

    def places(self, groups: Sequence[Group]) -> list[str | None]:
        """The node of each group; None while it is not made."""

    def remove(self, groups: Sequence[Group]) -> None:
        """Gives back what they have, or takes back their demand."""

    def now_s(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Held:
    """All of a run, reserved."""

    gangs: Sequence[Gang]
    groups: Sequence[Group]
    places: Sequence[str | None]  # the node of each gang


async def hold_all(
    config: Config,
    cluster: GangCluster,
    *,
    say: Callable[[str], None],
    chance: Callable[[], float] = random.random,
) -> Held:
    """Prints the plan and reserves it.

    `chance`: numbers from 0 to 1, for pauses. Raises ValueError, with nothing reserved, when the
    cluster is too small or the deadline passes.
    """
    gangs, wait = planned_gangs(config), _Wait(config, cluster, say)
    shown: list[str] | None = None
    while True:
        nodes = cluster.nodes()
        if not config.ray.wait_for_nodes_s and (line := misfit(config, nodes)) is not None:
            raise ValueError(line)
        placed = assign(gangs, [node.free for node in nodes])
        is_missing = [place is None for place in placed]
        lines = [*plan_lines(gangs, nodes, placed), *wait.for_nodes(nodes)]
        if shown is None or (lines != shown and not any(is_missing)):
            for line in lines:
                say(line)
            shown = lines
        if any(is_missing) and not config.ray.wait_for_nodes_s:
            wait.check(missing_line(gangs, is_missing))
            await cluster.sleep(LOOK_S)
            continue
        groups: list[Group] = []
        is_held = False
        try:
            for gang, place in zip(gangs, placed, strict=True):
                node_id = None if place is None else nodes[place].node_id
                groups.append(cluster.make(gang, node_id) if gang.bundle else None)
            limit_s = (1 + chance()) * TURN_S if any(is_missing) else MADE_S
            is_held = await wait.until_made(gangs, groups, limit_s=limit_s)
        finally:
            if not is_held:
                cluster.remove([group for group in groups if group is not None])
        if is_held:
            planned = [None if place is None else nodes[place].node_id for place in placed]
            made = cluster.places(groups)
            return Held(gangs, groups, [a or b for a, b in zip(made, planned, strict=True)])
        await cluster.sleep((1 + 2 * chance()) * SETTLE_S)


class _Wait:
    """The wait of one run for all of its placement groups, with one deadline."""

    def __init__(self, config: Config, cluster: GangCluster, say: Callable[[str], None]) -> None:
        self._config, self._cluster, self._say = config, cluster, say
        for_nodes_s = config.ray.wait_for_nodes_s
        self._limit_s = for_nodes_s or config.deadlines.start_s
        self._knob = WAIT_KNOB if for_nodes_s else "deadlines.start_s"
        self._began_s = self._reported_s = cluster.now_s()

    def for_nodes(self, nodes: Sequence[Node]) -> list[str]:
        """Which nodes are waited for, in a line: the present ones can't hold the run."""
        line = awaited(self._config, nodes) if self._config.ray.wait_for_nodes_s else None
        if line is None:
            return []
        return [f"  waits up to {self._limit_s:g} s ({WAIT_KNOB}) for further nodes: {line}"]

    async def until_made(
        self, gangs: Sequence[Gang], groups: Sequence[Group], *, limit_s: float
    ) -> bool:
        """False: not all are made after `limit_s`, or they fit and Ray did not find how.

        Raises ValueError with what is missing when the deadline passes.
        """
        cluster = self._cluster
        began_s = looked_s = cluster.now_s()
        fits_s: float | None = None
        while True:
            places = cluster.places(groups)
            is_missing = [
                group is not None and place is None
                for group, place in zip(groups, places, strict=True)
            ]
            if not any(is_missing):
                return True
            self.check(missing_line(gangs, is_missing))
            now_s = cluster.now_s()
            if now_s - began_s >= limit_s or (fits_s is not None and now_s - fits_s >= SETTLE_S):
                return False
            if now_s - looked_s >= LOOK_S:
                looked_s = now_s
                room = with_ours(cluster.nodes(), gangs, places)
                fits = None not in assign(gangs, room)
                fits_s = (now_s if fits_s is None else fits_s) if fits else None
            await cluster.sleep(POLL_S)

    def check(self, missing: str) -> None:
        """Reports the wait now and then; ends it at the deadline."""
        now_s = self._cluster.now_s()
        waited_s = now_s - self._began_s
        if waited_s >= self._limit_s:
            raise ValueError(
                f"the Ray cluster at {self._config.ray.address} had no room for {missing} within "
                f"{self._limit_s:g} s ({self._knob}): {_free_line(self._cluster.nodes())}; end "
                f"other jobs, lower rollout.num_workers, or raise {self._knob}"
            )
        if now_s - self._reported_s >= REPORT_S:
            self._reported_s = now_s
            self._say(
                f"waits for room for {missing}: {waited_s:.0f} of {self._limit_s:g} s "
                f"({self._knob})"
            )


def with_ours(
    nodes: Sequence[Node], gangs: Sequence[Gang], places: Sequence[str | None]
) -> list[Mapping[str, float]]:
    """What each node would have free if the run gave back the groups that it has there."""
    ours: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for gang, place in zip(gangs, places, strict=True):
        if place is not None:
            for kind, amount in gang.needs.items():
                ours[place][kind] += amount
    return [
        {
            kind: node.free.get(kind, 0.0) + ours[node.node_id].get(kind, 0.0)
            for kind in node.free.keys() | ours[node.node_id].keys()
        }
        for node in nodes
    ]


def _free_line(nodes: Sequence[Node]) -> str:
    free = [f"{sum(node.free.get(kind, 0.0) for node in nodes):g} {kind}s" for kind in KINDS[::-1]]
    return f"{len(nodes)} nodes have {' and '.join(free)} free"
