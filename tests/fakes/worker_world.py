"""A fake engine and a fake replay actor for a rollout worker; a scene drives both step by step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import Protocol

import numpy as np
import pytest

from dapo_async.replay import TokenBook
from dapo_async.replay.group_io import unpack_group
from dapo_async.rollout import (
    Aborted,
    EngineWork,
    GroupRequest,
    KVUse,
    SamplingParams,
    SiblingsEnded,
    SlotUse,
    TimeUse,
    ignore_ends,
)
from dapo_async.rollout.worker import Offer, RolloutWorker
from dapo_async.types import Admission, Completion, FinishReason, Group, Prompt, Rollout

PATIENCE_S = 20.0  # no scene takes that long: a test that would wait for ever fails
SAMPLING = SamplingParams(max_tokens=4, temperature=1.0, stop_token_ids=(), seed=0)
PROMPT = Prompt(0, "", np.array([1, 2], np.int32), "")
COMPLETION = Completion(
    np.array([3], np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32), 0, FinishReason.STOP
)


class FakeEngine:
    """Generates until the test finishes, aborts or breaks a group."""

    version = 0

    def __init__(self, num_slots: int) -> None:
        self.num_slots, self.tokens = num_slots, TokenBook()
        self.requests: list[GroupRequest] = []
        self.aborted: list[int] = []
        self.starving_calls: list[bool] = []
        self.dead_calls: list[bool] = []
        self._running: dict[int, asyncio.Future[tuple[Completion, ...]]] = {}
        self._siblings_ended: dict[int, SiblingsEnded] = {}

    @property
    def group_ids(self) -> list[int]:
        return sorted(self._running)

    async def generate(
        self, request: GroupRequest, siblings_ended: SiblingsEnded = ignore_ends
    ) -> tuple[Completion, ...]:
        self.requests.append(request)
        self._siblings_ended[request.group_id] = siblings_ended
        future: asyncio.Future[tuple[Completion, ...]] = asyncio.get_running_loop().create_future()
        self._running[request.group_id] = future
        return await future

    def starving(self, on: bool) -> None:
        self.starving_calls.append(on)

    def dead(self, on: bool) -> None:
        self.dead_calls.append(on)

    def time_use(self) -> TimeUse:
        raise NotImplementedError("the worker does not read time use")

    def kv_use(self) -> KVUse:
        raise NotImplementedError("the worker does not read KV use")

    def work(self) -> EngineWork:
        raise NotImplementedError("the worker does not read the work")

    def slot_use(self) -> SlotUse:
        raise NotImplementedError("the worker does not read slot use")

    async def close(self) -> None:
        raise NotImplementedError("the worker does not close its engine")

    def end_siblings(self, group_id: int, count: int) -> None:
        self._siblings_ended[group_id](count)

    def finish(self, group_id: int) -> None:
        self._running.pop(group_id).set_result((COMPLETION,) * self.requests[0].num_siblings)

    def fail(self, group_id: int, error: Exception) -> None:
        self._running.pop(group_id).set_exception(error)

    async def abort(self, group_ids: Iterable[int]) -> None:
        for group_id in group_ids:
            self.aborted.append(group_id)
            if group_id in self._running:
                self.fail(group_id, Aborted(f"group {group_id} was taken off the engine"))


class FakeReplay:
    """Grants `credits` admissions; a failed group gives its credit back."""

    def __init__(self, credits: int) -> None:
        self.credits, self.next_group_id = credits, 0
        self.asked: list[int] = []
        self.offered: list[int] = []
        self.records: list[str] = []  # of the offered groups
        self.exchanges: list[list[int]] = []  # the groups offered by each exchange that has any
        self.failed: list[tuple[list[int], str]] = []
        self.handed_back: list[tuple[int, tuple[Completion | None, ...]]] = []
        self._changed = asyncio.Condition()
        self._evicted: list[int] = []
        self._open = 0  # admitted and not ended
        self._newest = 0  # exchange
        # While cleared, answers do not arrive.
        self.offers_answered, self.admissions_answered = asyncio.Event(), asyncio.Event()
        self.offers_answered.set()
        self.admissions_answered.set()

    async def exchange(
        self, worker: str, offers: Sequence[Offer], *, num_free: int, num_open: int
    ) -> tuple[Admission, ...]:
        if offers:
            assert [each.facts.group_id for each in offers] == [
                unpack_group(each.data).group_id for each in offers
            ]
            self.exchanges.append([each.facts.group_id for each in offers])
            self.offered += self.exchanges[-1]
            self.records += [each.record for each in offers]
            self._open -= len(offers)
            await self.offers_answered.wait()
        if num_free:
            self.asked.append(num_free)
        async with self._changed:
            self._newest = number = self._newest + 1
            self._changed.notify_all()
            if not num_free:
                return ()
            await self._changed.wait_for(
                lambda: (
                    number < self._newest or (self.credits > 0 and self._open < num_open + num_free)
                )
            )
            if number < self._newest:
                return ()
            count = min(num_open + num_free - self._open, self.credits)
            self.credits -= count
            self._open += count
            first, self.next_group_id = self.next_group_id, self.next_group_id + count
        await self.admissions_answered.wait()
        return tuple(Admission(group_id, PROMPT, 3) for group_id in range(first, first + count))

    async def evictions(self, worker: str) -> tuple[int, ...]:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._evicted))
            evicted, self._evicted = tuple(self._evicted), []
            return evicted

    async def fail(self, group_ids: Sequence[int], why: str, detail: str = "") -> None:
        self.failed.append((list(group_ids), why))
        self._open -= len(group_ids)
        await self.give(len(group_ids))

    async def hand_back(
        self, group_id: int, partial_completions: tuple[Completion | None, ...]
    ) -> None:
        self.handed_back.append((group_id, partial_completions))
        self._open -= 1

    async def give(self, credits: int) -> None:
        async with self._changed:
            self.credits += credits
            self._changed.notify_all()

    async def evict(self, group_id: int) -> None:
        async with self._changed:
            self._evicted.append(group_id)
            self._open -= 1
            self._changed.notify_all()


class Scene(Protocol):
    """The events of one test."""

    def __call__(
        self, worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay
    ) -> Awaitable[None]: ...


async def score(admission: Admission, completions: Sequence[Completion]) -> Group:
    assert len(completions) == admission.group_size
    rollouts = tuple(Rollout(each, "3", 1.0, 1.0, "3") for each in completions)
    return Group(admission.group_id, PROMPT, rollouts, incarnation="first", temperature=1.0)


def hold_scoring(worker: RolloutWorker) -> asyncio.Event:
    """Makes every later scoring wait until the returned event is set."""
    gate = asyncio.Event()

    async def later(admission: Admission, completions: Sequence[Completion]) -> Group:
        await gate.wait()
        return await score(admission, completions)

    worker._score = later
    return gate


async def settled() -> None:
    """Lets every task run until all of them wait."""
    for _ in range(50):
        await asyncio.sleep(0)


def play(
    scene: Scene, *, num_slots: int = 6, credits: int = 100, ends_with: str | None = None
) -> None:
    """Runs `scene` while the worker runs.

    The worker must run until the scene ends, or raise an error that matches `ends_with`.
    """

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
