"""The rollout worker between a fake engine and a fake replay room: it keeps the engine full, one task per group, and ends as it should."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from dapo_async.rollout import Aborted, SamplingParams
from dapo_async.rollout.worker import RolloutWorker
from dapo_async.types import Admission, Completion, FinishReason, Prompt

PATIENCE_S = 20.0  # nothing here takes that long: a test that waits for ever fails instead
SAMPLING = SamplingParams(max_tokens=4, temperature=1.0, stop_token_ids=(), seed=0)
PROMPT = Prompt(0, "", np.array([1, 2], np.int32), "")
COMPLETION = Completion(np.array([3], np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32), 0, FinishReason.STOP)


class FakeEngine:
    """Generates until the test finishes, aborts or breaks a group."""

    def __init__(self, num_slots):
        self.num_slots, self.requests, self.aborted = num_slots, [], []
        self._running = {}

    @property
    def keys(self):
        return sorted(self._running)

    async def generate(self, request):
        self.requests.append(request)
        future = self._running[request.key] = asyncio.get_running_loop().create_future()
        return await future

    def finish(self, key):
        self._running.pop(key).set_result((COMPLETION,) * self.requests[0].num_siblings)

    def fail(self, key, error):
        self._running.pop(key).set_exception(error)

    async def abort(self, keys):
        for key in keys:
            self.aborted.append(key)
            if key in self._running:
                self.fail(key, Aborted(f"group {key} was taken off the engine"))


class FakeReplay:
    """Grants `credits` admissions; an offer gives its credit back, an eviction too."""

    def __init__(self, credits):
        self.credits, self.asked, self.offered, self.next_index = credits, [], [], 0
        self._changed, self._doomed = asyncio.Condition(), []

    async def admit(self, worker, num_groups):
        self.asked.append(num_groups)
        async with self._changed:
            await self._changed.wait_for(lambda: self.credits > 0 or num_groups == 0)
            count = min(num_groups, self.credits)
            self.credits -= count
            first, self.next_index = self.next_index, self.next_index + count
            return [Admission(index, PROMPT, 3) for index in range(first, first + count)]

    async def offer(self, group):
        self.offered.append(group.admission_index)

    async def give(self, credits):
        async with self._changed:
            self.credits += credits
            self._changed.notify_all()

    async def doomed(self, worker):
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._doomed))
            doomed, self._doomed = self._doomed, []
            return doomed

    async def evict(self, index):
        async with self._changed:
            self._doomed.append(index)
            self._changed.notify_all()


async def score(admission, completions):
    assert len(completions) == admission.group_size
    return SimpleNamespace(admission_index=admission.index)


async def settled():
    """Lets every task run until all of them wait."""
    for _ in range(50):
        await asyncio.sleep(0)


def play(scene, *, num_slots=6, credits=100):
    """Runs `scene(worker, engine, replay, run)` beside the worker's own `run`, which it has to bring to its end."""

    async def main():
        engine, replay = FakeEngine(num_slots), FakeReplay(credits)
        worker = RolloutWorker("rollout-0", engine, replay=replay, score=score, sampling=SAMPLING, group_size=3)
        async with asyncio.timeout(PATIENCE_S):
            run = asyncio.create_task(worker.run())
            await settled()
            await scene(worker, engine, replay, run)
            assert run.done(), "the scene left the worker running"

    asyncio.run(main())


async def stopped(worker, engine, replay, run):
    """Stops the worker and lets its groups finish."""
    worker.stop()
    await replay.give(100)  # also answers an admission that was being waited for
    await settled()
    for key in engine.keys:
        engine.finish(key)
    await run


@pytest.mark.parametrize(("num_slots", "groups"), [(6, 3), (7, 4), (3, 2), (1, 2)])
def test_it_holds_as_many_groups_as_fill_the_slots_and_one_more(num_slots, groups):
    async def scene(worker, engine, replay, run):
        assert engine.keys == list(range(groups))
        assert replay.asked == [groups]
        request = engine.requests[0]
        assert (request.key, request.num_siblings, request.sampling) == (0, 3, SAMPLING)
        assert request.prompt_ids.tolist() == [1, 2]
        await stopped(worker, engine, replay, run)

    play(scene, num_slots=num_slots)


def test_a_slow_group_holds_nobody_back():
    async def scene(worker, engine, replay, run):
        for key in range(1, 20):  # group 0 never ends
            engine.finish(key)
            await settled()
            assert replay.offered[-1] == key
            assert len(engine.keys) == 3
        assert engine.keys == [0, 20, 21]
        await stopped(worker, engine, replay, run)
        assert sorted(replay.offered) == list(range(22))

    play(scene)


def test_without_credits_it_waits_and_starts_as_soon_as_there_is_one():
    async def scene(worker, engine, replay, run):
        assert engine.keys == [0]
        assert replay.asked == [3, 2]
        await replay.give(1)
        await settled()
        assert engine.keys == [0, 1]
        await stopped(worker, engine, replay, run)

    play(scene, credits=1)


def test_doomed_groups_are_aborted_offered_never_and_replaced():
    async def scene(worker, engine, replay, run):
        await replay.evict(1)
        await settled()
        assert engine.aborted == [1]
        assert engine.keys == [0, 2, 3]
        await stopped(worker, engine, replay, run)
        assert 1 not in replay.offered

    play(scene)


def test_doomed_groups_are_aborted_even_while_the_worker_stops():
    async def scene(worker, engine, replay, run):
        worker.stop()
        engine.finish(0)
        await settled()
        engine.finish(1)
        await replay.evict(2)
        await run
        assert engine.aborted == [2]
        assert replay.offered == [0, 1]

    play(scene, credits=3)


def test_quarantine_stops_admission_until_it_is_lifted():
    async def scene(worker, engine, replay, run):
        worker.quarantine(True)
        engine.finish(0)
        await settled()
        assert replay.offered == [0]  # what was running may end
        assert engine.keys == [1, 2]
        worker.quarantine(False)
        await settled()
        assert engine.keys == [1, 2, 3]
        await stopped(worker, engine, replay, run)

    play(scene)


def test_an_admission_that_arrives_during_quarantine_is_not_generated_before_its_end():
    async def scene(worker, engine, replay, run):
        assert engine.keys == [0]
        worker.quarantine(True)  # while the replay room is being asked
        await replay.give(1)
        await settled()
        assert engine.keys == [0]
        worker.quarantine(False)
        await settled()
        assert engine.keys == [0, 1]
        await stopped(worker, engine, replay, run)

    play(scene, credits=1)


def test_a_stop_admits_nothing_more_and_ends_when_the_groups_in_flight_are_done():
    async def scene(worker, engine, replay, run):
        worker.stop()
        for key in (0, 1, 2):
            assert not run.done()
            engine.finish(key)
            await settled()
        await run
        assert replay.offered == [0, 1, 2]
        assert replay.asked == [3]

    play(scene)


def test_a_stop_during_quarantine_admits_nothing_more_either():
    async def scene(worker, engine, replay, run):
        worker.quarantine(True)
        engine.finish(0)
        await settled()
        worker.stop()
        await settled()
        for key in engine.keys:
            engine.finish(key)
        await run
        assert replay.offered == [0, 1, 2]
        assert replay.asked == [3]

    play(scene)


@pytest.mark.parametrize("place", ["engine", "score", "offer", "admit", "doomed"])
def test_an_error_anywhere_ends_the_run_with_that_error(place, monkeypatch):
    async def broken(*_):
        raise RuntimeError(f"{place} is broken")

    async def scene(worker, engine, replay, run):
        match place:
            case "engine":
                engine.fail(1, RuntimeError("engine is broken"))
            case "score":
                worker._score = broken
                engine.finish(0)
            case "doomed":
                replay.doomed = broken
                await replay.evict(99)
            case _:
                setattr(replay, place, broken)
                engine.finish(0)
        with pytest.raises(ExceptionGroup) as caught:
            await run
        assert caught.group_contains(RuntimeError, match=f"{place} is broken")

    play(scene)
