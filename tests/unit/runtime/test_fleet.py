"""The fleet without Ray: workers that join, leave, or lose their node, with fake processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_actors import fake_actor
from paths import QUICKSTART
from ray.exceptions import RayActorError

from dapo_async import config as knobs
from dapo_async.runtime.actors.reports import ProcessInfo
from dapo_async.runtime.fleet import Fleet
from dapo_async.runtime.handles.actors import WorkerHandle
from dapo_async.runtime.scale_desk import Request
from dapo_async.runtime.supervisor import ProcessState, Supervisor

CONFIG = knobs.load(QUICKSTART, ["rollout.num_workers=2", "deadlines.ping_s=5"])


class World:
    """Two workers; what happens is in `log`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dapo_async.runtime.fleet.LOOK_S", 0.005)
        monkeypatch.setattr("ray.kill", lambda actor: self.log.append(f"kill {actor.name}"))
        self.log: list[str] = []
        self.asked: int | None = None
        self.folder = ""
        self.answers: list[tuple[bool, str]] = []
        self.going: dict[str, float] = {}
        self.fault: str | None = None
        self.can_start, self.dies_in_drain, self.drained = True, False, asyncio.Event()
        self.ends_at_once = False  # rollout-2
        self.drained.set()
        workers = [self.start(f"rollout-{number}", 0) for number in range(2)]
        actors = SimpleNamespace(
            workers=workers,
            resize=lambda count: self.log.append(f"resize {count}"),
            join_worker=self.start,
            leave_worker=lambda name: self.log.append(f"free {name}"),
        )
        anything = cast(Any, self)
        self.supervisor = Supervisor(
            replay=anything,
            publisher=anything,
            start_replay=cast(Any, None),
            start_rank=cast(Any, None),
            start_worker=lambda name, start: self.start(name, start).actor,
            start_evaluator=cast(Any, None),
            silence_s=5.0,
            start_s=5.0,
            say=self.log.append,
            pause=self.pause,
        )
        self.fleet = Fleet(
            CONFIG,
            cast(Any, actors),
            supervisor=self.supervisor,
            publisher=anything,
            replay=anything,
            say=self.log.append,
            desk=anything,
            room=cast(Any, SimpleNamespace(fault=self.room, going_nodes=lambda: self.going)),
        )

    def start(self, name: str, start: int) -> WorkerHandle:
        async def ready() -> ProcessInfo:
            if not self.can_start:
                raise RayActorError
            return ProcessInfo(name, 100 + start, "192.0.2.2", "new-node", "fake engine")

        async def forever() -> Any:
            if self.ends_at_once and name == "rollout-2":
                raise RayActorError
            await asyncio.Event().wait()

        async def ping() -> None: ...

        async def drain() -> None:
            self.log.append(f"drain {name}")
            if self.dies_in_drain:
                raise RayActorError
            await self.drained.wait()

        async def report() -> str:
            return f"report of {name}"

        methods = {"ready": ready, "run": forever, "lost": forever, "ping": ping, "drain": drain}
        actor = fake_actor(**methods, report=report)
        actor.name = name
        return WorkerHandle(name, actor, CONFIG.deadlines)

    # The replay actor, the publisher, the desk and the room.

    async def suspend(self, worker: str, on: bool) -> None:
        self.log.append(f"suspend {worker} {on}")

    async def lose_worker(self, worker: str, start: int) -> int:
        self.log.append(f"lose {worker} {start}")
        return 7

    def add(self, worker: WorkerHandle) -> None:
        self.log.append(f"add {worker.name}")

    def lose(self, worker: WorkerHandle) -> None: ...

    async def leave(self, worker: WorkerHandle) -> None:
        self.log.append(f"no weights for {worker.name}")

    def drop(self, worker: WorkerHandle) -> None: ...

    async def restore(self, worker: WorkerHandle) -> bool:
        self.log.append(f"weights for {worker.name}")
        return True

    async def pause(self, seconds: float) -> None: ...

    def take(self) -> Request | None:
        asked, self.asked = self.asked, None
        return None if asked is None else Request("id", asked)

    def accept(self, request: Request, line: str) -> None:
        self.answers.append((True, line))

    def refuse(self, request: Request, line: str) -> None:
        self.answers.append((False, line))

    def room(self, config: Any) -> str | None:
        return self.fault

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(20.0):
            while not done():
                await asyncio.sleep(0.005)

    async def said(self, line: str) -> None:
        await self.until(lambda: any(each.startswith(line) for each in self.log))

    @property
    def names(self) -> list[str]:
        return [worker.name for worker in self.fleet.workers]


def play(monkeypatch: pytest.MonkeyPatch, scene: Callable[[World], Awaitable[None]]) -> None:
    """Runs `scene` while the fleet is kept, which must not end meanwhile."""

    async def main() -> None:
        world = World(monkeypatch)
        keeping = asyncio.create_task(world.fleet.keep())
        acting = asyncio.ensure_future(scene(world))
        try:
            done, _ = await asyncio.wait({keeping, acting}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            keeping.cancel()
            acting.cancel()
            await asyncio.gather(keeping, acting, return_exceptions=True)

    asyncio.run(main())


def test_new_worker_proves_the_weights_before_it_gets_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World) -> None:
        world.asked = 3
        await world.said("rollout-2 joins the run")
        assert world.answers == [(True, "rollout.num_workers 2 -> 3: rollout-2 starts")]
        own = [each for each in world.log if "rollout-2" in each and "->" not in each]
        assert own == [
            "add rollout-2",
            "suspend rollout-2 True",
            "rollout-2 pid 100 on 192.0.2.2  fake engine",
            "weights for rollout-2",
            "suspend rollout-2 False",
            "rollout-2 joins the run",
        ]
        await world.until(lambda: len(world.fleet.members) == 3)

    play(monkeypatch, scene)


def test_worker_leaves_after_it_has_given_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        world.drained.clear()
        world.asked = 1
        await world.said("drain rollout-1")
        assert world.fleet.facts == {"wanted": 1, "here": 1, "states": {"rollout-1": "draining"}}
        assert "kill rollout-1" not in world.log
        world.drained.set()
        await world.said("rollout-1 has left the run")
        own = [each for each in world.log if "rollout-1" in each and "->" not in each]
        assert own[:-1] == [
            "suspend rollout-1 True",
            "no weights for rollout-1",
            "drain rollout-1",
            "kill rollout-1",
            "lose rollout-1 0",
            "free rollout-1",
        ]
        assert world.names == ["rollout-0"]
        assert world.supervisor.states["rollout-1"] is ProcessState.RETIRED
        (retired,) = world.supervisor.take_retired().values()
        assert (retired.start, retired.balance) == (1, 7)
        assert str(retired.last) == "report of rollout-1"
        # The name may come again, as the next process of this worker.
        world.asked = 2
        await world.said("rollout-1 joins the run")
        assert world.supervisor.num_starts("rollout-1") == 1
        assert world.fleet.counts == {"asked_for": 2, "here": 2, "joined": 1, "left": 1}

    play(monkeypatch, scene)


def test_worker_that_dies_while_it_leaves_hands_its_groups_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World) -> None:
        world.dies_in_drain = True
        world.asked = 1
        await world.said("rollout-1 has left the run")
        assert any(each.startswith("rollout-1 was not drained: ") for each in world.log)
        assert "lose rollout-1 0" in world.log
        assert not any("restarting it" in each for each in world.log)

    play(monkeypatch, scene)


def test_new_worker_that_can_not_start_is_given_up_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World) -> None:
        world.can_start = False
        world.asked = 3
        await world.said("rollout-2 could not join: ")
        await world.said("rollout-2 has left the run")
        assert world.fleet.wanted == 2
        assert world.names == ["rollout-0", "rollout-1"]

    play(monkeypatch, scene)


def test_new_worker_that_is_lost_before_it_serves_is_given_up_whenever_one_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World) -> None:
        async def lost(worker: WorkerHandle) -> bool:
            return False

        world.restore = lost  # type: ignore[method-assign]
        world.ends_at_once = True
        world.asked = 3
        seen: set[str] = set()

        def gave_up() -> bool:
            seen.update(each.name for each in world.fleet.members)  # as a reader at any time does
            return any(each.startswith("rollout-2 could not join: ") for each in world.log)

        await world.until(gave_up)
        await world.said("rollout-2 has left the run")
        assert (world.fleet.wanted, seen) == (2, {"rollout-0", "rollout-1"})

    play(monkeypatch, scene)


def test_request_without_room_is_refused_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World) -> None:
        world.fault = "the cluster has 4 CPUs"
        world.asked = 9
        await world.until(lambda: bool(world.answers))
        assert world.answers == [(False, "the cluster has 4 CPUs")]
        assert world.fleet.wanted == 2
        world.asked = 0
        await world.until(lambda: len(world.answers) == 2)
        assert world.answers[1][1].startswith("rollout.num_workers (0) must be at least 1")

    play(monkeypatch, scene)


def test_workers_of_a_node_that_goes_are_replaced_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World) -> None:
        for name, node in (("rollout-0", "spot-node"), ("rollout-1", "kept")):
            world.supervisor.processes[name] = ProcessInfo(name, 1, "192.0.2.2", node)
        world.going = {"spot-node": 0.0}
        await world.said("rollout-2 joins the run")
        await world.said("rollout-0 has left the run")
        assert world.names == ["rollout-1", "rollout-2"]
        assert "node spot-node is being drained; on it: rollout-0" in world.log

    play(monkeypatch, scene)


def test_nobody_leaves_during_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        assert [each.name for each in await world.fleet.begin_evaluation()] == world.names
        world.asked = 1
        await world.until(lambda: bool(world.answers))
        await asyncio.sleep(0.05)
        assert "drain rollout-1" not in world.log
        world.fleet.end_evaluation()
        await world.said("rollout-1 has left the run")

    play(monkeypatch, scene)


def test_another_worker_stands_in_for_one_that_is_lost_while_it_should_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the evaluation would wait for it, and it for the end of the evaluation."""

    async def scene(world: World) -> None:
        first, second = await world.fleet.begin_evaluation()
        assert world.fleet.stand_in(second, 1) is second
        world.asked = 1
        await world.until(lambda: bool(world.answers))
        assert world.fleet.stand_in(second, 1) is second  # it does its part before it leaves
        world.supervisor._is_back[second.name].clear()
        assert world.fleet.stand_in(second, 1) is first
        await world.said("rollout-1 has left the run")
        assert world.fleet.stand_in(second, 1) is first

    play(monkeypatch, scene)


def test_engines_that_can_not_move_stay_on_a_node_that_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World) -> None:
        world.fleet._can_move = False
        world.supervisor.processes["rollout-0"] = ProcessInfo("rollout-0", 1, "192.0.2.2", "spot")
        world.going = {"spot": 0.0}
        await world.said("node spot is being drained; on it: rollout-0")
        await asyncio.sleep(0.05)
        assert world.names == ["rollout-0", "rollout-1"]

    play(monkeypatch, scene)


def test_a_number_that_can_not_be_written_down_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World) -> None:
        def full(request: Request, line: str) -> None:
            raise OSError("No space left on device")

        world.folder = "runs/full"
        monkeypatch.setattr(world, "accept", full)
        world.asked = 3
        await world.until(lambda: bool(world.answers))
        assert world.answers[0][1].startswith("runs/full can't be written: No space left")
        assert world.fleet.wanted == 2
        await asyncio.sleep(0.05)
        assert world.names == ["rollout-0", "rollout-1"]

    play(monkeypatch, scene)
