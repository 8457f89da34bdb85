"""The subject `rollout`: decoding, prefill and steady generation of the native engine.

In: the config, the sweep over running sequences and contexts, response lengths. Out, by kind:

    capacity  tokens whose keys and values fit, and their bytes
    prefill   prompt tokens per second, by context
    decode    seconds of a decode step, by running sequences and context
    generate  response tokens per second with refilled slots, by running sequences and lengths

Stop tokens are ignored. In `generate` the siblings of a group have one length, so that they share
the prefill of their prompt as in a run.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dapo_async.bench.made_up import ResponseLengths, random_ids
from dapo_async.bench.session import Cell, Figures, Rounds
from dapo_async.config import Config
from dapo_async.model import ModelConfig, load_decoder
from dapo_async.model.cost import decode_bytes
from dapo_async.model.peak import device_peak
from dapo_async.rollout import GroupRequest, SamplingParams
from dapo_async.rollout.memory import predict_engine_memory
from dapo_async.rollout.native.engine import TorchEngine

DECODE_STEPS = 8  # per repetition
MOST_STEPS = 32  # decode steps of one repetition of `generate`
PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}  # of one repetition, or one prompt if that is longer


@dataclass(frozen=True, slots=True)
class RolloutSweep:
    """What is measured, for either engine."""

    running: Sequence[int]
    contexts: Sequence[int]
    lengths: Sequence[ResponseLengths]
    prompt_tokens: int  # of `generate`
    max_len: int  # tokens of the longest sequence

    @property
    def cells(self) -> list[Cell]:
        """Kind by kind, contexts and lengths outside, running sequences inside."""
        cells: list[Cell] = [{"kind": "capacity"}]
        cells += [{"kind": "prefill", "context": context} for context in self.contexts]
        cells += [
            {"kind": "decode", "running": running, "context": context}
            for context in self.contexts
            for running in self.running
        ]
        cells += [
            {"kind": "generate", "running": running, "lengths": each.label}
            for each in self.lengths
            for running in self.running
        ]
        return cells

    def lengths_of(self, cell: Cell) -> ResponseLengths:
        return next(each for each in self.lengths if each.label == cell["lengths"])


def decode_figures(
    config: Config, model: ModelConfig, taken: Sequence[float], *, running: int, context: int
) -> Figures:
    """The figures of decode steps from their seconds.

    `mbu`: the bytes of weights, keys and values that a step reads, over those that all devices of
    the engine could read in its time.
    """
    device = "cuda:0" if config.model.torch_device == "cuda" else "cpu"
    num_bytes = getattr(torch, config.model.dtype).itemsize
    read = decode_bytes(model, running, context, num_bytes=num_bytes)
    least_s = read / (device_peak(device).bytes_per_s * config.rollout.tensor_parallel)
    return {
        "decode_step_s": taken,
        "tokens_per_s": [running / seconds for seconds in taken],
        "mbu": [least_s / seconds for seconds in taken],
    }


@dataclass(slots=True)
class RequestMaker:
    """Requests with new random prompts: no engine has seen one of them before."""

    vocabulary: int
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    ids: Iterator[int] = field(default_factory=itertools.count)

    def request(self, *, prompt_tokens: int, siblings: int, new_tokens: int) -> GroupRequest:
        """A group that ends after exactly `new_tokens`."""
        sampling = SamplingParams(max_tokens=new_tokens, temperature=1.0, stop_token_ids=(), seed=0)
        prompt = random_ids(self.random, prompt_tokens, vocabulary=self.vocabulary)
        return GroupRequest(next(self.ids), prompt, siblings, sampling)

    def stream(
        self, lengths: ResponseLengths, *, running: int, group_size: int, prompt_tokens: int
    ) -> Iterator[GroupRequest]:
        """Endless groups. The first `running` sequences are caught in the midst of their response,
        so that later ones end evenly over time: their prompt has what they have generated."""
        for started in itertools.count(step=group_size):
            tokens = int(lengths.draw(self.random, 1)[0])
            done = int(self.random.integers(0, tokens)) if started < running else 0
            yield self.request(
                prompt_tokens=prompt_tokens + done, siblings=group_size, new_tokens=tokens - done
            )


@dataclass(frozen=True, slots=True)
class TorchRolloutBench:
    """See `BenchSubject`. Decode steps are measured in this thread, without the worker."""

    config: Config
    model: ModelConfig
    sweep: RolloutSweep
    rounds: Rounds

    @property
    def cells(self) -> list[Cell]:
        return self.sweep.cells

    @property
    def notes(self) -> list[str]:
        rollout = self.config.rollout
        return [f"torch engine, {rollout.fixed_slots} slots of {self.sweep.max_len} tokens"]

    @contextmanager
    def measuring(self) -> Iterator[Callable[[Cell], Figures]]:
        """One engine of the config's size measures all cells."""
        config = self.config
        device = "cuda:0" if config.model.torch_device == "cuda" else "cpu"
        decoder = load_decoder(
            Path(config.model.path), dtype=getattr(torch, config.model.dtype), device=device
        )
        engine = TorchEngine(
            decoder, num_slots=config.rollout.fixed_slots, max_len=self.sweep.max_len
        )
        requests = RequestMaker(self.model.vocab_size)
        kinds: dict[str, Callable[[Cell], Figures]] = {
            "capacity": lambda cell: self._capacity(),
            "prefill": lambda cell: self._prefill(engine, requests, cell),
            "decode": lambda cell: self._decode(engine, requests, cell),
            "generate": lambda cell: self._generate(engine, requests, cell),
        }
        yield lambda cell: kinds[str(cell["kind"])](cell)

    def _capacity(self) -> Figures:
        """Computed: each slot has room for the longest sequence."""
        rollout, sweep = self.config.rollout, self.sweep
        memory = predict_engine_memory(
            self.model,
            num_slots=rollout.fixed_slots,
            max_len=sweep.max_len,
            num_bytes=getattr(torch, self.config.model.dtype).itemsize,
            tensor_parallel=1,
        )
        return {
            "kv_capacity_tokens": [rollout.fixed_slots * sweep.max_len],
            "kv_bytes": [memory.kv_all_slots],
        }

    def _prefill(self, engine: TorchEngine, requests: RequestMaker, cell: Cell) -> Figures:
        context = int(cell["context"])
        tokens = PREFILL_TOKENS[self.config.model.torch_device]
        count = min(max(1, tokens // context), engine.num_slots)

        def prefill() -> float:
            for _ in range(count):
                engine.submit(requests.request(prompt_tokens=context, siblings=1, new_tokens=1))
            began_s = time.perf_counter()
            while engine.has_work:
                engine.step()
            return count * context / (time.perf_counter() - began_s)

        return {"prefill_tokens_per_s": self.rounds.of(prefill)}

    def _decode(self, engine: TorchEngine, requests: RequestMaker, cell: Cell) -> Figures:
        """`context` is the mean over the steps of a repetition."""
        running = int(cell["running"])
        prompt_tokens = max(1, int(cell["context"]) - DECODE_STEPS // 2)

        def decode() -> float:
            """Seconds of a decode step."""
            group = requests.request(
                prompt_tokens=prompt_tokens, siblings=running, new_tokens=DECODE_STEPS + 2
            )
            engine.submit(group)
            engine.step()  # reads the prompt
            began_s = time.perf_counter()
            for _ in range(DECODE_STEPS):
                engine.step()
            took_s = time.perf_counter() - began_s
            engine.abort([group.group_id])
            return took_s / DECODE_STEPS

        taken = self.rounds.of(decode)
        return decode_figures(
            self.config, self.model, taken, running=running, context=int(cell["context"])
        )

    def _generate(self, engine: TorchEngine, requests: RequestMaker, cell: Cell) -> Figures:
        running, lengths = int(cell["running"]), self.sweep.lengths_of(cell)
        group_size = math.gcd(running, self.config.replay.group_size)
        stream = requests.stream(
            lengths,
            running=running,
            group_size=group_size,
            prompt_tokens=self.sweep.prompt_tokens,
        )
        siblings: dict[int, int] = {}  # on the engine, by group
        num_steps = max(1, min(MOST_STEPS, round(lengths.mean)))

        def refill() -> None:
            while sum(siblings.values()) < running:
                request = next(stream)
                siblings[request.group_id] = request.num_siblings
                engine.submit(request)

        def generate() -> float:
            """Response tokens per second."""
            drawn, began_s = 0, time.perf_counter()
            for _ in range(num_steps):
                refill()
                for group_id, _ in engine.step():
                    del siblings[group_id]
                drawn += engine.num_drawn
            return drawn / (time.perf_counter() - began_s)

        try:
            return {"tokens_per_s": self.rounds.of(generate)}
        finally:
            engine.abort([*siblings])
