"""An engine in a Ray actor: starts from disk, attests new weights, answers held-out prompts.

The base class and `TorchHost`; `SGLangHost` is in a module of its own. Rollout workers and the
evaluator use them.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from dapo_async.config import Config
from dapo_async.data import load_set, load_tokenizer, response_decoder
from dapo_async.evaluate import Evaluation, evaluate
from dapo_async.model import ModelConfig, checksum, load_decoder
from dapo_async.reward import choose_verifiers
from dapo_async.rollout import Engine
from dapo_async.rollout.engine import SamplingParams
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.runtime.cluster.network import own_host
from dapo_async.types import Completion, Prompt
from dapo_async.utils.state_clock import StateClock
from dapo_async.weights import (
    BUCKET_BYTES,
    Announcement,
    Attestation,
    BrokenOff,
    WeightGroup,
    receive,
)
from dapo_async.weights.disk import read_version


class EngineHost(ABC):
    """Call `start` first. `clock` follows the engine: generate, wait, sync."""

    engine: Engine
    restartable = False  # whether a lost engine can be started again
    in_group = False  # whether the engine is a member of the learner's weight group

    def __init__(self, config: Config, *, name: str, incarnation: str, clock: StateClock) -> None:
        self._config, self._name, self._incarnation, self._clock = config, name, incarnation, clock
        self._tokenizer = load_tokenizer(Path(config.model.path))
        self._response_text = response_decoder(self._tokenizer)
        self.verifiers = choose_verifiers(config.reward.verifier)
        self.model = ModelConfig.from_folder(Path(config.model.path))
        self.max_len = min(
            config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            self.model.max_positions,
        )
        self.stop_token_ids = self.model.eos_token_ids

    @abstractmethod
    async def start(self) -> str:
        """Starts the engine; returns a line about it."""

    def long_turn(self) -> str | None:
        """Where the engine's thread has been since the call before; None: it goes on, or the engine
        is none of this process."""
        return None

    async def restart(self) -> None:
        """Starts a lost engine again, without any of the run's weights."""
        raise AssertionError("only servers can be lost: other engines end with their actor")

    @abstractmethod
    async def sleep(self) -> None:
        """The engine stops and releases its device memory, until `wake`. Raises EngineFault."""

    @abstractmethod
    async def wake(self) -> None:
        """The engine takes its device memory again and goes on."""

    @abstractmethod
    async def end(self) -> None:
        """Ends what is left of a lost engine, so that it holds no memory."""

    @abstractmethod
    async def join(self, address: tuple[str, int], *, first_rank: int, world_size: int) -> bool:
        """Joins the learner's weight group at `address`; returns when every member has.

        False: the engine works, but the group was not formed.
        """

    @abstractmethod
    async def receive(self, announcement: Announcement) -> Attestation:
        """Receives weights by broadcast; returns when the engine serves them. Raises BrokenOff."""

    @abstractmethod
    async def read(self, announcement: Announcement, folder: str) -> Attestation:
        """As `receive`, from disk."""

    async def evaluate(self, *, part: int, num_parts: int) -> Evaluation:
        """avg@k on every `num_parts`-th held-out prompt, from the `part`-th on."""
        config = self._config
        prompts = (
            await asyncio.to_thread(load_set, config, config.data.heldout, self._tokenizer)
        ).prompts
        share = prompts[: config.evaluation.num_prompts][part::num_parts]
        return await evaluate(
            self.engine,
            share,
            judge=self._judge,
            num_samples=config.evaluation.k,
            sampling=SamplingParams(
                max_tokens=config.rollout.max_response_tokens,
                temperature=config.evaluation.temperature,
                stop_token_ids=self.stop_token_ids,
                seed=config.seed,
                top_p=config.evaluation.top_p,
            ),
        )

    def decode(self, completion: Completion) -> str:
        return self._response_text(completion.token_ids.tolist())

    def _judge(self, prompt: Prompt, completion: Completion) -> float | None:
        verify, response = self.verifiers.of(prompt.source), self.decode(completion)
        verdict = verify(response, prompt.answer, prompt=prompt.text)
        return None if verdict.failed else verdict.accuracy


class TorchHost(EngineHost):
    """The native engine on the learner's decoder.

    Broadcast weights arrive during generation and are swapped in between two decode steps.
    """

    engine: ThreadedEngine

    def __init__(
        self, config: Config, *, name: str, incarnation: str, device: str, clock: StateClock
    ) -> None:
        super().__init__(config, name=name, incarnation=incarnation, clock=clock)
        self._device = device
        self._groups: list[WeightGroup] = []  # of the learner's ranks that send

    async def start(self) -> str:
        rollout = self._config.rollout
        decoder = await asyncio.to_thread(
            load_decoder,
            Path(self._config.model.path),
            dtype=getattr(torch, self._config.model.dtype),
            device=self._device,
        )
        core = TorchEngine(
            decoder,
            num_slots=rollout.fixed_slots,
            max_len=self.max_len,
            weight_update=rollout.weight_update,
            returns_experts=self._config.learner.routing_replay,
        )
        self.engine = ThreadedEngine(core, self._clock)
        what = "torch engine (on CUDA a reference, see docs/engines.md)"
        return f"{what if self._device == 'cuda' else 'torch engine'}, {rollout.fixed_slots} slots"

    async def sleep(self) -> None:
        await self.engine.sleep()

    async def wake(self) -> None:
        await self.engine.wake()

    def long_turn(self) -> str | None:
        return self.engine.long_turn()

    async def end(self) -> None:
        raise AssertionError("only servers can be lost: other engines end with their actor")

    async def join(self, address: tuple[str, int], *, first_rank: int, world_size: int) -> bool:
        """See `EngineHost`. Every member joins the groups in one order."""
        self.in_group, self._groups = False, []
        with suppress(RuntimeError):  # a member was lost meanwhile
            for sender in range(self._config.learner.tensor_parallel):
                group = await asyncio.to_thread(
                    WeightGroup.join,
                    address,
                    rank=first_rank,
                    world_size=world_size,
                    host=own_host(self._config),
                    device=self._device,
                    timeout_s=self._config.deadlines.answer_s,
                    sender=sender,
                )
                self._groups.append(group)
            self.in_group = True
        return self.in_group

    async def receive(self, announcement: Announcement) -> Attestation:
        assert self._groups, "receive before join"
        try:
            weights = await asyncio.to_thread(
                receive, self._groups, announcement.manifest, bucket_bytes=BUCKET_BYTES
            )
        except RuntimeError as error:  # a member was lost meanwhile
            self.in_group, self._groups = False, []
            raise BrokenOff(str(error)) from error
        return await self._swap(announcement, weights)

    async def read(self, announcement: Announcement, folder: str) -> Attestation:
        return await self._swap(
            announcement,
            await asyncio.to_thread(read_version, Path(folder), version=announcement.version),
        )

    async def _swap(self, announcement: Announcement, weights: Mapping[str, Tensor]) -> Attestation:
        """The engine serves `weights` from its next decode step on, and attests what it served
        before and what it serves now (handshake)."""
        before = await asyncio.to_thread(checksum, self.engine.weights())
        report = await self.engine.update_weights(
            weights, version=announcement.version, probe_ids=announcement.probe_ids
        )
        return Attestation(
            engine=self._name,
            incarnation=self._incarnation,
            version=self.engine.version,
            probe_before=report.probe_before,
            probe_after=report.probe_after,
            checksum_before=before,
            checksum_after=await asyncio.to_thread(checksum, self.engine.weights()),
            pause_s=report.pause_s,
            recomputed_tokens=report.recomputed_tokens,
        )
