"""Actors that replace one side of the loop: a learner that sleeps, engines that answer at once.

Both keep the real model, so that weights are sent and checked as in a run. `loop.py` and
`benchmarks/` start them in place of the actors of a run.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dapo_async.bench.learner import recorded_groups
from dapo_async.bench.made_up import ResponseLengths, made_up_group
from dapo_async.learner import LearnerRank
from dapo_async.learner.batch_plan import RankShare
from dapo_async.learner.metrics import rollout_metrics
from dapo_async.model import Decoder, load_decoder
from dapo_async.rollout import GroupRequest
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.runtime.actors.engine_host import EngineHost, TorchHost
from dapo_async.runtime.actors.learner import LearnerActor
from dapo_async.runtime.actors.rollout import RolloutActor
from dapo_async.types import Completion, Group, StepMetrics

WEIGHT_CHANGE = 1.001  # so that the handshake sees new weights


class SleepingRank(LearnerRank):
    """Sleeps for its share of a step for each minibatch, and changes the weights a little."""

    step_s: float
    groups_per_step: int

    def minibatch(
        self,
        groups: Sequence[Group],
        *,
        share: RankShare | None = None,
        more: bool = False,
        num_halvings: int = 0,
    ) -> StepMetrics:
        """See `LearnerRank.minibatch`: the metrics are those that do not need a forward pass."""
        share = share or self.share_of(groups)
        num_groups = sum(len(each.siblings) / len(each.rewards) for each in share.groups)
        share_of_step = num_groups * self._mesh.dp.size / self.groups_per_step
        end_s = time.monotonic() + self.step_s * share_of_step
        metrics = rollout_metrics(groups, share, learner_version=self.version)
        tokens = np.concatenate(
            [each.completion.weight_versions for group in groups for each in group.rollouts]
        )
        staleness = (float((self.version - tokens).sum()), float(len(tokens)))
        with torch.no_grad():
            for parameter in self.decoder.parameters():
                parameter.mul_(WEIGHT_CHANGE)
        time.sleep(max(0.0, end_s - time.monotonic()))
        totals = {"non_finite": 0.0, "skipped": 0.0, "train_flops": 0.0}  # it computes nothing
        return metrics + StepMetrics({"staleness": staleness}, {"lr": 0.0}, totals)


def sleeping_learner(*, step_s: float, groups_per_step: int) -> type[LearnerActor]:
    """The actor of a rank whose step takes `step_s`."""

    class SleepingLearner(LearnerActor):
        def _load(self, mesh_address: tuple[str, int] | None) -> None:
            super()._load(mesh_address)
            config = self._config
            self._rank = rank = SleepingRank(
                self._rank.decoder,
                algorithm=config.algorithm,
                learner=config.learner,
                mesh=self._mesh,
            )
            rank.step_s, rank.groups_per_step = step_s, groups_per_step

    return SleepingLearner


@dataclass(slots=True)
class AnswerSource:
    """Completions without an engine: of recorded groups, in turn, or made up."""

    lengths: ResponseLengths
    vocabulary: int
    recorded: Sequence[Group] = ()

    def answer(self, request: GroupRequest, *, version: int) -> tuple[Completion, ...]:
        """One completion per sibling, all by `version`."""
        siblings = request.num_siblings
        if self.recorded:
            group = self.recorded[request.group_id % len(self.recorded)]
        else:
            random = np.random.default_rng(request.group_id)
            group = made_up_group(
                request.group_id,
                self.lengths.draw(random, siblings),
                prompt_tokens=1,
                vocabulary=self.vocabulary,
            )
        completions = [rollout.completion for rollout in group.rollouts]
        return tuple(
            replace(
                each,
                weight_versions=np.full(len(each.token_ids), version, np.int32),
                prefill_version=version,
            )
            for each in itertools.islice(itertools.cycle(completions), siblings)
        )


class AnsweringEngine(TorchEngine):
    """The core of the native engine with answers in place of decoding. Updates are real."""

    def __init__(
        self, decoder: Decoder, source: AnswerSource, *, num_slots: int, max_len: int
    ) -> None:
        super().__init__(decoder, num_slots=1, max_len=max_len)
        self.num_slots, self._source = num_slots, source
        self._open: dict[int, GroupRequest] = {}

    @property
    def num_running(self) -> int:
        return 0

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def submit(self, request: GroupRequest) -> None:
        self._open[request.group_id] = request

    def received(self, group_ids: Iterable[int]) -> dict[int, tuple[Completion | None, ...]]:
        return {each: () for each in group_ids if each in self._open}

    def abort(self, group_ids: Iterable[int]) -> list[int]:
        return [each for each in group_ids if self._open.pop(each, None) is not None]

    def step(self) -> list[tuple[int, tuple[Completion, ...]]]:
        self.num_ended.clear()
        requests, self._open = list(self._open.values()), {}
        self.num_drawn = min(self.num_slots, sum(each.num_siblings for each in requests))
        return [
            (each.group_id, self._source.answer(each, version=self.version)) for each in requests
        ]


def answering_rollout(lengths: ResponseLengths, recorded: Path | None) -> type[RolloutActor]:
    """The actor of a worker whose engine answers at once."""

    class AnsweringHost(TorchHost):
        async def start(self) -> str:
            decoder = await asyncio.to_thread(
                load_decoder,
                Path(self._config.model.path),
                dtype=getattr(torch, self._config.model.dtype),
                device=self._device,
            )
            groups = recorded_groups(recorded, self.model) if recorded else ()
            core = AnsweringEngine(
                decoder,
                AnswerSource(lengths, self.model.vocab_size, groups),
                num_slots=self._config.rollout.fixed_slots,
                max_len=self.max_len,
            )
            self.engine = ThreadedEngine(core, self._clock)
            return "recorded responses" if recorded else "made-up responses"

    class AnsweringRollout(RolloutActor):
        def _make_host(self, logs: Path, *, outer_key: str) -> EngineHost:
            return AnsweringHost(
                self._config,
                name=self.name,
                incarnation=self._incarnation,
                device=self._config.model.torch_device,
                clock=self._clock,
            )

    return AnsweringRollout
