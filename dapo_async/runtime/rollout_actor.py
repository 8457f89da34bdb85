"""One rollout worker as a Ray actor: the torch engine, the worker that keeps it full, and the receiving side of a publish."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray.actor import ActorHandle
from torch import Tensor

from dapo_async.clock import StateClock
from dapo_async.config import Config
from dapo_async.data import load_tokenizer
from dapo_async.evaluate import Evaluation, evaluate
from dapo_async.model import checksum, load_decoder
from dapo_async.reward import get_verifier, score_group
from dapo_async.rollout import SamplingParams, ThreadedEngine, TorchEngine
from dapo_async.rollout.worker import RolloutWorker
from dapo_async.runtime.cluster import own_host, process_info
from dapo_async.runtime.inputs import load_set
from dapo_async.runtime.reports import ProcessInfo, WorkerReport
from dapo_async.types import Admission, Completion, Group, Prompt
from dapo_async.weights import Announcement, Attestation, WeightGroup
from dapo_async.weights.disk import read_version

ANSWER_S = 60.0  # far above any answer of a healthy replay actor


class RayReplay:
    """The worker's port to the replay actor, which answers each call at once or after `POLL_S`: a longer silence is a fault."""

    def __init__(self, name: str, handle: ActorHandle) -> None:
        self._name, self._handle = name, handle

    async def admit(self, worker: str, num_groups: int) -> Sequence[Admission]:
        admissions: list[Admission] = await self._call("admit", worker, num_groups)
        return admissions

    async def offer(self, group: Group) -> None:
        await self._call("offer", group)

    async def fail(self, indices: Sequence[int], why: str) -> None:
        await self._call("fail", indices, why)

    async def doomed(self, worker: str) -> Sequence[int]:
        indices: list[int] = await self._call("doomed", worker)
        return indices

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await getattr(self._handle, method).remote(*args)
        except TimeoutError as error:
            raise TimeoutError(f"{self._name} waited {ANSWER_S:g} s for replay to answer {method}") from error


class RolloutActor:
    """`rank` in the weight group is the worker's number plus one: the learner is rank 0."""

    def __init__(self, config: Config, *, number: int, incarnation: str, replay: ActorHandle) -> None:
        self.name, self._number, self._config, self._incarnation = f"rollout-{number}", number, config, incarnation
        torch.set_num_threads(max(1, int(config.rollout.num_cpus)))
        self._clock = StateClock(self.name)
        self._tokenizer = load_tokenizer(Path(config.model.path))
        self._verify = get_verifier(config.reward.verifier)
        device = "cuda" if config.rollout.num_gpus > 0 else "cpu"
        decoder = load_decoder(Path(config.model.path), dtype=getattr(torch, config.model.dtype), device=device)
        max_len = min(config.data.max_prompt_tokens + config.rollout.max_response_tokens, decoder.config.max_positions)
        self._stop_token_ids = decoder.config.eos_token_ids
        core = TorchEngine(decoder, num_slots=config.rollout.num_slots, max_len=max_len, weight_update=config.rollout.weight_update)
        self._engine = ThreadedEngine(core, self._clock)
        sampling = SamplingParams(
            max_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            stop_token_ids=self._stop_token_ids,
            seed=config.seed,
        )
        port, group_size = RayReplay(self.name, replay), config.replay.group_size
        self._worker = RolloutWorker(self.name, self._engine, replay=port, score=self._score, sampling=sampling, group_size=group_size)
        self._device = device
        self._group: WeightGroup | None = None

    async def ready(self) -> ProcessInfo:
        return process_info(self.name, f"torch engine, {self._config.rollout.num_slots} slots")

    async def run(self) -> None:
        """Rolls groups for as long as the run lasts; the driver watches it."""
        await self._worker.run()

    async def join(self, address: tuple[str, int]) -> None:
        """Joins the learner's weight group at `address`; returns when every member has."""
        host = own_host(self._config)
        size, timeout_s = self._config.rollout.num_workers + 1, self._config.deadlines.publish_s
        self._group = await asyncio.to_thread(
            WeightGroup.join, address, rank=self._number + 1, world_size=size, host=host, device=self._device, timeout_s=timeout_s
        )

    async def receive(self, announcement: Announcement) -> Attestation:
        """Weights by broadcast, staged while generation goes on, swapped between two decode steps."""
        assert self._group is not None, "receive before join"
        take = partial(self._group.receive, announcement.manifest, bucket_bytes=self._config.weights.bucket_bytes)
        return await self._swap(announcement, await asyncio.to_thread(take))

    async def read(self, announcement: Announcement, folder: str) -> Attestation:
        """The same from disk."""
        return await self._swap(announcement, await asyncio.to_thread(read_version, Path(folder), version=announcement.version))

    async def _swap(self, announcement: Announcement, weights: Mapping[str, Tensor]) -> Attestation:
        self._worker.hold(True)
        before = await asyncio.to_thread(checksum, self._engine.weights())
        report = await self._engine.update_weights(weights, version=announcement.version, probe_ids=announcement.probe_ids)
        return Attestation(
            engine=self.name,
            incarnation=self._incarnation,
            version=self._engine.version,
            probe_before=report.probe_before,
            probe_after=report.probe_after,
            checksum_before=before,
            checksum_after=await asyncio.to_thread(checksum, self._engine.weights()),
            pause_s=report.pause_s,
            recomputed_tokens=report.recomputed_tokens,
        )

    async def quarantine(self, on: bool) -> None:
        """On: the weights are wrong; what was generated is given up and nothing new is. Off: generation goes on."""
        await self._worker.quarantine(on)

    async def confirm(self) -> None:
        """The weights are proved: what was generated since the swap may be offered."""
        self._worker.hold(False)

    async def evaluate(self) -> Evaluation:
        """Greedy on this worker's share of the held-out prompts."""
        config = self._config
        loaded = load_set(config, config.data.heldout, self._tokenizer)
        share = loaded.prompts[: config.evaluation.num_prompts][self._number :: config.rollout.num_workers]
        return await evaluate(
            self._engine, share, judge=self._judge, max_tokens=config.rollout.max_response_tokens, stop_token_ids=self._stop_token_ids
        )

    async def report(self) -> WorkerReport:
        return WorkerReport(tuple(self._clock.take_spans()), self._engine.slot_use(), self._engine.version)

    def _decode(self, completion: Completion) -> str:
        text: str = self._tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        return text

    def _judge(self, prompt: Prompt, completion: Completion) -> float:
        return float(self._verify(self._decode(completion), prompt.answer).correct)

    async def _score(self, admission: Admission, completions: Sequence[Completion]) -> Group:
        reward = self._config.reward
        return score_group(
            admission,
            completions,
            texts=[self._decode(completion) for completion in completions],
            verify=self._verify,
            max_response_tokens=self._config.rollout.max_response_tokens,
            overlong_cache_tokens=reward.overlong_cache_tokens,
            shuffle_seed=self._config.seed if reward.shuffle else None,
            incarnation=self._incarnation,
            temperature=self._config.rollout.temperature,
        )
