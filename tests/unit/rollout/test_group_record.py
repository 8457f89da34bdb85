"""What a worker records of a group: times of siblings, and the updates that it lived through."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
from native_engine_world import group, tiny_decoder, tiny_engine
from worker_world import COMPLETION, FakeEngine, FakeReplay, play, settled

from dapo_async.rollout import SiblingTimes
from dapo_async.rollout.group_record import Update, group_record
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.rollout.worker import RolloutWorker
from dapo_async.utils.state_clock import StateClock


def test_record_counts_milliseconds_from_the_admission() -> None:
    later = replace(COMPLETION, weight_versions=np.array([4, 4, 5], np.int32), prefill_version=3)
    times = SiblingTimes([100.5, None], [100.6, None], [102.0, None])
    updates = [Update(3, 99.0, 100.2), Update(5, 101.0, 101.25), Update(6, 102.5, 103.0)]
    record = group_record((later, COMPLETION), times, updates, admitted_s=100.0, scored_s=102.125)
    assert json.loads(record) == {
        "siblings": [[500, 600, 2000, 3, 5], [None, None, None, 0, 0]],
        "updates": [[5, 1000, 1250]],
        "scored": 2125,
    }


def test_native_engine_notes_when_each_sibling_starts_and_ends() -> None:
    engine, times = tiny_engine(num_slots=2), SiblingTimes.of(3)
    engine.submit(replace(group(0, [1, 2], siblings=3, max_tokens=4), times=times))
    while engine.has_work:
        engine.step()
    moments = list(zip(times.started, times.first_token, times.ended, strict=True))
    for started, first_token, ended in moments:
        assert started is not None
        assert first_token is not None
        assert ended is not None
        assert started < first_token <= ended
    assert times.started[0] == times.started[1]
    first_end = min(moments[0][2] or 0.0, moments[1][2] or 0.0)
    assert (times.started[2] or 0.0) >= first_end, "the third sibling waits for a free slot"


def test_worker_offers_the_record_with_the_group() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        request = engine.requests[0]
        assert request.times is not None
        for sibling in range(3):
            request.times.started[sibling] = request.times.first_token[sibling] = 1.0
            request.times.ended[sibling] = 1e12
        worker.updated(7, began_s=2.0)
        engine.finish(request.group_id)
        await settled()
        (text,) = replay.records
        record = json.loads(text)
        assert len(record["siblings"]) == 3
        assert [update[0] for update in record["updates"]] == [7]
        assert record["scored"] >= 0

    play(scene)


def test_threaded_engine_notes_times_of_a_group_that_lives_through_an_update() -> None:
    async def main() -> SiblingTimes:
        engine, times = ThreadedEngine(tiny_engine(), StateClock("engine")), SiblingTimes.of(2)
        request = replace(group(0, [1, 2], siblings=2, max_tokens=9), times=times)
        generating = asyncio.create_task(engine.generate(request))
        await asyncio.sleep(0)
        probe = np.arange(1, 6, dtype=np.int32)
        await engine.update_weights(tiny_decoder(seed=2).state_dict(), version=1, probe_ids=probe)
        await generating
        await engine.close()
        return times

    times = asyncio.run(main())
    assert None not in (*times.started, *times.first_token, *times.ended)
