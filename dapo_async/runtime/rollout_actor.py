"""One rollout worker as a Ray actor: the torch engine, the worker that keeps it full, and the receiving side of a publish."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ray.actor import ActorHandle
from torch import Tensor

from dapo_async.clock import StateClock
from dapo_async.config import Config
from dapo_async.evaluate import Evaluation
from dapo_async.reward import score_group
from dapo_async.rollout import SamplingParams
from dapo_async.rollout.worker import RolloutWorker
from dapo_async.runtime.cluster import own_host, process_info
from dapo_async.runtime.engine_host import EngineHost
from dapo_async.runtime.reports import ProcessInfo, WorkerReport
from dapo_async.types import Admission, Completion, Group
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
        self._device = "cuda" if config.rollout.num_gpus > 0 else "cpu"
        self._host = EngineHost(config, name=self.name, incarnation=incarnation, device=self._device, clock=self._clock)
        self._engine = self._host.engine
        sampling = SamplingParams(
            max_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            stop_token_ids=self._host.stop_token_ids,
            seed=config.seed,
        )
        port, group_size = RayReplay(self.name, replay), config.replay.group_size
        self._worker = RolloutWorker(self.name, self._engine, replay=port, score=self._score, sampling=sampling, group_size=group_size)
        self._group: WeightGroup | None = None
        self._staged: dict[str, Tensor] = {}  # the newest weights that came while this engine was leased

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
        return await self._swap(announcement, await self._broadcast(announcement))

    async def read(self, announcement: Announcement, folder: str) -> Attestation:
        """The same from disk."""
        return await self._swap(announcement, await asyncio.to_thread(read_version, Path(folder), version=announcement.version))

    async def stage(self, announcement: Announcement) -> None:
        """While leased: weights by broadcast, kept beside those being served, which do not change."""
        self._staged = await self._broadcast(announcement)

    async def swap_staged(self, announcement: Announcement) -> Attestation:
        """What was staged last, the weights of `announcement`, is served."""
        assert self._staged, "swap_staged before stage"
        staged, self._staged = self._staged, {}
        return await self._swap(announcement, staged)

    async def _broadcast(self, announcement: Announcement) -> dict[str, Tensor]:
        assert self._group is not None, "receive before join"
        return await asyncio.to_thread(self._group.receive, announcement.manifest, bucket_bytes=self._config.weights.bucket_bytes)

    async def _swap(self, announcement: Announcement, weights: Mapping[str, Tensor]) -> Attestation:
        self._worker.hold(True)
        return await self._host.swap(announcement, weights)

    async def quarantine(self, on: bool) -> None:
        """On: the weights are wrong; what was generated is given up and nothing new is. Off: generation goes on."""
        await self._worker.quarantine(on)

    async def confirm(self) -> None:
        """The weights are proved: what was generated since the swap may be offered."""
        self._worker.hold(False)

    async def lease(self, on: bool) -> None:
        """On: no group is asked for from now on. Off: admission goes on."""
        self._worker.lease(on)

    async def drained(self) -> None:
        """Returns when nothing of what was admitted is left here."""
        await self._worker.drained()

    async def evaluate(self, part: int, num_parts: int) -> Evaluation:
        """Greedy on one part of the held-out prompts."""
        return await self._host.evaluate(part=part, num_parts=num_parts)

    async def report(self) -> WorkerReport:
        return WorkerReport(tuple(self._clock.take_spans()), self._engine.slot_use(), self._engine.version)

    async def _score(self, admission: Admission, completions: Sequence[Completion]) -> Group:
        reward = self._config.reward
        return score_group(
            admission,
            completions,
            texts=[self._host.decode(completion) for completion in completions],
            verify=self._host.verify,
            max_response_tokens=self._config.rollout.max_response_tokens,
            overlong_cache_tokens=reward.overlong_cache_tokens,
            shuffle_seed=self._config.seed if reward.shuffle else None,
            incarnation=self._incarnation,
            temperature=self._config.rollout.temperature,
        )
