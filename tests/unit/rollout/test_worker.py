"""The rollout worker keeps its engine full and offers no group that must not be trained."""

from __future__ import annotations

import asyncio
from typing import Never

import pytest
from worker_world import (
    COMPLETION,
    SAMPLING,
    FakeEngine,
    FakeReplay,
    hold_scoring,
    play,
    settled,
)

from dapo_async.rollout import EngineFault
from dapo_async.rollout.worker import TRANSITIONS, RolloutWorker, WorkerState


@pytest.mark.parametrize(("num_slots", "groups"), [(6, 3), (7, 4), (3, 2), (1, 2)])
def test_worker_holds_one_group_more_than_fills_its_slots(num_slots: int, groups: int) -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        assert engine.group_ids == list(range(groups))
        assert replay.asked == [groups]
        request = engine.requests[0]
        assert (request.group_id, request.num_siblings, request.sampling) == (0, 3, SAMPLING)
        assert request.prompt_ids.tolist() == [1, 2]

    play(scene, num_slots=num_slots)


def test_slow_group_delays_no_other() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        for group_id in range(1, 20):  # group 0 never ends
            engine.finish(group_id)
            await settled()
            assert replay.offered[-1] == group_id
            assert len(engine.group_ids) == 3
        assert engine.group_ids == [0, 20, 21]
        engine.finish(0)
        await settled()
        assert replay.offered == [*range(1, 20), 0]

    play(scene)


def test_worker_starts_a_group_when_enough_siblings_of_any_groups_have_ended() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        engine.end_siblings(0, 1)
        engine.end_siblings(1, 1)
        await settled()
        assert engine.group_ids == [0, 1, 2, 3]
        assert replay.asked == [3, 1]
        engine.end_siblings(0, 1)
        await settled()
        assert engine.group_ids == [0, 1, 2, 3], "9 sequences are in flight"
        engine.finish(0)
        engine.end_siblings(3, 2)
        await settled()
        assert engine.group_ids == [1, 2, 3, 4]
        assert replay.offered == [0]

    play(scene)


def test_worker_without_credits_asks_again_when_more_siblings_have_ended() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        assert replay.asked == [3, 1]
        for group_id in (0, 1):
            engine.end_siblings(group_id, 2)
        await settled()
        assert replay.asked == [3, 1, 3]
        await replay.give(5)
        await settled()
        assert engine.group_ids == [0, 1, 2, 3, 4]
        assert worker._demand.in_flight == 11  # as many as there ever are

    play(scene, credits=2)


def test_siblings_that_ended_before_their_engine_was_lost_count_once() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        engine.end_siblings(1, 2)
        engine.fail(1, EngineFault("connection lost", (COMPLETION, COMPLETION, None)))
        engine.fail(0, EngineFault("connection lost"))
        await settled()
        assert worker._demand.in_flight == 3  # group 2
        engine.end_siblings(1, 1)  # came late
        assert worker._demand.in_flight == 3

    play(scene)


def test_worker_without_credits_waits_and_starts_with_the_first_one() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        assert engine.group_ids == [0]
        assert replay.asked == [3, 2]
        await replay.give(1)
        await settled()
        assert engine.group_ids == [0, 1]

    play(scene, credits=1)


def test_full_worker_replaces_evicted_groups_at_once() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        await replay.evict(1)
        await settled()
        assert engine.aborted == [1]
        assert engine.group_ids == [0, 2, 3]
        for group_id in engine.group_ids:
            engine.finish(group_id)
        await settled()
        assert replay.offered == [0, 2, 3]

    play(scene)


def test_abort_that_hangs_stops_neither_offers_nor_admission_until_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dapo_async.rollout.worker.ABORT_S", 0.5)

    async def hang(group_ids: object) -> None:
        await asyncio.Event().wait()

    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        engine.abort = hang  # type: ignore[method-assign]
        await replay.evict(1)
        await settled()
        engine.finish(0)
        await settled()
        assert replay.offered == [0]
        assert engine.group_ids == [1, 2, 3]
        await asyncio.sleep(1.0)

    ends_with = "rollout-0 waited 0.5 s for its engine to abort evicted groups 1"
    play(scene, ends_with=ends_with)


def test_groups_that_finish_during_an_exchange_are_offered_together() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        replay.offers_answered.clear()
        for group_id in (0, 1):  # two exchanges are in flight
            engine.finish(group_id)
            await settled()
        for group_id in (2, 3):
            engine.finish(group_id)
            await settled()
        assert replay.exchanges == [[0], [1]]
        replay.offers_answered.set()
        await settled()
        assert replay.exchanges == [[0], [1], [2, 3]]
        assert engine.group_ids == [4, 5, 6, 7]

    play(scene, num_slots=9)


def test_worker_that_waits_for_a_credit_aborts_evicted_groups_at_once() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        await replay.evict(0)
        await settled()
        assert engine.aborted == [0]
        assert engine.group_ids == [1]
        engine.finish(1)
        await settled()
        assert replay.offered == [1]

    play(scene, credits=2)


def test_group_that_is_evicted_while_it_is_scored_is_not_offered() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        gate = hold_scoring(worker)
        engine.finish(0)
        engine.finish(1)
        await settled()
        await replay.evict(0)
        await settled()
        gate.set()
        await settled()
        assert replay.offered == [1]

    play(scene, credits=2)


def test_group_that_is_evicted_before_its_generation_is_not_generated() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        replay.offers_answered.clear()
        engine.finish(0)  # its offer is answered after the quarantine only
        await settled()
        await worker.quarantine()
        await replay.give(2)  # answers the request from before the quarantine: groups 1 and 2
        await settled()
        await replay.evict(1)
        replay.offers_answered.set()
        await settled()
        worker.confirm()
        await settled()
        assert [request.group_id for request in engine.requests] == [0, 2]
        assert engine.group_ids == [2]

    play(scene, credits=1)


def test_group_whose_eviction_arrives_before_its_admission_is_not_generated() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        replay.offers_answered.clear()
        replay.admissions_answered.clear()
        engine.finish(0)
        await replay.give(2)  # the answer with groups 1 and 2 has not arrived
        await settled()
        await replay.evict(1)
        replay.offers_answered.set()  # the answer to the offer names group 1
        await settled()
        replay.admissions_answered.set()
        await settled()
        assert engine.group_ids == [2]
        assert replay.asked == [3, 2, 3]  # the last one asks in place of the one before
        assert worker._evicted == set()
        engine.finish(2)
        await settled()
        assert replay.offered == [0, 2]
        assert worker._wanted == set()

    play(scene, credits=1)


def test_abort_that_the_worker_did_not_ask_for_ends_the_run() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        await engine.abort([1])

    play(scene, ends_with="group 1 was taken off the engine")


def test_quarantine_fails_running_groups_and_stops_admission_until_its_end() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        await worker.quarantine()
        assert engine.aborted == [0, 1, 2]
        assert replay.failed == [([0, 1, 2], "quarantine of rollout-0")]
        await settled()
        assert engine.group_ids == []
        assert replay.asked == [3]
        worker.confirm()
        await settled()
        assert engine.group_ids == [3, 4, 5]
        for group_id in (3, 4, 5):
            engine.finish(group_id)
        await settled()
        assert replay.offered == [3, 4, 5]

    play(scene)


def test_group_generated_before_a_quarantine_is_not_offered_after_it() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        gate = hold_scoring(worker)
        engine.finish(0)  # is being scored when the quarantine begins
        await settled()
        engine.finish(1)  # has ended, but its task has not run since
        await worker.quarantine()
        gate.set()
        await settled()
        worker.confirm()
        await settled()
        assert replay.offered == []
        assert replay.failed == [([0, 1, 2, 3], "quarantine of rollout-0")]

    play(scene)


def test_group_admitted_during_a_quarantine_is_generated_after_its_end() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        assert engine.group_ids == [0]
        # The worker waits for an admission: the credit of group 0 returns as group 1.
        await worker.quarantine()
        await settled()
        assert engine.group_ids == []
        worker.confirm()
        await settled()
        assert engine.group_ids == [1]

    play(scene, credits=1)


def test_second_quarantine_right_after_the_first_starts_no_group() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        await worker.quarantine()
        await settled()  # group 1 waits for the end of the quarantine
        worker.confirm()
        await worker.quarantine()
        await settled()
        assert [request.group_id for request in engine.requests] == [0]
        assert [group_ids for group_ids, _ in replay.failed] == [[0], [1]]

    play(scene, credits=1)


def test_worker_calls_starving_exactly_while_it_waits_for_an_admission() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        assert engine.starving_calls == [True, False, True]  # one group was admitted, then none
        await replay.give(2)
        await settled()
        # The worker is full and waits for no admission.
        assert engine.starving_calls == [True, False, True, False]
        engine.finish(0)
        await settled()
        assert engine.starving_calls[4:] == [True]

    play(scene, credits=1)


@pytest.mark.parametrize("place", ["engine", "score", "exchange", "evictions"])
def test_error_anywhere_ends_the_run_with_that_error(place: str) -> None:
    async def broken(*_: object, **__: object) -> Never:
        raise RuntimeError(f"{place} is broken")

    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        match place:
            case "engine":
                engine.fail(1, RuntimeError("engine is broken"))
            case "score":
                worker._score = broken
                engine.finish(0)
            case _:
                setattr(replay, place, broken)
                engine.finish(0)
                await replay.evict(2)  # ends the wait for evictions that is in flight

    play(scene, ends_with=f"{place} is broken")


def test_groups_finished_before_a_handshake_are_offered_after_it() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        worker.hold()
        engine.finish(0)
        await settled()
        assert replay.offered == []
        worker.confirm()
        await settled()
        assert replay.offered == [0]

    play(scene, credits=1)


def test_groups_finished_before_a_failed_handshake_are_not_offered() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        worker.hold()
        engine.finish(0)
        await settled()
        await worker.quarantine()
        worker.confirm()
        await settled()
        assert replay.offered == []
        assert [group_ids for group_ids, _ in replay.failed] == [[0]]

    play(scene, credits=1)


def test_lost_engine_hands_back_its_groups_and_gets_new_ones_when_it_is_back() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        loss = asyncio.create_task(worker.lost())
        asked = len(replay.asked)
        engine.fail(1, EngineFault("connection refused"))
        await settled()
        assert await loss == "connection refused"
        for group_id in (0, 2):
            engine.fail(group_id, EngineFault("connection lost", (COMPLETION, None, None)))
        await settled()
        assert replay.handed_back == [
            (1, ()),
            (0, (COMPLETION, None, None)),
            (2, (COMPLETION, None, None)),
        ]
        assert (replay.failed, replay.offered, len(replay.asked)) == ([], [], asked)
        worker.restarted()
        worker.hold()
        await settled()
        assert engine.group_ids == []  # its first weights are not proved
        worker.confirm()
        await settled()
        assert engine.group_ids == [3, 4, 5]
        assert not asyncio.create_task(worker.lost()).done()

    play(scene)


def test_partial_completions_of_unproved_weights_are_not_handed_back() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        worker.hold()
        engine.fail(0, EngineFault("killed", (COMPLETION, None, None)))
        await settled()
        assert replay.handed_back == [(0, ())]

    play(scene)


def test_group_that_ended_under_weights_never_proved_is_not_offered() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        worker.hold()
        engine.finish(0)
        await settled()
        assert (replay.offered, replay.handed_back) == ([], [])
        worker.lose("killed before its handshake")
        await settled()
        assert (replay.offered, replay.handed_back) == ([], [(0, ())])
        worker.restarted()
        worker.hold()
        worker.confirm()  # another server has proved its weights
        await settled()
        assert replay.offered == []

    play(scene)


def test_engine_that_is_lost_again_before_it_is_back_stays_lost() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        engine.fail(0, EngineFault("killed"))
        await settled()
        worker.restarted()
        worker.hold()
        worker.lose("killed again, over its first weights")
        worker.confirm()  # the handshake began before the loss
        await settled()
        assert await worker.lost() == "killed again, over its first weights"
        assert engine.group_ids == [1, 2]

    play(scene)


def test_evicted_group_of_a_lost_engine_is_not_handed_back() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        engine.fail(0, EngineFault("killed"))
        worker._wanted.discard(0)
        await settled()
        assert replay.handed_back == []

    play(scene)


SERVING, HOLDING, QUARANTINED, LOST = WorkerState
ALLOWED = {
    (SERVING, HOLDING),
    (SERVING, QUARANTINED),
    (SERVING, LOST),
    (HOLDING, SERVING),
    (HOLDING, QUARANTINED),
    (HOLDING, LOST),
    (QUARANTINED, SERVING),
    (QUARANTINED, LOST),
    (LOST, QUARANTINED),
}


@pytest.mark.parametrize("before", WorkerState)
@pytest.mark.parametrize("after", WorkerState)
def test_worker_changes_its_state_only_along_the_table(
    before: WorkerState, after: WorkerState
) -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        worker.state = before
        if (before, after) in ALLOWED:
            worker._enter(after)
            assert worker.state is after
        else:
            with pytest.raises(AssertionError, match=f"from {before} to {after}"):
                worker._enter(after)
            assert worker.state is before

    assert ((before, after) in ALLOWED) == (after in TRANSITIONS[before])
    play(scene)


@pytest.mark.parametrize(
    ("before", "hold", "confirm", "quarantine", "lose"),
    [
        (SERVING, HOLDING, SERVING, QUARANTINED, LOST),
        (HOLDING, HOLDING, SERVING, QUARANTINED, LOST),
        (QUARANTINED, QUARANTINED, SERVING, QUARANTINED, LOST),
        (LOST, LOST, LOST, LOST, LOST),
    ],
)
def test_each_event_moves_each_state_as_documented(
    before: WorkerState,
    hold: WorkerState,
    confirm: WorkerState,
    quarantine: WorkerState,
    lose: WorkerState,
) -> None:
    async def reach(worker: RolloutWorker) -> None:
        match before:
            case WorkerState.HOLDING:
                worker.hold()
            case WorkerState.QUARANTINED:
                await worker.quarantine()
            case WorkerState.LOST:
                worker.lose("killed")
        assert worker.state is before

    for event, after in {
        "hold": hold,
        "confirm": confirm,
        "quarantine": quarantine,
        "lose": lose,
    }.items():

        async def scene(
            worker: RolloutWorker,
            engine: FakeEngine,
            replay: FakeReplay,
            event: str = event,
            after: WorkerState = after,
        ) -> None:
            await reach(worker)
            match event:
                case "quarantine":
                    await worker.quarantine()
                case "lose":
                    worker.lose("killed")
                case _:
                    getattr(worker, event)()
            assert worker.state is after

        play(scene)


def test_restarted_engine_is_quarantined_from_its_first_weights_to_their_proof() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        worker.lose("killed")
        worker.hold()
        assert worker.state is LOST  # the dead engine gets no weights
        worker.restarted()
        worker.confirm()
        assert worker.state is LOST
        worker.hold()
        assert worker.state is QUARANTINED
        worker.confirm()
        assert worker.state is SERVING

    play(scene)


def test_restart_of_an_engine_that_is_not_lost_is_refused() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        with pytest.raises(AssertionError, match="restarted while serving"):
            worker.restarted()

    play(scene)
