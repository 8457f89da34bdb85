"""The subject `rollout` with SGLang: the rows of `rollout.py`, measured over HTTP.

A new server with the options of the config, or the first of `rollout.servers`. What the client
sees is what a worker sees: a decode step includes the streaming of its tokens.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dapo_async.bench.made_up import ResponseLengths
from dapo_async.bench.rollout import PREFILL_TOKENS, RequestMaker, RolloutSweep, decode_figures
from dapo_async.bench.session import Cell, Figures, Rounds, run_interruptible
from dapo_async.config import Config
from dapo_async.evaluate.engines import open_engines
from dapo_async.model import ModelConfig
from dapo_async.rollout import Engine, GroupRequest
from dapo_async.rollout.memory import predict_engine_memory
from dapo_async.rollout.sglang.engine import SGLangEngine
from dapo_async.types import Completion

SGLANG_DECODE_STEPS = 32  # per repetition: several chunks of a stream
# A server ends a response before the last positions of the model, which it keeps for itself.
SPARE_POSITIONS = 4
SHORTEST_STEP_S = 1e-6  # noise of two requests may make their difference negative


@dataclass(frozen=True, slots=True)
class SGLangRolloutBench:
    """See `BenchSubject`."""

    config: Config
    model: ModelConfig
    sweep: RolloutSweep
    rounds: Rounds

    @property
    def cells(self) -> list[Cell]:
        return self.sweep.cells

    @property
    def notes(self) -> list[str]:
        urls = self.config.rollout.server_urls
        server = f"the server {urls[0]}" if urls else "a new SGLang server"
        return [f"{server}, {self.config.rollout.fixed_slots} slots"]

    @contextmanager
    def measuring(self) -> Iterator[Callable[[Cell], Figures]]:
        """One server measures all cells."""
        with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
            stack = AsyncExitStack()
            engines = open_engines(
                self.config,
                checkpoint=Path(self.config.model.path),
                max_len=self.sweep.max_len,
                seed=self.config.seed,
                log=Path(folder) / "server.log",
            )
            try:
                engine, *_ = run_interruptible(runner, stack.enter_async_context(engines))
                assert isinstance(engine, SGLangEngine)
                requests = RequestMaker(self.model.vocab_size)
                yield lambda cell: run_interruptible(runner, self._measure(engine, requests, cell))
            finally:
                run_interruptible(runner, stack.aclose())

    def _measure(
        self, engine: SGLangEngine, requests: RequestMaker, cell: Cell
    ) -> Coroutine[Any, Any, Figures]:
        match cell["kind"]:
            case "capacity":
                return self._capacity(engine)
            case "prefill":
                return self._prefill(engine, requests, int(cell["context"]))
            case "decode":
                running, context = int(cell["running"]), int(cell["context"])
                return self._decode(engine, requests, running=running, context=context)
        return self._generate(
            engine, requests, running=int(cell["running"]), lengths=self.sweep.lengths_of(cell)
        )

    async def _capacity(self, engine: SGLangEngine) -> Figures:
        """As the server says; the bytes are computed."""
        tokens = await engine.kv_capacity()
        memory = predict_engine_memory(
            self.model,
            num_slots=1,
            max_len=tokens,
            num_bytes=getattr(torch, self.config.model.dtype).itemsize,
            tensor_parallel=self.config.rollout.tensor_parallel,
        )
        return {"kv_capacity_tokens": [tokens], "kv_bytes": [memory.kv_all_slots]}

    async def _prefill(self, engine: Engine, requests: RequestMaker, context: int) -> Figures:
        tokens = PREFILL_TOKENS[self.config.model.torch_device]
        count = min(max(1, tokens // context), engine.num_slots)

        async def prefill() -> float:
            """Prompt tokens per second of prompts that get one response token each."""
            prompts = [
                requests.request(prompt_tokens=context, siblings=1, new_tokens=1)
                for _ in range(count)
            ]
            began_s = time.perf_counter()
            await asyncio.gather(*map(engine.generate, prompts))
            return count * context / (time.perf_counter() - began_s)

        return {"prefill_tokens_per_s": await self.rounds.of_async(prefill)}

    async def _decode(
        self, engine: Engine, requests: RequestMaker, *, running: int, context: int
    ) -> Figures:
        """A group with one token and a group with more differ by decode steps alone."""
        steps = min(SGLANG_DECODE_STEPS, self.sweep.max_len - 2)
        prompt_tokens = max(1, min(context, self.sweep.max_len) - steps // 2)

        async def seconds(new_tokens: int) -> float:
            group = requests.request(
                prompt_tokens=prompt_tokens, siblings=running, new_tokens=new_tokens
            )
            began_s = time.perf_counter()
            await engine.generate(group)
            return time.perf_counter() - began_s

        async def decode() -> float:
            short_s = await seconds(1)
            return max(SHORTEST_STEP_S, (await seconds(1 + steps) - short_s) / steps)

        taken = await self.rounds.of_async(decode)
        return decode_figures(self.config, self.model, taken, running=running, context=context)

    async def _generate(
        self,
        engine: Engine,
        requests: RequestMaker,
        *,
        running: int,
        lengths: ResponseLengths,
    ) -> Figures:
        """A repetition lasts until as many sequences have ended as run at once."""
        stream = requests.stream(
            lengths,
            running=running,
            group_size=math.gcd(running, self.config.replay.group_size),
            prompt_tokens=self.sweep.prompt_tokens,
        )
        groups: dict[asyncio.Task[tuple[Completion, ...]], GroupRequest] = {}

        def refill() -> None:
            while sum(each.num_siblings for each in groups.values()) < running:
                request = next(stream)
                groups[asyncio.create_task(engine.generate(request))] = request

        async def generate() -> float:
            """Response tokens per second."""
            ended, tokens, began_s = 0, 0, time.perf_counter()
            while ended < running:
                refill()
                done, _ = await asyncio.wait(groups, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del groups[task]
                    lengths_of_group = [len(each.token_ids) for each in task.result()]
                    ended += len(lengths_of_group)
                    tokens += sum(lengths_of_group)
            return tokens / (time.perf_counter() - began_s)

        try:
            return {"tokens_per_s": await self.rounds.of_async(generate)}
        finally:
            for task in groups:
                task.cancel()
            await asyncio.gather(*groups, return_exceptions=True)
