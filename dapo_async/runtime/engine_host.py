"""An engine with what it needs in a Ray actor: the decoder from disk, weights in with an attestation, held-out prompts answered and judged.

Shared by the rollout workers and by the evaluator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dapo_async.clock import StateClock
from dapo_async.config import Config
from dapo_async.data import load_tokenizer
from dapo_async.evaluate import Evaluation, evaluate
from dapo_async.model import checksum, load_decoder
from dapo_async.reward import get_verifier
from dapo_async.rollout import ThreadedEngine, TorchEngine
from dapo_async.runtime.inputs import load_set
from dapo_async.types import Completion, Prompt
from dapo_async.weights import Announcement, Attestation


class EngineHost:
    """`clock` follows the engine's thread: generate, wait, sync."""

    def __init__(self, config: Config, *, name: str, incarnation: str, device: str, clock: StateClock) -> None:
        self._config, self._name, self._incarnation = config, name, incarnation
        self._tokenizer = load_tokenizer(Path(config.model.path))
        self.verify = get_verifier(config.reward.verifier)
        decoder = load_decoder(Path(config.model.path), dtype=getattr(torch, config.model.dtype), device=device)
        max_len = min(config.data.max_prompt_tokens + config.rollout.max_response_tokens, decoder.config.max_positions)
        self.stop_token_ids = decoder.config.eos_token_ids
        core = TorchEngine(decoder, num_slots=config.rollout.num_slots, max_len=max_len, weight_update=config.rollout.weight_update)
        self.engine = ThreadedEngine(core, clock)

    async def swap(self, announcement: Announcement, weights: Mapping[str, Tensor]) -> Attestation:
        """The engine serves `weights` from its next decode step on, and says what it served before and serves now (law 5)."""
        before = await asyncio.to_thread(checksum, self.engine.weights())
        report = await self.engine.update_weights(weights, version=announcement.version, probe_ids=announcement.probe_ids)
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

    async def evaluate(self, *, part: int, num_parts: int) -> Evaluation:
        """Greedy on every `num_parts`-th held-out prompt, from the `part`-th on."""
        config = self._config
        prompts = (await asyncio.to_thread(load_set, config, config.data.heldout, self._tokenizer)).prompts
        share = prompts[: config.evaluation.num_prompts][part::num_parts]
        return await evaluate(
            self.engine, share, judge=self._judge, max_tokens=config.rollout.max_response_tokens, stop_token_ids=self.stop_token_ids
        )

    def decode(self, completion: Completion) -> str:
        text: str = self._tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        return text

    def _judge(self, prompt: Prompt, completion: Completion) -> float:
        return float(self.verify(self.decode(completion), prompt.answer).correct)
