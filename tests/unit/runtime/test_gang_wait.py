"""When a run holds its placement groups, on a made-up cluster in virtual time."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from paths import QUICKSTART

from dapo_async.config import Config, load
from dapo_async.runtime.cluster.gang_wait import Held, hold_all
from dapo_async.runtime.cluster.placement import Gang, Node

CUDA = ("model.device=cuda", "rollout.engine=sglang", "model.num_cpus=0.01")
EIGHT_AND_FOUR = (
    *CUDA, "learner.tensor_parallel=8", "rollout.num_workers=4", "rollout.tensor_parallel=2",
)  # fmt: skip


def config_of(*overrides: str) -> Config:
    return load(QUICKSTART, [*overrides, "ray.address=10.0.0.1:6379"], files=False)


@dataclass(eq=False)
class Group:
    gang: Gang
    wanted: str | None
    place: str | None = None


@dataclass
class World:
    """A cluster that makes each group as soon as some node has room, as Ray does."""

    gpus: dict[str, float]
    free: dict[str, float] = field(init=False)
    groups: list[Group] = field(default_factory=list)
    time_s: float = 0.0
    events: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    _waiting: list[tuple[float, int, asyncio.Future[None]]] = field(default_factory=list)
    order: random.Random | None = None  # in which groups get their room; None: the oldest first
    most_partial: int = 0  # GPUs that runs held while something of them was missing

    def __post_init__(self) -> None:
        self.free = dict(self.gpus)

    def nodes(self) -> list[Node]:
        cpus = {"CPU": 64.0}
        return [
            Node(name, name, {"GPU": gpus, **cpus}, {"GPU": self.free[name], **cpus})
            for name, gpus in self.gpus.items()
        ]

    def make(self, gang: Gang, node_id: str | None) -> Group:
        self.groups.append(group := Group(gang, node_id))
        return group

    def places(self, groups: Sequence[Group | None]) -> list[str | None]:
        return [None if group is None else group.place for group in groups]

    def remove(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self.groups.remove(group)
            if group.place is not None:
                self.free[group.place] += group.gang.needs["GPU"]

    def now_s(self) -> float:
        return self.time_s

    async def sleep(self, seconds: float) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (self.time_s + seconds, id(done), done))
        await done

    def step(self) -> None:
        """Wakes whoever sleeps the shortest time, after what has happened until then."""
        self.time_s, _, done = heapq.heappop(self._waiting)
        for event in [each for each in self.events if each[0] <= self.time_s]:
            event[1]()
            self.events.remove(event)
        groups = list(self.groups)
        if self.order is not None:
            self.order.shuffle(groups)
        for group in groups:
            needs = group.gang.needs["GPU"]
            names = [*filter(None, [group.wanted]), *self.free]
            fit = [name for name in names if self.free[name] >= needs]
            if group.place is None and fit:
                group.place = fit[0]
                self.free[fit[0]] -= needs
        if any(group.place is None for group in self.groups):
            made = [group.gang.needs["GPU"] for group in self.groups if group.place is not None]
            self.most_partial = max(self.most_partial, int(sum(made)))
        done.set_result(None)

    def play(self, *runs: Coroutine[Any, Any, Held]) -> list[Held | BaseException]:
        async def all_of_them() -> list[Held | BaseException]:
            tasks = [asyncio.ensure_future(run) for run in runs]
            while not all(task.done() for task in tasks):
                for _ in range(5):
                    await asyncio.sleep(0)
                if self._waiting:
                    self.step()
            return await asyncio.gather(*tasks, return_exceptions=True)

        return asyncio.run(all_of_them())

    def held_by_others(self, name: str, gpus: float, *, until_s: float) -> None:
        self.free[name] -= gpus

        def release() -> None:
            self.free[name] += gpus

        self.events.append((until_s, release))


def run(world: World, config: Config, lines: list[str], seed: int = 0) -> Any:
    return hold_all(config, world, say=lines.append, chance=random.Random(seed).random)


def test_nothing_is_held_until_the_whole_run_has_room() -> None:
    world = World({"n1": 8, "n2": 8})
    world.held_by_others("n1", 4, until_s=50.0)
    world.held_by_others("n2", 8, until_s=20.0)
    lines: list[str] = []
    (held,) = world.play(run(world, config_of(*EIGHT_AND_FOUR), lines))
    assert isinstance(held, Held)
    assert held.places == ["n1", "n2", "n2", "n2", "n2"] or held.places == ["n2", *["n1"] * 4]
    assert world.most_partial == 0
    assert 50.0 <= world.time_s < 55.0
    assert "  no room yet: learner-0..7 (8 GPUs on one node each), rollout-2..3 (" in "".join(
        line.replace("0.08 CPUs, ", "").replace("0.01 CPUs, ", "") for line in lines
    )
    assert sum(line.startswith("waits for room for ") for line in lines) == 2


def test_engines_that_took_what_freed_first_give_it_back_to_the_learner() -> None:
    world = World({"n1": 8, "n2": 8})
    world.held_by_others("n1", 4, until_s=30.0)
    world.held_by_others("n2", 6, until_s=20.0)
    config = config_of(*EIGHT_AND_FOUR, "ray.wait_for_nodes_s=600")
    (held,) = world.play(run(world, config, []))
    assert isinstance(held, Held)
    assert None not in held.places
    assert world.time_s < 45.0
    assert world.most_partial > 0  # the price of the demand that an autoscaler sees


@pytest.mark.parametrize("seed", range(20))
def test_two_runs_that_start_together_come_one_after_the_other(seed: int) -> None:
    world = World({"n1": 8, "n2": 8}, order=random.Random(seed))
    config = config_of(*EIGHT_AND_FOUR)

    async def run_and_end(number: int) -> Held:
        held: Held = await run(world, config, [], seed=2 * seed + number)
        world.events.append((world.time_s + 100.0, lambda: world.remove(held.groups)))
        return held

    both = world.play(run_and_end(0), run_and_end(1))
    assert all(isinstance(held, Held) for held in both), both
    assert world.time_s < 160.0


@pytest.mark.parametrize("seed", range(10))
def test_two_runs_that_wait_for_nodes_do_not_keep_a_half_each_for_ever(seed: int) -> None:
    world = World({"n1": 8, "n2": 8}, order=random.Random(seed))
    world.held_by_others("n1", 8, until_s=10.0)
    config = config_of(
        *CUDA,
        "rollout.num_workers=7",
        "rollout.tensor_parallel=2",
        "ray.wait_for_nodes_s=1800",
    )

    async def run_and_end(number: int) -> Held:
        held: Held = await run(world, config, [], seed=2 * seed + number)
        world.events.append((world.time_s + 100.0, lambda: world.remove(held.groups)))
        return held

    both = world.play(run_and_end(0), run_and_end(1))
    assert all(isinstance(held, Held) for held in both), both
    assert world.time_s < 1000.0


def test_a_cluster_that_stays_full_ends_the_wait_with_nothing_held() -> None:
    world = World({"n1": 8, "n2": 8})
    world.held_by_others("n2", 8, until_s=1e9)
    (ended,) = world.play(run(world, config_of(*EIGHT_AND_FOUR, "deadlines.start_s=30"), []))
    assert isinstance(ended, ValueError)
    assert "had no room for rollout-0..3 (0.01 CPUs, 2 GPUs on one node each) within 30 s" in str(
        ended
    )
    assert world.groups == []


def test_a_run_that_no_present_node_can_hold_says_at_once_what_it_waits_for() -> None:
    world = World({"n1": 8, "n2": 8})
    config = config_of(*CUDA, "rollout.tensor_parallel=16", "ray.wait_for_nodes_s=600")
    lines: list[str] = []
    (ended,) = world.play(run(world, config, lines))
    assert isinstance(ended, ValueError)
    assert lines[2] == (
        "  waits up to 600 s (ray.wait_for_nodes_s) for further nodes: no node can hold one "
        "engine, even if it is empty: it needs 16 GPUs on one node, the largest has 8 GPUs"
    )
