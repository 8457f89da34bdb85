"""A rollout worker's world: a fake engine and a fake replay room on either side of it, which a scene drives step by step."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from dapo_async.rollout import Aborted, SamplingParams
from dapo_async.rollout.worker import RolloutWorker
from dapo_async.types import Admission, AdmitReply, Completion, FinishReason, Prompt

PATIENCE_S = 20.0  # nothing here takes that long: a test that waits for ever fails instead
SAMPLING = SamplingParams(max_tokens=4, temperature=1.0, stop_token_ids=(), seed=0)
PROMPT = Prompt(0, "", np.array([1, 2], np.int32), "")
COMPLETION = Completion(
    np.array([3], np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32), 0, FinishReason.STOP
)


class FakeEngine:
    """Generates until the test finishes, aborts or breaks a group."""

    def __init__(self, num_slots) -> None:
        self.num_slots, self.requests, self.aborted, self.hungry = num_slots, [], [], []
        self._running = {}

    @property
    def group_ids(self):
        return sorted(self._running)

    async def generate(self, request):
        self.requests.append(request)
        future = self._running[request.group_id] = asyncio.get_running_loop().create_future()
        return await future

    def starving(self, on) -> None:
        self.hungry.append(on)

    def finish(self, group_id) -> None:
        self._running.pop(group_id).set_result((COMPLETION,) * self.requests[0].num_siblings)

    def fail(self, group_id, error) -> None:
        self._running.pop(group_id).set_exception(error)

    async def abort(self, group_ids) -> None:
        for group_id in group_ids:
            self.aborted.append(group_id)
            if group_id in self._running:
                self.fail(group_id, Aborted(f"group {group_id} was taken off the engine"))


class FakeReplay:
    """Grants `credits` admissions; a failed group gives its credit back."""

    def __init__(self, credits) -> None:
        self.credits, self.asked, self.offered, self.failed, self.next_index = (
            credits,
            [],
            [],
            [],
            0,
        )
        self.handed_back = []
        self._changed, self._evicted = asyncio.Condition(), []
        # Cleared: answers are on their way and do not arrive.
        self.offers_answered, self.admissions_answered = asyncio.Event(), asyncio.Event()
        self.offers_answered.set()
        self.admissions_answered.set()

    async def admit(self, worker, num_groups):
        self.asked.append(num_groups)
        async with self._changed:
            await self._changed.wait_for(
                lambda: self.credits > 0 or num_groups == 0 or self._evicted
            )
            count = min(num_groups, self.credits)
            self.credits -= count
            first, self.next_index = self.next_index, self.next_index + count
            admissions = tuple(
                Admission(group_id, PROMPT, 3) for group_id in range(first, first + count)
            )
            reply = AdmitReply(admissions, self._take_evicted())
        await self.admissions_answered.wait()
        return reply

    async def offer(self, worker, group):
        self.offered.append(group.group_id)
        await self.offers_answered.wait()
        return self._take_evicted()

    def _take_evicted(self):
        evicted, self._evicted = tuple(self._evicted), []
        return evicted

    async def fail(self, group_ids, why) -> None:
        self.failed.append((list(group_ids), why))
        await self.give(len(group_ids))

    async def hand_back(self, group_id, partial_completions) -> None:
        self.handed_back.append((group_id, partial_completions))

    async def give(self, credits) -> None:
        async with self._changed:
            self.credits += credits
            self._changed.notify_all()

    async def evict(self, group_id) -> None:
        async with self._changed:
            self._evicted.append(group_id)
            self._changed.notify_all()


async def score(admission, completions):
    assert len(completions) == admission.group_size
    return SimpleNamespace(group_id=admission.group_id)


def hold_scoring(worker):
    """Scores nothing until the event that is returned is set."""
    gate = asyncio.Event()

    async def later(admission, completions):
        await gate.wait()
        return await score(admission, completions)

    worker._score = later
    return gate


async def settled() -> None:
    """Lets every task run until all of them wait."""
    for _ in range(50):
        await asyncio.sleep(0)


def play(scene, *, num_slots=6, credits=100, ends_with=None) -> None:
    """Runs `scene(worker, engine, replay)` beside the worker's own `run`, which goes on to the scene's end or raises `ends_with`."""

    async def main() -> None:
        engine, replay = FakeEngine(num_slots), FakeReplay(credits)
        worker = RolloutWorker(
            "rollout-0", engine, replay=replay, score=score, sampling=SAMPLING, group_size=3
        )
        async with asyncio.timeout(PATIENCE_S):
            run = asyncio.create_task(worker.run())
            await settled()
            await scene(worker, engine, replay)
            await settled()
            if ends_with is None and not run.done():
                run.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await run
                return
            with pytest.raises(ExceptionGroup) as caught:
                await run
            assert caught.group_contains(Exception, match=ends_with or "nothing may go wrong here")

    asyncio.run(main())
