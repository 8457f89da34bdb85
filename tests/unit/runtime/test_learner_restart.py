"""A learner whose ranks are lost: it is restarted, and does what it did since its checkpoint again.

A rank here is the list of the minibatches that its weights have seen.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_actors import fake_actor
from paths import QUICKSTART
from ray.exceptions import RayActorError, RayTaskError

from dapo_async import config as knobs
from dapo_async.runtime.actors.reports import ProcessInfo
from dapo_async.runtime.handles import restarts
from dapo_async.runtime.handles.actors import LearnerHandle
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed, ActorSilent
from dapo_async.runtime.handles.learner_group import LearnerGroup
from dapo_async.runtime.handles.redo_log import MOST_STEPS, RedoLog
from dapo_async.runtime.supervisor import Supervisor
from dapo_async.types import MemoryShort, StateUnusable, StepMetrics, TrainBatch

RANKS = 2
CONFIG = knobs.load(
    QUICKSTART, [f"learner.data_parallel={RANKS}", "rollout.num_workers=1", "deadlines.ping_s=20"]
)


def batch_of(step: int, number: int, *, closes: bool = True) -> TrainBatch:
    return TrainBatch(
        learner_version=step,
        group_ids=(number,),
        oldest_versions=(step,),
        references=tuple(f"share {rank} of {number}" for rank in range(RANKS)),
        closes_step=closes,
    )


@dataclass
class Rank:
    """One process of a rank."""

    number: int
    seen: list[str]  # what its weights have seen
    version: int
    snapshot: tuple[int, list[str]] | None = None
    dies_in: set[str] = field(default_factory=set)  # methods
    halvings: list[int] = field(default_factory=list)  # of each minibatch
    enough: int = 0  # halvings, for its memory
    own_halvings: int = 0  # what a single rank did by itself
    damaged: str | None = None  # a file of the checkpoint that it loads
    line: str | None = None  # in which it is
    dead: asyncio.Event = field(default_factory=asyncio.Event)

    async def during(self, method: str) -> None:
        await asyncio.sleep(0)
        if method in self.dies_in:
            self.dead.set()
        if self.dead.is_set():
            raise RayActorError

    async def alive(self) -> None:
        await self.dead.wait()
        raise RayActorError

    async def ping(self) -> str | None:
        await self.during("ping")
        return self.line

    async def open_mesh(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    async def ready(self, _: Any) -> ProcessInfo:
        await self.during("ready")
        if self.damaged is not None:
            cause = StateUnusable(f"{self.damaged} has other content than was written")
            raise RayTaskError("ready", "", cause).as_instanceof_cause()
        return ProcessInfo(f"learner-{self.number}", 7, "192.0.2.2", "node", "fake rank")

    async def minibatch(self, batch: TrainBatch) -> StepMetrics:
        await self.during("minibatch")
        assert batch.learner_version == self.version
        halvings = batch.num_halvings + self.own_halvings
        if halvings < self.enough:
            task = RayTaskError("minibatch", "", MemoryShort("12 rollouts"))
            raise task.as_instanceof_cause()
        self.halvings.append(halvings)
        self.seen.append(batch.references[0])
        self.version += batch.closes_step
        return StepMetrics(maxima={"halvings": halvings})

    async def end_step(self) -> None:
        await self.during("end_step")
        self.version += 1

    async def take_snapshot(self) -> Any:
        await self.during("snapshot")
        self.snapshot = self.version, [*self.seen]
        return SimpleNamespace(version=self.version)

    async def collect(self, announcement: Any, folder: Any) -> None:
        await self.during("collect")
        assert self.snapshot is not None
        assert self.snapshot[0] == announcement.version

    async def write(self, announcement: Any, folder: Any) -> str:
        await self.during("write")
        assert self.snapshot is not None
        assert self.snapshot[0] == announcement.version
        return " ".join(self.snapshot[1])

    def actor(self) -> Any:
        methods: dict[str, Callable[..., Awaitable[Any]]] = {
            name: getattr(self, name)
            for name in ("alive", "ping", "open_mesh", "ready", "minibatch", "end_step")
        }
        methods |= {"collect": self.collect, "write": self.write, "snapshot": self.take_snapshot}
        return fake_actor(**methods)


class World:
    """A learner of two ranks with a supervisor. `saved` has the state of each checkpoint."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        now_s: Callable[[], float] = time.monotonic,
        silence_s: float = CONFIG.deadlines.ping_s,
    ) -> None:
        monkeypatch.setattr("ray.kill", self.kill)
        monkeypatch.setattr(restarts, "DEATH_NEWS_S", 0.5)
        monkeypatch.setattr(restarts, "BREAK_S", 0.0)
        self.saved: dict[Path | None, tuple[list[list[str]], int]] = {
            None: ([[] for _ in range(RANKS)], 0)
        }
        self.lines: list[str] = []
        self.dies_in: list[set[str]] = []  # of the next processes, each
        self.damaged: dict[Path | None, str] = {}  # a file, by state
        self.newest: Any = None
        self.source_losses = 0
        self.by_actor: dict[int, Rank] = {}
        self.ranks: list[Rank] = []
        handles = [
            LearnerHandle(f"learner-{number}", self.start(number, None), CONFIG.deadlines)
            for number in range(RANKS)
        ]
        self.learner = LearnerGroup(handles, CONFIG)
        self.supervisor = Supervisor(
            replay=cast(Any, None),
            publisher=cast(Any, self),
            start_replay=cast(Any, None),
            start_rank=self.start,
            start_worker=cast(Any, None),
            start_evaluator=cast(Any, None),
            silence_s=silence_s,
            start_s=5.0,
            now_s=now_s,
            say=self.lines.append,
            pause=self.pause,
        )

    def kill(self, actor: Any) -> None:
        self.by_actor[id(actor)].dead.set()

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(0)

    def lose_source(self) -> None:
        self.source_losses += 1

    def source_is_back(self) -> None:
        assert self.learner.restarts.is_whole

    def start(self, number: int, state: Path | None) -> Any:
        seen, version = self.saved[state]
        rank = Rank(number, [*seen[number]], version, damaged=self.damaged.get(state))
        rank.dies_in = self.dies_in.pop(0) if self.dies_in else set()
        self.ranks[number:] = [rank, *self.ranks[number + 1 :]]
        actor = rank.actor()
        self.by_actor[id(actor)] = rank
        return actor

    def save(self, version: int) -> None:
        state = Path(f"step_{version:06d}")
        self.saved[state] = [[*rank.seen] for rank in self.ranks], version
        self.learner.saved(version, state)

    async def publish(self) -> None:
        self.newest = await self.learner.snapshot()

    def play(self, scene: Callable[[], Awaitable[None]]) -> None:
        async def both() -> None:
            keep = asyncio.create_task(self.supervisor.keep_learner(self.learner))
            acting = asyncio.ensure_future(scene())
            await asyncio.sleep(0)
            try:
                async with asyncio.timeout(20):
                    done, _ = await asyncio.wait(
                        {keep, acting}, return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in sorted(done, key=lambda each: each is not keep):
                        task.result()
            finally:
                keep.cancel()
                acting.cancel()
                await asyncio.gather(keep, acting, return_exceptions=True)

        asyncio.run(both())


def shares(*numbers: int, rank: int = 0) -> list[str]:
    return [f"share {rank} of {number}" for number in numbers]


@pytest.mark.parametrize("victim", [0, 1])
def test_minibatch_that_a_death_breaks_off_is_trained_once(
    monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        await world.learner.minibatch(batch_of(0, 0))
        world.save(1)
        await world.publish()
        await world.learner.minibatch(batch_of(1, 1))
        await world.publish()
        world.ranks[victim].dies_in = {"minibatch"}
        await world.learner.minibatch(batch_of(2, 2))

    world.play(scene)
    for rank in range(RANKS):
        assert world.ranks[rank].seen == shares(0, 1, 2, rank=rank)
    assert world.source_losses == world.learner.restarts.num_losses == 1
    lost, *started, again = world.lines
    assert lost.startswith(f"learner-{victim} lost its process: learner-{victim} died while")
    assert len(started) == RANKS
    assert again.endswith("did 1 minibatches since version 1 again")


def test_all_ranks_halve_the_passes_of_what_follows_when_one_lacks_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        await world.learner.minibatch(batch_of(0, 0))
        world.ranks[1].enough = 1
        await world.learner.minibatch(batch_of(1, 1))
        await world.learner.minibatch(batch_of(2, 2))

    world.play(scene)
    for number, rank in enumerate(world.ranks):
        assert rank.seen == shares(0, 1, 2, rank=number)
        assert rank.halvings == [0, 1, 1]  # what is done again runs as it did
    assert world.lines[0].startswith(
        "learner-0 lost its process: learner-1 failed in minibatch: MemoryShort"
    )


def test_a_new_rank_halves_the_passes_as_the_lost_one_did_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        await world.learner.minibatch(batch_of(0, 0))
        for rank in world.ranks:  # as a single rank does when it lacks memory
            rank.own_halvings = 1
        await world.learner.minibatch(batch_of(1, 1))
        world.ranks[0].dies_in = {"minibatch"}
        await world.learner.minibatch(batch_of(2, 2))

    world.play(scene)
    assert all(rank.own_halvings == 0 for rank in world.ranks), "these are new processes"
    assert all(rank.halvings == [0, 1, 1] for rank in world.ranks)


def test_snapshot_that_is_being_published_is_taken_again_at_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        await world.learner.minibatch(batch_of(0, 0))
        await world.publish()
        await world.learner.minibatch(batch_of(1, 1, closes=False))
        world.ranks[0].dies_in = {"write"}
        assert await world.learner.write(world.newest) == "share 0 of 0"
        await world.learner.minibatch(batch_of(1, 2))

    world.play(scene)
    assert world.ranks[0].seen == shares(0, 1, 2)
    assert world.ranks[0].version == 2


def test_step_that_was_ended_early_is_ended_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        await world.learner.minibatch(batch_of(0, 0, closes=False))
        await world.learner.end_step()
        await world.learner.minibatch(batch_of(1, 1))
        world.ranks[1].dead.set()
        await world.learner.minibatch(batch_of(2, 2))

    world.play(scene)
    assert world.ranks[0].seen == shares(0, 1, 2)


def test_death_while_the_work_is_done_again_starts_it_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        await world.learner.minibatch(batch_of(0, 0))
        world.dies_in = [{"minibatch"}, set(), {"ready"}, set()]
        world.ranks[0].dead.set()
        await world.learner.minibatch(batch_of(1, 1))

    world.play(scene)
    assert world.learner.restarts.num_losses == 3
    assert [rank.seen for rank in world.ranks] == [shares(0, 1, rank=r) for r in range(RANKS)]


@pytest.mark.parametrize("seed", range(20))
def test_random_deaths_leave_the_weights_of_a_run_without_deaths(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    world, rng = World(monkeypatch), random.Random(seed)
    monkeypatch.setattr("dapo_async.runtime.supervisor.MAX_RESTARTS", 1000)
    expected: list[str] = []

    def now_and_then() -> None:
        if rng.random() < 0.3:
            method = rng.choice(["minibatch", "snapshot", "write", "end_step", "ping"])
            rng.choice(world.ranks).dies_in = {method}

    async def scene() -> None:
        number = 0
        for step in range(12):
            for place in range(3):
                now_and_then()
                await world.learner.minibatch(batch_of(step, number, closes=place == 2))
                expected.append(f"share 0 of {number}")
                number += 1
                if place < 2 and rng.random() < 0.2:
                    await world.learner.end_step()
                    break
            now_and_then()
            await world.publish()
            assert await world.learner.write(world.newest) == " ".join(expected)
            if rng.random() < 0.3 and world.learner.restarts.is_whole:
                world.save(step + 1)

    world.play(scene)
    assert world.ranks[0].seen == expected


def test_state_that_was_captured_before_a_loss_is_not_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        world.ranks[0].dead.set()
        await world.learner.minibatch(batch_of(0, 0))
        with pytest.raises(ActorDied, match="was restarted after its state was captured"):
            await world.learner.save(Path())

    world.play(scene)


def test_failure_without_a_death_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    calls: list[int] = []

    async def fails() -> None:
        calls.append(1)
        raise ActorFailed("learner-0 failed in minibatch: ValueError()")

    async def scene() -> None:
        with pytest.raises(ActorFailed, match="ValueError"):
            await world.learner.restarts.again(fails)

    world.play(scene)
    assert len(calls) == 1
    assert world.learner.restarts.num_losses == 0


def test_call_of_a_lost_actor_fails_at_once_when_the_supervisor_ends() -> None:
    one = restarts.Restarts("learner")

    async def fails() -> None:
        raise ActorSilent("learner-0 does not answer")

    async def scene() -> None:
        for _ in range(2):  # a supervisor that begins again waits for news again
            one.keep()
            call = asyncio.create_task(one.again(fails))
            await asyncio.sleep(0.05)
            assert not call.done()
            one.end()
            with pytest.raises(ActorSilent):
                await asyncio.wait_for(call, 5.0)

    asyncio.run(scene())


def test_budget_of_restarts_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.dies_in = [{"ready"}] * 100

    async def scene() -> None:
        world.ranks[0].dead.set()
        await world.learner.minibatch(batch_of(0, 0))

    with pytest.raises(ActorDied, match=r"learner-0 lost its process, after \d restarts in"):
        world.play(scene)


def test_ranks_that_no_node_has_room_for_again_end_the_run_and_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.supervisor._without_room = lambda: ("learner-1", "rollout-0")

    async def restore(*_: object, **__: object) -> list[ProcessInfo]:
        raise TimeoutError("the driver waited 5 s for learner-1 to finish ready")

    monkeypatch.setattr(world.learner, "restore", restore)

    async def scene() -> None:
        world.ranks[1].dead.set()
        await world.learner.minibatch(batch_of(0, 0))

    told = r"learner-1 is lost \(.*\), and within 5 s \(deadlines.start_s\) no node had room for "
    with pytest.raises(ActorDied, match=told + "learner-1; add a node"):
        world.play(scene)
    assert len(world.lines) == 1, "one restart, not three"


def test_steps_that_are_not_kept_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        for step in range(MOST_STEPS + 1):
            await world.learner.minibatch(batch_of(step, step))
        world.ranks[0].dead.set()
        await world.learner.minibatch(batch_of(MOST_STEPS + 1, MOST_STEPS + 1))

    with pytest.raises(ActorDied, match="older than the last 100 steps, which can be done again"):
        world.play(scene)
    assert len(world.learner.redo.entries) == MOST_STEPS


def test_log_keeps_what_is_newer_than_the_checkpoint() -> None:
    log = RedoLog(4, Path("step_000004"))
    for step in (4, 4, 5, 6):
        log.add(batch_of(step, step, closes=False))
    log.end_step()
    assert log.fault is None
    log.saved(6, Path("step_000006"))
    assert [(done.step, done.batch is None) for done in log.entries] == [(6, False), (6, True)]
    assert (log.version, log.state, log.fault) == (6, Path("step_000006"), None)


def damaged_newest(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, with_older: bool = True
) -> World:
    """Checkpoints of the versions 1 and 2; the one of 2 is damaged, and a rank dies after it."""
    monkeypatch.chdir(folder)
    world = World(monkeypatch)

    async def scene() -> None:
        for version in (1, 2):
            await world.learner.minibatch(batch_of(version - 1, version - 1))
            if version == 2 or with_older:
                Path(f"step_{version:06d}").mkdir()
            world.save(version)
        world.damaged[world.learner.redo.state] = "step_000002/model.safetensors"
        await world.publish()
        world.ranks[1].dies_in = {"minibatch"}
        await world.learner.minibatch(batch_of(2, 2))

    world.play(scene)
    return world


def test_a_damaged_newest_checkpoint_is_stepped_over_in_a_restart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world = damaged_newest(monkeypatch, tmp_path)
    for rank in range(RANKS):
        assert world.ranks[rank].seen == shares(0, 1, 2, rank=rank)
    (told,) = [line for line in world.lines if "damaged" in line]
    assert "so the learner begins at version 1 instead: learner-0 failed in ready" in told
    assert "step_000002/model.safetensors has other content than was written" in told
    assert world.lines[-1].endswith("did 1 minibatches since version 1 again")
    assert world.learner.restarts.num_losses == 2, "the damaged folder is tried once"


def test_a_damaged_checkpoint_without_an_older_one_ends_the_run_and_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ActorDied) as error:
        damaged_newest(monkeypatch, tmp_path, with_older=False)
    told = str(error.value)
    assert "step_000002/model.safetensors has other content than was written" in told
    assert "copy the checkpoint whole or remove" in told


def test_log_reaches_back_to_the_checkpoint_before_the_newest_one(tmp_path: Path) -> None:
    log = RedoLog()
    for step in range(6):
        log.add(batch_of(step, step))
        if step in (1, 3):
            state = tmp_path / str(step + 1)
            state.mkdir()
            log.saved(step + 1, state)
    assert (log.version, log.oldest) == (4, 2)
    assert [done.step for done in log.entries] == [4, 5]
    assert log.step_back()
    assert (log.version, log.state, log.fault) == (2, tmp_path / "2", None)
    assert [done.step for done in log.entries] == [2, 3, 4, 5]
    assert not log.step_back(), "what was done before is not kept"


def test_learner_that_is_being_restarted_when_the_run_ends_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has done only a part of its steps again: a checkpoint of it would be wrong."""
    world = World(monkeypatch)

    async def scene() -> None:
        for step in range(3):
            await world.learner.minibatch(batch_of(step, step))
        world.dies_in = [set(), {"minibatch"}]
        keep = asyncio.create_task(world.supervisor.keep_learner(world.learner))
        await asyncio.sleep(0)
        world.ranks[0].dead.set()
        while world.learner.restarts.is_whole:
            await asyncio.sleep(0)
        keep.cancel()
        await asyncio.gather(keep, return_exceptions=True)
        with pytest.raises(ActorDied, match="was being restarted when the run ended"):
            await world.learner.version()

    asyncio.run(scene())


def test_checkpoint_that_ends_during_a_restart_is_not_where_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)

    async def scene() -> None:
        await world.learner.minibatch(batch_of(0, 0))
        world.ranks[0].dead.set()
        while world.learner.restarts.is_whole:
            await asyncio.sleep(0)
        assert not world.learner.saved(1, Path("step_000001"))
        await world.learner.minibatch(batch_of(1, 1))

    world.play(scene)
    assert world.ranks[0].seen == shares(0, 1)
    assert world.learner.redo.version == 0


def test_ranks_that_answer_and_get_nowhere_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    world = World(monkeypatch, now_s=lambda: now_s[0], silence_s=0.03)

    async def scene() -> None:
        await world.learner.minibatch(batch_of(0, 0))
        for rank in world.ranks:
            rank.line = f"model/mesh.py:4{rank.number} sum > all_reduce"
        await asyncio.sleep(0.1)
        assert world.lines == []
        now_s[0] = 61.0
        await asyncio.sleep(0.1)

    world.play(scene)
    (line,) = world.lines
    assert line.startswith(
        "the learner gets nowhere: learner-0 in model/mesh.py:40 sum > all_reduce for 61 s, "
        "learner-1 in model/mesh.py:41 sum > all_reduce for 61 s (usual for a minibatch: 0.0 s); "
    )
    assert world.learner.restarts.num_losses == 0
