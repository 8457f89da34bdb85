"""The evaluator as a Ray actor: an engine of its own that reads a published version from disk and
answers the held-out prompts with it.

The first evaluation comes after several steps, so a thread imports and loads the engine beside the
start of the run. This module must not import torch.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_async.config import Config
from dapo_async.evaluate import Evaluation
from dapo_async.rollout import EngineFault
from dapo_async.runtime.actors.once import answers_once
from dapo_async.runtime.actors.reports import ProcessInfo
from dapo_async.runtime.cluster.network import use_network
from dapo_async.utils.state_clock import Span, StateClock
from dapo_async.utils.thread_stack import process_dump

if TYPE_CHECKING:
    from dapo_async.runtime.actors.engine_host import EngineHost
    from dapo_async.weights import Announcement, Attestation

NAME = "evaluator"
LOADING_PRIORITY = 5  # behind the start of the others, and ready for the first evaluation
LOWEST_PRIORITY = 19


@answers_once
class EvaluatorActor:
    """A `snapshot` evaluator takes idle CPU time; a `dedicated` one reserves what it needs and has
    an engine of the rollout's kind. A lost SGLang server ends the evaluator: it is replaced."""

    def __init__(self, config: Config, *, incarnation: str, logs: Path) -> None:
        """`logs`: folder for the output of an SGLang server."""
        self._config, self._incarnation, self._logs = config, incarnation, logs
        self._dedicated = config.evaluation.engine == "dedicated"
        if not self._dedicated:
            os.nice(LOADING_PRIORITY)
        self._clock = StateClock(NAME)
        self._loading: asyncio.Task[EngineHost] | None = None
        self._lost = asyncio.Event()
        self._why_lost = ""

    async def ready(self) -> ProcessInfo:
        """Returns at once; the engine starts in the background."""
        self._loading = asyncio.create_task(self._load())
        slots, engine = self._config.rollout.fixed_slots, self._config.evaluation.engine
        kind = "SGLang" if self._uses_sglang else "torch engine"
        return ProcessInfo.own(NAME, f"{kind}, {slots} slots, {engine}")

    @property
    def _uses_sglang(self) -> bool:
        return self._dedicated and self._config.rollout.engine == "sglang"

    async def _load(self) -> EngineHost:
        use_network(self._config)
        host = await asyncio.to_thread(self._make_host)
        self._yield()
        await host.start()
        self._clock.enter("wait")
        return host

    def _yield(self) -> None:
        """Linux counts niceness per thread; threads that this one starts later inherit it."""
        if not self._dedicated:
            os.nice(LOWEST_PRIORITY - LOADING_PRIORITY)

    def _make_host(self) -> EngineHost:
        import torch

        from dapo_async.runtime.actors.engine_host import TorchHost

        self._yield()
        config = self._config
        torch.set_num_threads(max(1, int(config.model.num_cpus)) if self._dedicated else 1)
        device = config.model.torch_device if self._dedicated else "cpu"
        # The engine's own states are not reported: they are parts of loading and of evaluating.
        clock = StateClock(f"{NAME} engine")
        if self._uses_sglang:
            from dapo_async.runtime.actors.sglang_host import SGLangHost

            return SGLangHost(
                own_server_config(config),
                name=NAME,
                number=config.rollout.num_workers,
                incarnation=self._incarnation,
                device=device,
                clock=clock,
                logs=self._logs,
                outer_key="",
            )
        return TorchHost(
            config, name=NAME, incarnation=self._incarnation, device=device, clock=clock
        )

    async def _host(self) -> EngineHost:
        """The host, once its engine has started."""
        assert self._loading is not None, "called before ready"
        return await asyncio.shield(self._loading)

    async def alive(self) -> str:
        """Returns only when the engine is lost: why. The driver watches it to learn of that, of the
        actor's end, and of an engine that can't start."""
        await self._host()
        await self._lost.wait()
        return self._why_lost

    async def ping(self) -> None:
        """Shows that the process lives and its event loop runs."""

    async def read(self, announcement: Announcement, folder: str) -> Attestation | None:
        """Loads the announced version from `folder` and attests what is served now.

        None: the engine is lost.
        """
        host = await self._host()
        with self._clock.during("load", f"version {announcement.version}"):
            try:
                return await host.read(announcement, folder)
            except EngineFault as fault:
                self._lose(fault)
                return None

    async def evaluate(self) -> Evaluation | None:
        """avg@k on all held-out prompts, with the version that was loaded last.

        None: the engine is lost.
        """
        host = await self._host()
        with self._clock.during("evaluate", f"version {host.engine.version}"):
            try:
                return await host.evaluate(part=0, num_parts=1)
            except EngineFault as fault:
                self._lose(fault)
                return None

    def _lose(self, fault: EngineFault) -> None:
        self._why_lost = str(fault)
        self._lost.set()

    async def dump(self) -> str:
        """What this process does now."""
        return process_dump(self._clock)

    async def take_spans(self) -> list[Span]:
        return self._clock.take_spans()


def own_server_config(config: Config) -> Config:
    """For an evaluator with a server of its own, also where the workers use running ones."""
    rollout = replace(config.rollout, servers="", num_slots=config.rollout.fixed_slots)
    return replace(config, rollout=rollout)
