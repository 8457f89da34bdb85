"""The supervisor without Ray: what it does with workers that die, hang or lose their engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from fake_actors import fake_actor, fake_method
from paths import QUICKSTART
from ray.exceptions import RayActorError

from dapo_async import config as knobs
from dapo_async.runtime.actors.reports import ProcessInfo
from dapo_async.runtime.handles.actors import EvaluatorHandle, WorkerHandle
from dapo_async.runtime.handles.handle import ActorDied
from dapo_async.runtime.supervisor import PINGS, ProcessState, Pulse, Supervisor
from dapo_async.utils.restart_budget import LONGEST_PAUSE_S, REFILL_S, RestartBudget

DEADLINES = knobs.load(QUICKSTART, ["deadlines.ping_s=0.3"]).deadlines


def test_budget_pauses_longer_each_time_and_refills() -> None:
    budget = RestartBudget(limit=4)
    assert [budget.spend(now_s) for now_s in (0.0, 1.0, 2.0, 3.0)] == [0.0, 1.0, 2.0, 4.0]
    assert budget.spend(4.0) is None
    assert budget.spend(REFILL_S) == 4.0, "the first restart counts no longer"
    assert budget.spend(REFILL_S + 0.5) is None
    assert budget.spend(2 * REFILL_S) == 0.0
    many = RestartBudget(limit=20)
    assert max(many.spend(0.0) or 0.0 for _ in range(20)) == LONGEST_PAUSE_S


def test_one_late_answer_is_no_death() -> None:
    pulse = Pulse()
    answers = [True, False, False, True, *[False] * PINGS]
    healthy, suspect, dead = ProcessState.HEALTHY, ProcessState.SUSPECT, ProcessState.DEAD
    expected = [healthy, suspect, suspect, healthy, suspect, suspect, dead]
    assert [pulse.beat(answered) for answered in answers] == expected


class Process:
    """A rollout actor's process, behind Ray's handle. `end` ends it, `hangs` silences it."""

    def __init__(self, start: int) -> None:
        self.start, self.hangs, self.killed = start, False, False
        self.engine_lost: str | None = None
        self.changed = asyncio.Event()
        self.error: Exception | None = None
        self.num_restarts = 0
        for name in ("ready", "run", "lost", "ping", "restart"):
            setattr(self, name, fake_method(getattr(self, f"_{name}")))

    def end(self, error: Exception | None = None) -> None:
        self.error = error or RayActorError()
        self.changed.set()

    def lose_engine(self, why: str) -> None:
        self.engine_lost = why
        self.changed.set()

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            if self.error is not None:
                raise self.error
            self.changed.clear()
            await self.changed.wait()

    async def _ready(self) -> ProcessInfo:
        if self.error is not None:
            raise self.error
        return ProcessInfo("rollout-0", 100 + self.start, "192.0.2.2", "node", "fake engine")

    async def _run(self) -> None:
        await self._until(lambda: False)

    async def _lost(self) -> str:
        await self._until(lambda: self.engine_lost is not None)
        return str(self.engine_lost)

    async def _ping(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()

    async def _restart(self) -> None:
        self.engine_lost = None
        self.num_restarts += 1


class World:
    """A supervisor of one worker, with everything that it does in `log`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.processes = [Process(0)]
        self.fails_to_start = 0
        self.restores = True
        monkeypatch.setattr("ray.kill", lambda process: setattr(process, "killed", True))
        self.worker = WorkerHandle("rollout-0", self.processes[0], DEADLINES)
        self.supervisor = Supervisor(
            replay=cast(Any, self),
            publisher=cast(Any, self),
            start_replay=cast(Any, None),
            start_rank=cast(Any, None),
            start_worker=self.start_worker,
            start_evaluator=self.start_evaluator,
            silence_s=DEADLINES.ping_s,
            start_s=5.0,
            say=lambda line: self.log.append(f"say {line}"),
            pause=self.pause,
        )

    # The replay actor and the publisher.

    async def suspend(self, worker: str, on: bool) -> None:
        self.log.append(f"suspend {worker} {on}")

    async def lose_worker(self, worker: str, start: int) -> int:
        self.log.append(f"groups of {worker} {start} go back")
        return 7

    def lose(self, worker: WorkerHandle) -> None:
        self.log.append(f"no weights for {worker.name}")

    async def restore(self, worker: WorkerHandle) -> bool:
        self.log.append(f"weights for {worker.name}")
        return self.restores

    def start_worker(self, name: str, start: int) -> Process:
        self.log.append(f"start {name} {start}")
        self.processes.append(Process(start))
        if self.fails_to_start:
            self.fails_to_start -= 1
            self.processes[-1].end()
        return self.processes[-1]

    def start_evaluator(self) -> Any:
        self.log.append("start evaluator")
        return self.processes[-1]

    async def pause(self, seconds: float) -> None:
        self.log.append(f"pause {seconds:g}")

    async def until(self, line: str, times: int = 1) -> None:
        async with asyncio.timeout(5.0):
            while self.log.count(line) < times:
                await asyncio.sleep(0.005)

    def play(self, scene: Callable[[], Any]) -> None:
        async def both() -> None:
            self.processes[0].changed = asyncio.Event()
            keep = asyncio.create_task(self.supervisor.keep_worker(self.worker))
            try:
                await asyncio.sleep(0.01)
                acting = asyncio.create_task(scene())
                done, _ = await asyncio.wait({keep, acting}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                keep.cancel()
                await asyncio.gather(keep, return_exceptions=True)

        asyncio.run(both())


BACK = "say rollout-0 generates again"


def test_dead_worker_is_replaced_after_its_groups_went_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        world.processes[0].end()
        await world.until(BACK)
        assert not world.supervisor.is_gone("rollout-0")

    world.play(scene)
    said = [line for line in world.log if line.startswith("say")]
    assert [line for line in world.log if not line.startswith("say")] == [
        "suspend rollout-0 True",
        "no weights for rollout-0",
        "groups of rollout-0 0 go back",
        "pause 0",
        "start rollout-0 1",
        "weights for rollout-0",
        "suspend rollout-0 False",
    ]
    assert said[0].startswith("say rollout-0 lost its process: rollout-0 died")
    assert said[0].endswith("restarting it (1 of 3)")
    assert said[1:] == [
        "say rollout-0  pid 101 on 192.0.2.2  fake engine".replace("  pid", " pid"),
        BACK,
    ]
    assert world.supervisor.restarts == {"rollout-0": 1}
    (retired,) = world.supervisor.take_retired().values()
    assert (retired.start, retired.balance) == (1, 7)
    assert not world.supervisor.take_retired()


def test_worker_that_hangs_is_killed_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        world.processes[0].hangs = True
        await world.until(BACK)

    world.play(scene)
    assert world.processes[0].killed
    assert any("rollout-0 did not answer for 0.3 s" in line for line in world.log)


def test_lost_engine_is_restarted_in_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        world.processes[0].lose_engine("the server exited with code 9")
        await world.until(BACK)

    world.play(scene)
    assert (len(world.processes), world.processes[0].num_restarts) == (1, 1)
    line = "say rollout-0 lost its engine: the server exited with code 9; restarting it (1 of 3)"
    assert line in world.log
    assert not [line for line in world.log if "go back" in line], "its worker hands them back"


def test_worker_that_fails_by_itself_is_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        world.processes[0].end(ValueError("a fault of this program"))
        await world.until(BACK)

    world.play(scene)
    assert "a fault of this program" in world.log[3], world.log


def test_worker_that_dies_again_and_again_ends_the_run_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.fails_to_start = 9

    async def scene() -> None:
        world.processes[0].end()
        await asyncio.sleep(5.0)

    with pytest.raises(ActorDied) as caught:
        world.play(scene)
    line = (
        "rollout-0 lost its process, after 3 restarts in 30 minutes (3 are allowed): rollout-0 died"
    )
    assert str(caught.value).startswith(line)
    assert [line for line in world.log if line.startswith("pause")] == [
        "pause 0",
        "pause 1",
        "pause 2",
    ]


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_lost_evaluator_is_replaced(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        living = asyncio.Event()  # the second process runs

        async def alive() -> None:
            if how == "dies" and not living.is_set():
                raise RayActorError
            await asyncio.Event().wait()

        async def ready() -> ProcessInfo:
            living.set()
            return ProcessInfo("evaluator", 7, "192.0.2.2", "node", "fake engine")

        async def ping() -> None:
            if not living.is_set():
                await asyncio.Event().wait()

        actor = fake_actor(alive=alive, ready=ready, ping=ping)
        monkeypatch.setattr(world, "start_evaluator", lambda: actor)
        world.supervisor._start_evaluator = lambda: actor
        evaluator = EvaluatorHandle("evaluator", actor, DEADLINES)
        keep = asyncio.create_task(world.supervisor.keep_evaluator(evaluator))
        await world.until("say evaluator pid 7 on 192.0.2.2  fake engine")
        keep.cancel()

    asyncio.run(scene())
    assert world.supervisor.restarts == {"evaluator": 1}
