"""Engines and a learner that sleep by a latency model, in the real actors, for `asynchrony.py`.

`SleepingEngine` replaces the decoding of the native engine, `sleeping_learner` of the package the
learner's step. Both keep a tiny decoder, so that weights are sent and proved as in a run.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from support import simulated_run

from dapo_async.bench.replaced import sleeping_learner
from dapo_async.config import Config
from dapo_async.model import load_decoder
from dapo_async.planner import Lengths
from dapo_async.planner.lengths import Draws
from dapo_async.rollout import GroupRequest
from dapo_async.rollout.engine import UpdateReport
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.runtime.actors.engine_host import TorchHost
from dapo_async.runtime.actors.rollout import RolloutActor
from dapo_async.runtime.launch import ActorClasses
from dapo_async.types import Completion, FinishReason

GROUP_SIZE, GROUPS_PER_STEP, WORKERS = 8, 32, 2
ACCEPTANCE = 0.75  # the other groups are all correct, and dynamic sampling rejects them
MEAN_TOKENS, CAP = 128, 4.0  # tokens of a response; the longest, in means
RESERVE_TOKENS = 64  # per running sequence that stay free in the KV cache
TICK_S = 0.005  # commands wait for the engine's thread at most so long, as for a decode step
MARKER_ID, EOS_ID = 11, 12  # of the quickstart's tokenizer; 0 … 9 are the digits
RIGHT, WRONG = 1, 0  # the answer of every problem, and another one
SHORTEST = 3  # tokens of a response: marker, answer and end


@dataclass(frozen=True, slots=True)
class Shape:
    """One cell of the table."""

    staleness: int
    tail: float
    split: float
    step_s: float
    response_steps: float  # duration of a mean response, in learner steps
    minibatches: int = 1
    admission: str = "paced"
    kv_tokens: float = math.inf  # what the KV cache of an engine holds

    @property
    def token_s(self) -> float:
        """Seconds per token of a running sequence, whatever else runs."""
        return self.response_steps * self.step_s / MEAN_TOKENS

    @property
    def consumption(self) -> float:
        """Groups per second of a learner that never waits."""
        return GROUPS_PER_STEP / self.step_s

    @property
    def slots(self) -> int:
        """Of one engine, so that accepted production over consumption is about `split`."""
        seconds = self.split * self.consumption / ACCEPTANCE * GROUP_SIZE * MEAN_TOKENS
        return round(seconds * self.token_s / WORKERS)

    @property
    def production(self) -> float:
        """Groups per second of engines whose slots are always occupied."""
        return WORKERS * self.slots / (GROUP_SIZE * MEAN_TOKENS * self.token_s)

    def simulated(self, *, steps: int = 60, warm_up: int = 0) -> simulated_run.Shape:
        """The same run in virtual time, with a control plane that takes no time."""
        num_steps = steps + self.extra_steps
        return simulated_run.Shape(
            num_workers=WORKERS,
            num_slots=self.slots,
            group_size=GROUP_SIZE,
            groups_per_step=GROUPS_PER_STEP,
            max_staleness=self.staleness,
            lengths=Lengths(
                tail=self.tail,
                shared=0.0,
                mean_tokens=MEAN_TOKENS,
                max_tokens=int(CAP * MEAN_TOKENS),
            ),
            acceptance=ACCEPTANCE,
            split=self.production * ACCEPTANCE / self.consumption,
            num_steps=num_steps,
            warm_up=warm_up / num_steps,
            publish=0.0,
            num_minibatches=self.minibatches,
            paced=self.admission == "paced",
        )

    @property
    def extra_steps(self) -> int:
        """Steps at the end that are not measured: no groups are admitted any more."""
        return self.staleness + 3


@dataclass(slots=True)
class Open:
    """A group on the engine."""

    lengths: list[int]
    kept: bool  # by the filters
    completions: dict[int, Completion] = field(default_factory=dict)


class SleepingEngine(TorchEngine):
    """The core of the native engine with sleep in place of decoding.

    A sequence occupies a slot for `token_s` per token. Each token has the version that was served
    at its time. Weight updates are real, on a decoder that decodes nothing.
    """

    def __init__(self, decoder: Any, *, shape: Shape, max_len: int) -> None:
        super().__init__(decoder, num_slots=1, max_len=max_len)
        self.num_slots, self._shape = shape.slots, shape
        self._draws = Draws(shape.simulated().lengths, group_size=GROUP_SIZE)
        self._open: dict[int, Open] = {}
        self._queue: list[tuple[int, int]] = []  # group and sibling, in order of submission
        self._ends: list[tuple[float, int, int, float]] = []  # heap: end, group, sibling, start
        self._served_s, self._served = [0.0], [0]  # versions and since when

    @property
    def num_running(self) -> int:
        return len(self._ends)

    @property
    def has_work(self) -> bool:
        return bool(self._ends or self._queue)

    def submit(self, request: GroupRequest) -> None:
        kept = self._draws.luck(request.group_id) < ACCEPTANCE
        lengths = [max(SHORTEST, each) for each in self._draws.lengths(request.group_id)]
        self._open[request.group_id] = Open(lengths, kept)
        self._queue += [(request.group_id, sibling) for sibling in range(request.num_siblings)]

    def abort(self, group_ids: Iterable[int]) -> list[int]:
        raise AssertionError(f"a healthy run evicts nothing, but {tuple(group_ids)}")

    def step(self) -> list[tuple[int, tuple[Completion, ...]]]:
        """Fills free slots, sleeps until the next sequence ends, for `TICK_S` at most."""
        now_s = time.monotonic()
        free = min(self.num_slots - len(self._ends), self._room(now_s))
        starting, self._queue = self._queue[:free], self._queue[free:]
        for group_id, sibling in starting:
            end_s = now_s + float(self._open[group_id].lengths[sibling]) * self._shape.token_s
            heapq.heappush(self._ends, (end_s, group_id, sibling, now_s))
        self.num_drawn = len(self._ends)
        time.sleep(max(0.0, min(TICK_S, self._ends[0][0] - time.monotonic())))
        return self._finish(time.monotonic())

    def _room(self, now_s: float) -> int:
        """Sequences for which the KV cache has room, as in the planner's engine."""
        if self._shape.kv_tokens == math.inf:
            return self.num_slots
        context = sum(now_s - start_s for *_, start_s in self._ends) / self._shape.token_s
        left = self._shape.kv_tokens - context - RESERVE_TOKENS * len(self._ends)
        return max(0 if self._ends else 1, int(left / RESERVE_TOKENS))

    def update_weights(
        self, weights: Mapping[str, torch.Tensor], *, version: int, probe_ids: NDArray[np.int32]
    ) -> UpdateReport:
        report = super().update_weights(weights, version=version, probe_ids=probe_ids)
        self._served_s.append(time.monotonic())
        self._served.append(version)
        return report

    def _finish(self, now_s: float) -> list[tuple[int, tuple[Completion, ...]]]:
        self.num_ended.clear()
        finished = []
        while self._ends and self._ends[0][0] <= now_s:
            _, group_id, sibling, start_s = heapq.heappop(self._ends)
            group = self._open[group_id]
            group.completions[sibling] = self._completion(group_id, sibling, start_s)
            self.num_ended[group_id] += 1
            if len(group.completions) == len(group.lengths):
                del self._open[group_id], self.num_ended[group_id]
                ordered = tuple(group.completions[each] for each in range(len(group.lengths)))
                finished.append((group_id, ordered))
        return finished

    def _completion(self, group_id: int, sibling: int, start_s: float) -> Completion:
        """Digits, the marker, and an answer that makes the group accepted or rejected."""
        group = self._open[group_id]
        length = group.lengths[sibling]
        right = sibling % 2 == 0 or not group.kept
        ids = (np.arange(length) % 10).astype(np.int32)
        ids[-3:] = MARKER_ID, RIGHT if right else WRONG, EOS_ID
        times_s = start_s + np.arange(length) * self._shape.token_s
        served = np.searchsorted(self._served_s, times_s, side="right") - 1
        versions = np.array(self._served, np.int32)[served]
        logprobs = np.full(length, -0.5, np.float32)
        return Completion(ids, logprobs, versions, int(versions[0]), FinishReason.STOP)


class SleepingHost(TorchHost):
    shape: Shape

    async def start(self) -> str:
        decoder = await asyncio.to_thread(load_decoder, Path(self._config.model.path))
        core = SleepingEngine(decoder, shape=self.shape, max_len=self.max_len)
        self.engine = ThreadedEngine(core, self._clock)
        return f"sleeping engine, {core.num_slots} slots"


def emulated(shape: Shape) -> ActorClasses:
    """The actors of a run with engine and rank of this cell."""

    class EmulatedRollout(RolloutActor):
        def __init__(self, config: Config, **others: Any) -> None:
            super().__init__(config, **others)
            self._host = host = SleepingHost(
                config,
                name=self.name,
                incarnation=others["incarnation"],
                device="cpu",
                clock=self._clock,
            )
            host.shape = shape

    return ActorClasses(
        learner=sleeping_learner(step_s=shape.step_s, groups_per_step=GROUPS_PER_STEP),
        rollout=EmulatedRollout,
    )
