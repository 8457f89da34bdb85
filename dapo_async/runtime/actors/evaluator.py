"""The evaluator as a Ray actor: an engine of its own that reads a published version from disk and
answers the held-out prompts with it."""

from __future__ import annotations

import asyncio
import os

import torch

from dapo_async.config import Config
from dapo_async.evaluate import Evaluation
from dapo_async.runtime.actors.engine_host import TorchHost
from dapo_async.runtime.actors.reports import ProcessInfo
from dapo_async.utils.state_clock import Span, StateClock
from dapo_async.weights import Announcement, Attestation

NAME = "evaluator"
LOWEST_PRIORITY = 19


class EvaluatorActor:
    """A `snapshot` evaluator takes idle CPU time; a `dedicated` one reserves what it needs."""

    def __init__(self, config: Config, *, incarnation: str) -> None:
        self._config = config
        dedicated = config.evaluation.engine == "dedicated"
        if not dedicated:
            # Linux counts niceness per thread, so set it before the working threads start.
            os.nice(LOWEST_PRIORITY)
        torch.set_num_threads(max(1, int(config.rollout.num_cpus)) if dedicated else 1)
        device = config.model.torch_device if dedicated else "cpu"
        self._clock = StateClock(NAME)
        # The engine's own states are not reported: they are parts of loading and of evaluating.
        self._host = TorchHost(
            config,
            name=NAME,
            incarnation=incarnation,
            device=device,
            clock=StateClock(f"{NAME} engine"),
        )

    async def ready(self) -> ProcessInfo:
        detail = await self._host.start()
        self._clock.enter("wait")
        return ProcessInfo.own(NAME, f"{detail}, {self._config.evaluation.engine}")

    async def alive(self) -> None:
        """Never returns: the driver watches it to learn of the actor's end."""
        await asyncio.Event().wait()

    async def read(self, announcement: Announcement, folder: str) -> Attestation:
        """Loads the announced version from `folder` and attests what is served now."""
        with self._clock.during("load", f"version {announcement.version}"):
            return await self._host.read(announcement, folder)

    async def evaluate(self) -> Evaluation:
        """Greedy accuracy on all held-out prompts, with the version that was loaded last."""
        with self._clock.during("evaluate", f"version {self._host.engine.version}"):
            return await self._host.evaluate(part=0, num_parts=1)

    async def take_spans(self) -> list[Span]:
        return self._clock.take_spans()
