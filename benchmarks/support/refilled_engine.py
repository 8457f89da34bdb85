"""A real rollout worker on the native engine, with credits that come back when a group ends.

The model is the random one of `engine.py`. 8 of its 512 tokens end a response, so lengths are
geometric with a mean of about 64, cut at 480.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import PROMPT_TOKENS, prompts
from support.simulated_run import WholeGroups

from dapo_async.model import load_decoder
from dapo_async.rollout import SamplingParams
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.rollout.worker import Offer, RolloutWorker
from dapo_async.types import Admission, Completion, Group, Prompt, Rollout
from dapo_async.utils.state_clock import StateClock

MAX_TOKENS, STOPS = 480, tuple(range(8))


class Credits:
    """A replay port that admits up to `total` groups and trains each at once."""

    def __init__(self, total: int, group_size: int) -> None:
        self._total, self._group_size, self._out, self._next = total, group_size, 0, 0
        self._texts = prompts(1024)
        self._waiting = asyncio.get_running_loop().create_future()

    async def exchange(
        self, worker: str, offers: Sequence[Offer], *, num_free: int, num_open: int
    ) -> tuple[Admission, ...]:
        self._out -= len(offers)
        if not self._waiting.done():
            self._waiting.set_result(None)
        count = min(num_open + num_free - self._out, self._total - self._out)
        if num_free and count <= 0:  # until the next exchange, which asks in place of this one
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
            return ()
        first, self._next = self._next, self._next + max(0, count)
        self._out += self._next - first
        return tuple(map(self._admission, range(first, self._next)))

    def _admission(self, group_id: int) -> Admission:
        token_ids = self._texts[group_id % len(self._texts)]
        return Admission(group_id, Prompt(group_id, "", token_ids, ""), self._group_size)

    async def evictions(self, worker: str) -> tuple[int, ...]:
        await asyncio.Event().wait()
        return ()

    async def fail(self, group_ids: Sequence[int], why: str, detail: str = "") -> None:
        raise AssertionError(f"groups {group_ids} failed: {why}")

    async def hand_back(
        self, group_id: int, partial_completions: tuple[Completion | None, ...]
    ) -> None:
        raise AssertionError(f"group {group_id} was handed back")


async def _score(admission: Admission, completions: Sequence[Completion]) -> Group:
    rollouts = tuple(Rollout(each, "", 1.0, 1.0, "") for each in completions)
    return Group(admission.group_id, admission.prompt, rollouts, "bench", temperature=1.0)


async def decode(
    folder: Path,
    *,
    num_slots: int,
    group_size: int,
    credits: int,
    by_siblings: bool,
    warm_up_s: float,
    seconds: float,
) -> dict[str, float]:
    """Occupied slots, and tokens per second of wall and of CPU time."""
    core = TorchEngine(
        load_decoder(folder), num_slots=num_slots, max_len=PROMPT_TOKENS + MAX_TOKENS
    )
    drawn, step = [0], core.step

    def counted_step() -> Any:
        finished = step()
        drawn[0] += core.num_drawn
        return finished

    core.step = counted_step  # type: ignore[method-assign]
    engine, replay = ThreadedEngine(core, StateClock("engine")), Credits(credits, group_size)
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, stop_token_ids=STOPS, seed=0)
    worker = RolloutWorker(
        "rollout-0", engine, replay=replay, score=_score, sampling=sampling, group_size=group_size
    )
    if not by_siblings:
        whole = WholeGroups(num_slots=num_slots, group_size=group_size)
        worker._demand = whole  # type: ignore[assignment]
    running = asyncio.create_task(worker.run())
    await asyncio.sleep(warm_up_s)
    before, tokens = engine.slot_use(), drawn[0]
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    await asyncio.sleep(seconds)
    after, tokens = engine.slot_use(), drawn[0] - tokens
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await engine.close()
    elapsed_s = after.elapsed_s - before.elapsed_s
    return {
        "occupancy": (after.occupied - before.occupied) / (num_slots * elapsed_s),
        "tokens_per_s": tokens / wall_s,
        "tokens_per_cpu_s": tokens / cpu_s,
    }
