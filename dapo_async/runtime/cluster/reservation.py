"""Reserves what a run needs on a joined cluster, before any of its actors starts.

In: the config and the cluster. Out: a `Reservation`, which says for each actor where it starts.
`run` calls `reserve`, `launch` uses the result.

Each gang of `placement` is one placement group: STRICT_PACK, and aimed at its planned node.
`gang_wait` sees to it that all of a run is reserved or nothing. One group for the whole run would
pin its engines to nodes: when an engine is replaced, its group is made anew without an aim, so the
engine may start on a node that joined later. A run's own Ray is one machine and has what the run
asked for: nothing is reserved there, which saves its start the time, unless several pairs of a rank
and an engine share GPUs.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Thread
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from dapo_async.config import Config
from dapo_async.runtime.cluster.environment import LOCAL
from dapo_async.runtime.cluster.gang_wait import LOOK_S, hold_all
from dapo_async.runtime.cluster.misfit import misfit
from dapo_async.runtime.cluster.placement import (
    ROUNDING,
    Gang,
    Node,
    Side,
    planned_gangs,
    spread,
)
from dapo_async.runtime.cluster.planned_actors import planned_actors

ANYWHERE, SPREAD = "DEFAULT", "SPREAD"  # Ray's strategies
CREATED = "CREATED"
Strategy = Any  # Ray's word for where an actor starts


class Reservation:
    """Says where each actor starts. Without gangs: anywhere, as on a run's own Ray."""

    def __init__(
        self,
        gangs: Sequence[Gang] = (),
        groups: Sequence[PlacementGroup | None] = (),
        learner_node: str | None = None,
    ) -> None:
        """`groups`: those of `gangs`; None for a gang that reserves nothing."""
        self._gangs = {name: gang for gang in gangs for name in gang.names}
        self._groups = {
            gang.names: group
            for gang, group in zip(gangs, groups, strict=True)
            if group is not None
        }
        self._learner_node = learner_node

    @property
    def is_empty(self) -> bool:
        """Nothing is planned, as on a run's own Ray."""
        return not self._gangs

    def join(self, name: str, config: Config) -> None:
        """Plans and reserves one more engine, on a node with room that has few engines; Ray makes
        the reservation when there is such a node."""
        if self.is_empty:
            return
        engine = next(gang for gang in planned_gangs(config) if gang.side is Side.ENGINE)
        self._gangs[name] = gang = replace(engine, names=(name,))
        if gang.bundle:
            nodes, there = staying_nodes(), Counter(self._engine_nodes())
            free = [node.free for node in nodes]
            engines = [there[node.node_id] for node in nodes]
            places = spread(free, gang.needs, 1, there=engines)
            node_id = nodes[places[0]].node_id if places else None
            self._groups[gang.names] = _reserve(gang, name=name, node_id=node_id)

    def leave(self, name: str) -> None:
        """Gives back what an engine has reserved."""
        gang = self._gangs.pop(name, None)
        if gang is not None and (group := self._groups.pop(gang.names, None)) is not None:
            remove_placement_group(group)

    def _engine_nodes(self) -> Iterator[str]:
        """The node of each engine that has one."""
        table = placement_group_table()
        for names, group in self._groups.items():
            if self._gangs[names[0]].side is Side.ENGINE:
                yield from table.get(group.id.hex(), {}).get("bundles_to_node_id", {}).values()

    @property
    def beside_learner(self) -> Strategy:
        """For an actor that reserves nothing: the first node of the learner."""
        return self._beside_learner(soft=False)

    @property
    def beside_learner_again(self) -> Strategy:
        """For a process that replaces a lost one: the same node, or any if that is gone."""
        return self._beside_learner(soft=True)

    def _beside_learner(self, *, soft: bool) -> Strategy:
        if self._learner_node is None:
            return ANYWHERE
        return NodeAffinitySchedulingStrategy(self._learner_node, soft=soft)

    def strategy(self, name: str) -> Strategy:
        """For the first process of the actor `name`."""
        if name not in self._gangs:
            return ANYWHERE
        gang = self._gangs[name]
        group = self._groups.get(gang.names)
        if group is None:
            return self.beside_learner if name.startswith("learner") else SPREAD
        return PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=gang.bundle_of(name)
        )

    def renewed(self, name: str) -> Strategy:
        """For a process that replaces a lost one: any node with room, also one that is new."""
        gang = self._gangs.get(name)
        if gang is not None and len(gang.names) == 1 and gang.names in self._groups:
            old = self._groups[gang.names]
            self._groups[gang.names] = _reserve(gang, name=name, node_id=None)
            remove_placement_group(old)
        return self.strategy(name)

    def without_room(self) -> tuple[str, ...]:
        """The actors whose reservation is not there now: their node is lost, and Ray has found no
        other one."""
        states = placement_group_table()
        return tuple(
            name
            for names, group in self._groups.items()
            if states.get(group.id.hex(), {}).get("state") != CREATED
            for name in names
        )

    def release(self) -> None:
        """Gives everything back. Ray does so at the end of a driver."""
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups = {}


async def reserve(config: Config, *, say: Callable[[str], None]) -> Reservation:
    """Prints the plan, reserves it, and waits until all of it is there; see `gang_wait`.

    It waits for resources that other jobs hold, for `deadlines.start_s`, and for nodes that are not
    there yet only with `ray.wait_for_nodes_s`. Raises ValueError, with nothing reserved, when
    the cluster is too small or the deadline passes.
    """
    if config.ray.address == LOCAL and not _has_several_pairs(config):
        return Reservation()
    held = await hold_all(config, _RayCluster(), say=say)
    return Reservation(held.gangs, held.groups, held.places[0])


def _has_several_pairs(config: Config) -> bool:
    """Of a rank and an engine on one GPU: without bundles Ray may put two ranks on one."""
    return config.model.is_shared and config.gpus_per_rank > 0 and config.rollout.num_workers > 1


class _RayCluster:
    """Ray, as `gang_wait` needs it."""

    def nodes(self) -> list[Node]:
        return live_nodes()

    def make(self, gang: Gang, node_id: str | None) -> PlacementGroup:
        return _reserve(gang, name=gang.names[0], node_id=node_id)

    def places(self, groups: Sequence[PlacementGroup | None]) -> list[str | None]:
        table = placement_group_table()
        found = [{} if group is None else table.get(group.id.hex(), {}) for group in groups]
        return [
            str(each["bundles_to_node_id"][0]) if each.get("state") == CREATED else None
            for each in found
        ]

    def remove(self, groups: Sequence[PlacementGroup]) -> None:
        for group in groups:
            remove_placement_group(group)

    def now_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def live_nodes() -> list[Node]:
    """The live nodes, the driver's first."""
    own, free = ray.get_runtime_context().get_node_id(), available_resources_per_node()
    nodes = [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["Resources"],
            free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: node.node_id != own)


def staying_nodes() -> list[Node]:
    """The live nodes, without those that are about to go."""
    going = state.get_draining_nodes()
    return [node for node in live_nodes() if node.node_id not in going]


class ClusterRoom:
    """What Ray says while a run goes on; see `fleet.Room`."""

    def __init__(self, config: Config) -> None:
        """On a joined cluster a thread asks for nodes that are about to go: a head that hangs would
        hold up whoever asks it."""
        self._going: dict[str, float] = {}
        if config.ray.address != LOCAL:
            Thread(target=self._follow, name="nodes that go", daemon=True).start()

    def _follow(self) -> None:
        while ray.is_initialized():
            with suppress(Exception):  # the head is gone, which `head_watch` tells
                found = state.get_draining_nodes()
                if {node.node_id for node in live_nodes()} <= found.keys():
                    found = {}  # nothing is left to move to: they work until they go
                self._going = {node_id: 1e-3 * at_ms for node_id, at_ms in found.items()}
            time.sleep(LOOK_S)

    def fault(self, config: Config) -> str | None:
        """Why the engines of `config` have no room, in one line; else None.

        On a run's own Ray only GPUs count: its CPUs are a plan, and its actors share all cores.
        """
        if config.ray.address != LOCAL:
            return None if config.ray.wait_for_nodes_s else misfit(config, staying_nodes())
        wanted = sum(actor.num_gpus for actor in planned_actors(config))
        there = ray.cluster_resources().get("GPU", 0.0)
        if wanted <= there + ROUNDING:
            return None
        return (
            f"{config.rollout.num_workers} engines and the rest of the run need {wanted:g} GPUs, "
            f"this machine has {there:g}; ask for fewer"
        )

    def going_nodes(self) -> dict[str, float]:
        """By Ray's id: nodes that are being drained, such as spot machines that were called back,
        and when they go, in seconds since the epoch; 0 where Ray was not told."""
        return self._going


def _reserve(gang: Gang, *, name: str, node_id: str | None) -> PlacementGroup:
    """Returns at once; Ray makes the group in the background.

    The name has a suffix: Ray refuses that of a group which is still being removed.
    """
    group: PlacementGroup = placement_group(
        [dict(gang.bundle)] * gang.count,
        strategy="STRICT_PACK",
        name=f"{name}.{secrets.token_hex(4)}",
        _soft_target_node_id=node_id,
    )
    return group
