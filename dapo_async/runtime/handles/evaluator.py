"""The evaluator as the driver sees it."""

from __future__ import annotations

import ray

from dapo_async.config import Config
from dapo_async.evaluate import Evaluation
from dapo_async.runtime.actors.evaluator import NAME, EvaluatorActor
from dapo_async.runtime.cluster.connect import SPREAD, near
from dapo_async.runtime.handles.handle import Remote
from dapo_async.utils.state_clock import Span
from dapo_async.weights import Announcement, Attestation


class Evaluator:
    """One version in from disk, its evaluation out."""

    def __init__(self, remote: Remote, config: Config) -> None:
        self.remote, self.name, self._deadline_s = remote, remote.name, config.deadlines.work_s

    async def read(self, announcement: Announcement, folder: str) -> Attestation:
        attestation: Attestation = await self.remote.call(
            "read", announcement, folder, deadline_s=self._deadline_s
        )
        return attestation

    async def evaluate(self) -> Evaluation:
        evaluation: Evaluation = await self.remote.call("evaluate", deadline_s=self._deadline_s)
        return evaluation

    async def take_spans(self, *, deadline_s: float) -> list[Span]:
        spans: list[Span] = await self.remote.call("take_spans", deadline_s=deadline_s)
        return spans


def start_evaluator(config: Config, *, incarnation: str, node: str) -> Evaluator:
    """Starts the actor: with what it reserves when it is dedicated, else with nothing, on the learner's `node`, whose files are nearest."""
    evaluation, evaluator = config.evaluation, ray.remote(EvaluatorActor)
    if evaluation.engine == "dedicated":
        evaluator = evaluator.options(
            num_cpus=config.rollout.num_cpus,
            num_gpus=config.gpus_of_evaluator,
            scheduling_strategy=SPREAD,
        )
    else:
        evaluator = evaluator.options(num_cpus=0, scheduling_strategy=near(node, reserves=False))
    return Evaluator(Remote(NAME, evaluator.remote(config, incarnation=incarnation)), config)
