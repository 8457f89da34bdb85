"""Actors that release their device memory: a worker with its engine, the ranks of a learner."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from fake_actors import fake_actor
from learner_world import rank_of, synthetic_groups
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.model import ShardCopy, checksum, score_tokens, take_snapshot
from dapo_async.rollout import EngineFault
from dapo_async.runtime.actors.learner import LearnerActor
from dapo_async.runtime.actors.rollout import RolloutActor
from dapo_async.runtime.handles.actors import LearnerHandle, WorkerHandle
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed
from dapo_async.runtime.handles.learner_group import LearnerGroup
from dapo_async.runtime.launch import Actors
from dapo_async.runtime.system import System
from dapo_async.tracking.run_dir import RunDir
from dapo_async.weights import Announcement
from dapo_async.weights.disk import read_version

CONFIG = knobs.load(QUICKSTART, ["model.placement=shared"])


class Host:
    """An engine whose calls are logged, and fail when they are told to."""

    restartable = True

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fails = ""
        self.may_read = asyncio.Event()

    async def sleep(self) -> None:
        self._do("sleep")

    async def wake(self) -> None:
        self._do("wake")

    async def end(self) -> None:
        self._do("end")

    async def read(self, announcement: Announcement, folder: str) -> Any:
        await self.may_read.wait()
        self._do("read")
        return SimpleNamespace(version=3)

    def _do(self, what: str) -> None:
        self.log.append(what)
        if self.fails == what:
            raise EngineFault(f"{what} failed")


class Worker:
    """The states of a worker that count here."""

    is_lost = False

    def lose(self, why: str) -> None:
        self.is_lost = True

    def hold(self) -> None: ...

    def updated(self, version: int, *, began_s: float) -> None: ...


class Sleeper(RolloutActor):
    """A rollout actor with these two."""

    def _make_host(self, logs: Path, *, outer_key: str) -> Any:
        return Host()


def sleeper() -> tuple[Sleeper, Host, Worker]:
    actor = Sleeper(CONFIG, number=0, incarnation="run", replay=cast(Any, None), logs=Path())
    worker = Worker()
    actor._worker = worker  # type: ignore[assignment]
    return actor, cast(Host, actor._host), worker


def play(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 20))


def test_an_engine_sleeps_after_the_update_that_runs_and_reads_the_next_one_awake() -> None:
    async def scene() -> None:
        actor, host, _ = sleeper()
        announcement = cast(Announcement, None)
        reading = asyncio.create_task(actor.read(announcement, ""))
        await asyncio.sleep(0.01)
        sleeping = asyncio.create_task(actor.sleep())
        await asyncio.sleep(0.01)
        assert host.log == []
        host.may_read.set()
        await asyncio.gather(reading, sleeping)
        again = asyncio.create_task(actor.read(announcement, ""))
        await actor.sleep()  # it sleeps already
        await asyncio.sleep(0.01)
        assert host.log == ["read", "sleep"]
        await actor.wake()
        await again
        await actor.wake()  # it is awake
        assert host.log == ["read", "sleep", "wake", "read"]

    play(scene)


@pytest.mark.parametrize("fails", ["sleep", "wake"])
def test_an_engine_that_fails_is_lost_and_keeps_no_memory_in_the_learners_turn(fails: str) -> None:
    async def scene() -> None:
        actor, host, worker = sleeper()
        host.fails = fails
        await actor.sleep()
        assert worker.is_lost is (fails == "sleep")
        await actor.wake()
        assert worker.is_lost
        lost_asleep = ["sleep", "end"]  # what is left of its server is ended, and not woken
        assert host.log == (lost_asleep if fails == "sleep" else ["sleep", "wake"])
        assert not actor._in_use.locked()

    play(scene)


def test_a_lost_engine_is_ended_before_the_learner_wakes() -> None:
    async def scene() -> None:
        actor, host, worker = sleeper()
        worker.is_lost = True
        await actor.sleep()
        await actor.wake()
        assert host.log == ["end"]

    play(scene)


def test_a_dead_worker_needs_no_sleep_and_one_that_fails_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr("ray.kill", killed.append)

    def worker(error: Exception | None) -> WorkerHandle:
        async def sleep() -> None:
            if error is not None:
                raise error

        return WorkerHandle("rollout-0", fake_actor(sleep=sleep), CONFIG.deadlines)

    async def scene() -> None:
        await worker(None).sleep()
        await worker(ActorDied("rollout-0", "gone")).sleep()
        assert killed == []
        await worker(ActorFailed("out of memory")).sleep()
        assert len(killed) == 1

    play(scene)


def test_a_learner_sleeps_with_its_snapshot_and_still_answers_for_it(tmp_path: Path) -> None:
    async def scene() -> None:
        actor = LearnerActor(
            CONFIG, number=0, name="learner", incarnation="run", run_dir=RunDir(tmp_path)
        )
        actor._rank = rank = rank_of(version=0)
        rank.step(synthetic_groups())
        actor._mesh = rank._mesh
        announcement = await actor.snapshot()
        assert announcement is not None
        expected = take_snapshot(rank.decoder, version=1, probe_tokens=4).copy.whole()
        awake_sum = await actor.checksum(announcement)
        assert awake_sum == checksum(expected)
        before = {name: each.clone() for name, each in expected.items()}
        answer = score_tokens(rank.decoder, announcement.probe_ids)

        await actor.sleep()  # behind the answer to the probe

        assert actor._clock.state == "asleep"
        assert sum(each.untyped_storage().nbytes() for each in rank.decoder.parameters()) == 0
        assert await actor.checksum(announcement) == awake_sum
        np.testing.assert_array_equal(await actor.probe(announcement), answer)
        await actor.collect(announcement)
        folder = await actor.write(announcement)
        assert checksum(read_version(Path(folder), version=1)) == awake_sum
        assert await actor.capture_state() == await actor.version() == 1
        assert actor._clock.state == "asleep"
        await actor.wake()
        assert actor._clock.state == "wait"
        now = dict(rank.decoder.named_parameters())
        assert all(torch.equal(now[name].detach(), each) for name, each in before.items())

    play(scene)


def test_a_copy_that_is_still_read_is_not_overwritten(tmp_path: Path) -> None:
    async def scene() -> None:
        actor = LearnerActor(
            CONFIG, number=0, name="learner", incarnation="run", run_dir=RunDir(tmp_path)
        )
        actor._rank = rank = rank_of(version=0)
        actor._mesh = rank._mesh
        kept: list[tuple[str, str]] = []
        may_end = threading.Event()

        def slow(copy: ShardCopy) -> None:
            may_end.wait(20)
            kept.append((copy.checksum(), first_sum))

        first = await actor.snapshot()
        assert first is not None
        first_sum = await actor.checksum(first)
        assert actor._snapshot is not None
        memory = actor._snapshot.copy.flat.data_ptr()
        reading = asyncio.create_task(actor._reading(slow, actor._snapshot.copy))
        await asyncio.sleep(0)
        for step in range(3):
            rank.step(synthetic_groups())
            announcement = await actor.snapshot()
            assert announcement is not None
            assert await actor.checksum(announcement) != first_sum
            assert (actor._snapshot.copy.flat.data_ptr() == memory) is False
            if step == 1:
                may_end.set()
                await reading
                memory = 0
        second = actor._snapshot.copy.flat.data_ptr()
        await actor.snapshot()
        assert actor._snapshot.copy.flat.data_ptr() == second  # nobody reads: the memory is taken
        ((found, expected),) = kept
        assert found == expected

    play(scene)


def test_ranks_sleep_together_and_a_dead_one_is_not_missed() -> None:
    log: list[str] = []

    def rank(number: int) -> LearnerHandle:
        async def sleep() -> None:
            if number == 1:
                raise ActorDied("learner-1", "gone")
            log.append(f"{number} sleeps")

        async def wake() -> None:
            log.append(f"{number} wakes")

        actor = fake_actor(sleep=sleep, wake=wake)
        return LearnerHandle(f"learner-{number}", actor, CONFIG.deadlines)

    async def scene() -> None:
        group = LearnerGroup([rank(0), rank(1), rank(2)], CONFIG)
        await group.sleep()
        await group.wake()
        assert log == ["0 sleeps", "2 sleeps", "0 wakes", "1 wakes", "2 wakes"]

    play(scene)


def test_engines_start_when_the_learner_has_left_the_device() -> None:
    log: list[str] = []

    def handle(kind: Any, name: str) -> Any:
        async def ready(*_: Any) -> Any:
            await asyncio.sleep(0.01)
            log.append(f"{name} is ready")
            return SimpleNamespace(name=name)

        async def call(what: str) -> Any:
            log.append(what)

        actor = fake_actor(
            ready=ready,
            snapshot=lambda: snapshot(),
            sleep=lambda: call(f"{name} sleeps"),
            microbatch_tokens=lambda: tokens(),
            plan_with=lambda _: call("plan"),
        )
        return kind(name, actor, CONFIG.deadlines)

    async def snapshot() -> str:
        log.append("snapshot")
        return "first weights"

    async def tokens() -> int:
        return 64

    class Replay:
        """Ready at once."""

        name = "replay"
        batch_again = None

        async def ready(self) -> Any:
            return SimpleNamespace(name="replay")

        async def plan_with(self, tokens: int) -> None: ...

    async def scene() -> None:
        actors = Actors(
            replay=cast(Any, Replay()),
            ranks=[handle(LearnerHandle, "learner")],
            workers=[handle(WorkerHandle, "rollout-0")],
            evaluator=None,
            start_replay=cast(Any, None),
            start_rank=cast(Any, None),
            start_worker=cast(Any, None),
            start_evaluator=cast(Any, None),
            without_room=tuple,
        )
        system = System(CONFIG, actors, say=lambda line: None)
        await system.start()
        assert log == ["learner is ready", "snapshot", "learner sleeps", "rollout-0 is ready"]
        assert cast(Any, await system.first_snapshot()) == "first weights"

    play(scene)
