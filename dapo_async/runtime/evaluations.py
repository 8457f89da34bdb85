"""Every evaluation of a run: before and after training on all workers, and each `evaluation.every_steps` beside the steps, one at a time.

Called by the life of a run and by THE loop. Leaves: a row of `evaluations.jsonl` per evaluation, each of exactly one weight version:

    version, weight_versions [version], step (learner steps trained by then, the same number)    what was measured
    accuracy, mean_response_tokens, truncated (share), num_prompts                               what came out, greedily
    engine (all | snapshot | dedicated | lease), wall_s, waited_s (of it, until the first prompt) where, and what it took

and a file of `evaluations/`: which problems it solved.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from dapo_async.config import Config
from dapo_async.evaluate import Evaluation
from dapo_async.runtime.actors.evaluator import NAME
from dapo_async.runtime.handles.evaluator import Evaluator
from dapo_async.runtime.lease import evaluate_on_lease
from dapo_async.runtime.system import System, Worker
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.sinks import Sinks
from dapo_async.tracking.timeline import Timeline
from dapo_async.utils.state_clock import StateClock
from dapo_async.weights import Announcement, judge
from dapo_async.weights.handshake import Outcome
from dapo_async.weights.publisher import HandshakeError


class Evaluations:
    """`rows` are those of this incarnation of the run; `num_skipped` fell due while the one before was still running, or lost their engine."""

    def __init__(self, config: Config, *, system: System, run_dir: RunDir, sinks: Sinks) -> None:
        self.rows: list[dict[str, Any]] = []
        self.num_skipped = 0
        self._config, self._system, self._run_dir, self._sinks = (
            config,
            system,
            run_dir,
            sinks,
        )
        self._clock = StateClock(
            NAME, state="wait"
        )  # the driver's view: what the evaluation in flight waits for
        self._whom, self._version = "", 0
        self._running: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int | None:
        """The version that is being measured beside the steps."""
        return self._version if self._running is not None and not self._running.done() else None

    async def measure_all(self, name: str) -> Evaluation:
        """The `name` evaluation, initial or final: shared among all workers, which generate nothing else."""
        began_s = self._clock.now_s()
        evaluation = await self._system.evaluate()
        self._book(evaluation, f"{name} evaluation", engine="all", began_s=began_s, waited_s=0.0)
        return evaluation

    def start_if_due(self, step: int) -> None:
        """Called right after the publish of version `step + 1` has begun: starts the evaluation of that version, and returns at once.

        None after the last step, whose version the final evaluation measures.
        """
        config, trained = self._config.evaluation, step + 1
        if (
            not config.during_training
            or trained % config.every_steps
            or trained == self._config.train.num_steps
        ):
            return
        if self._running is not None and not self._running.done():
            self._skip(trained, "the one before is still running")
            return
        lessees: list[Worker] = []
        if config.engine == "lease":
            lessees = [
                worker
                for worker in self._system.workers
                if worker in self._system.publisher.present
            ]
            if len(lessees) < 2:
                self._skip(trained, "there is no engine to lease beside the one that generates")
                return
        announcement = self._system.publisher.newest
        assert announcement is not None, f"version {trained} is not published"
        assert announcement.version == trained, (
            f"version {announcement.version} is published, {trained} is due"
        )
        self._version = trained
        self._running = self._system.in_background(
            self._run(announcement, lessees[-1:]), f"evaluation of version {trained}"
        )

    def _skip(self, version: int, why: str) -> None:
        self.num_skipped += 1
        self._sinks.say(f"evaluation of version {version} skipped: {why}")

    async def collect(self, timeline: Timeline, *, deadline_s: float) -> None:
        """Adds the evaluator's row, once, at the end: as the evaluator tells it, or as the driver saw a leased engine."""
        if self._system.evaluator is not None:
            timeline.add(NAME, await self._system.evaluator.take_spans(deadline_s=deadline_s))
        elif self._config.evaluation.during_training:
            timeline.add(NAME, self._clock.take_spans())

    def clear(self) -> None:
        """Removes the version that was read; after the actors' end also what was still being written for an evaluation that was given up."""
        shutil.rmtree(self._run_dir.evaluated, ignore_errors=True)

    async def _run(self, announcement: Announcement, lessees: Sequence[Worker]) -> None:
        deadline_s, began_s = self._config.deadlines.work_s, self._clock.now_s()
        evaluate_from_s = began_s

        def enter(state: str, whom: str) -> None:
            nonlocal evaluate_from_s
            self._whom = whom
            self._clock.enter(state, f"version {announcement.version}")
            if state == "evaluate":
                evaluate_from_s = self._clock.now_s()

        try:
            async with asyncio.timeout(deadline_s) as limit:
                evaluation: Evaluation | None
                if self._system.evaluator is not None:
                    evaluation = await self._evaluate_snapshot(
                        self._system.evaluator, announcement, enter
                    )
                else:
                    (worker,), publisher = lessees, self._system.publisher
                    evaluation = await evaluate_on_lease(
                        worker, replay=self._system.replay, publisher=publisher, enter=enter
                    )
        except TimeoutError as error:
            if not limit.expired():
                raise  # somebody else's deadline, which names who waited for whom
            raise TimeoutError(
                f"evaluation of version {announcement.version}: the driver waited {deadline_s:g} s for {self._whom} to {self._clock.state}"
            ) from error
        self._clock.enter("wait")
        if evaluation is None:
            self._skip(announcement.version, f"{self._whom} lost its engine over it")
        else:
            self._book(
                evaluation,
                "evaluation",
                engine=self._config.evaluation.engine,
                began_s=began_s,
                waited_s=evaluate_from_s - began_s,
            )

    async def _evaluate_snapshot(
        self, evaluator: Evaluator, announcement: Announcement, enter: Callable[[str, str], None]
    ) -> Evaluation:
        """The learner writes the snapshot that it publishes, the evaluator reads it and proves what it serves (law 5)."""
        learner, folder = self._system.learner, self._run_dir.evaluated
        try:
            enter("write", learner.first.name)
            await learner.write(announcement, folder)
            enter("load", evaluator.name)
            attestation = await evaluator.read(announcement, str(folder))
        finally:
            await asyncio.to_thread(self.clear)
        verdict = judge(announcement, attestation, tolerance=self._config.model.probe_tolerance)
        if verdict.outcome is Outcome.MISMATCH:
            raise HandshakeError(f"wrong weights for an evaluation: {verdict.detail}")
        enter("evaluate", evaluator.name)
        return await evaluator.evaluate()

    def _book(
        self, evaluation: Evaluation, name: str, *, engine: str, began_s: float, waited_s: float
    ) -> None:
        (version,) = evaluation.weight_versions  # one model was measured, or this is no evaluation
        wall_s = self._clock.now_s() - began_s
        row = {
            "version": version,
            "step": version,
            "accuracy": evaluation.accuracy,
            "mean_response_tokens": evaluation.mean_response_tokens,
            "num_prompts": evaluation.num_prompts,
            "truncated": evaluation.num_truncated / evaluation.num_prompts,
            "weight_versions": [version],
            "engine": engine,
            "wall_s": wall_s,
            "waited_s": waited_s,
        }
        self.rows.append(row)
        self._run_dir.log_evaluation(row, accuracies=evaluation.accuracies)
        self._sinks.evaluation(row)
        self._sinks.say(
            f"{name} of version {version}: accuracy {evaluation.accuracy:.3f}, length {evaluation.mean_response_tokens:.1f}, "
            f"{evaluation.num_prompts} held-out prompts, greedy"
            + ("" if engine == "all" else f", {engine}, {wall_s:.1f} s")
        )
