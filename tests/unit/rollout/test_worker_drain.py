"""A rollout worker that leaves the run loses nothing: each of its groups is offered or handed back,
with the tokens that it has."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from worker_world import COMPLETION, FakeEngine, FakeReplay, hold_scoring, play, settled

from dapo_async.rollout import Aborted
from dapo_async.rollout.worker import RolloutWorker
from dapo_async.types import FinishReason

PARTIAL = (replace(COMPLETION, finish_reason=FinishReason.ABORT), COMPLETION, None)


class GivingEngine(FakeEngine):
    """Returns what its groups have when they are taken off."""

    def fail(self, group_id: int, error: Exception) -> None:
        super().fail(group_id, Aborted(str(error), 2, PARTIAL))


def gives(engine: FakeEngine) -> None:
    engine.__class__ = GivingEngine
    engine.tokens.generate(2 * len(engine.group_ids))


async def drained(worker: RolloutWorker) -> None:
    async with asyncio.timeout(5.0):
        await worker.drain()


def test_running_groups_are_handed_back_with_their_partial_completions() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        gives(engine)
        await drained(worker)
        assert engine.aborted == [0, 1, 2]
        assert sorted(replay.handed_back, key=lambda each: each[0]) == [
            (group_id, PARTIAL) for group_id in (0, 1, 2)
        ]
        assert replay.offered == []
        assert worker.open_groups == []
        assert engine.tokens.counts.in_flight == 6, "they are with the replay actor now"
        await replay.give(5)
        await settled()
        assert engine.group_ids == [], "it is admitted nothing any more"

    play(scene)


def test_group_that_is_being_scored_is_offered_before_the_worker_leaves() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        gives(engine)
        gate = hold_scoring(worker)
        engine.finish(0)
        await settled()
        leaving = asyncio.create_task(worker.drain())
        await settled()
        assert not leaving.done()
        gate.set()
        await asyncio.wait_for(leaving, 5.0)
        assert replay.offered == [0]
        assert sorted(group_id for group_id, _ in replay.handed_back) == [1, 2]

    play(scene, credits=3)


def test_admissions_on_their_way_are_handed_back_as_they_came() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        gives(engine)
        for group_id in (0, 1, 2):
            engine.finish(group_id)
        replay.admissions_answered.clear()
        await settled()
        assert replay.next_group_id == 6, "the next three are granted"
        leaving = asyncio.create_task(worker.drain())
        await settled()
        replay.admissions_answered.set()
        await asyncio.wait_for(leaving, 5.0)
        assert replay.offered == [0, 1, 2]
        assert sorted(replay.handed_back) == [(3, ()), (4, ()), (5, ())]

    play(scene, credits=6)


def test_worker_that_waits_for_credits_leaves_at_once() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        gives(engine)
        for group_id in (0, 1, 2):
            engine.finish(group_id)
        await settled()
        await drained(worker)
        assert replay.offered == [0, 1, 2]
        assert replay.handed_back == []

    play(scene, credits=3)


def test_weights_on_their_way_are_proved_before_the_groups_are_handed_back() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        gives(engine)
        worker.hold()
        leaving = asyncio.create_task(worker.drain())
        await settled()
        assert engine.aborted == []
        worker.confirm()
        await asyncio.wait_for(leaving, 5.0)
        assert [partial for _, partial in replay.handed_back] == [PARTIAL] * 3

    play(scene)


def test_worker_with_wrong_weights_leaves_without_waiting_for_others() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        gives(engine)
        replay.admissions_answered.clear()
        await worker.quarantine()
        await replay.give(3)
        replay.admissions_answered.set()
        await settled()
        await drained(worker)
        assert worker.open_groups == []

    play(scene, credits=3)
