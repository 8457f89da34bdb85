"""Every evaluation of a run: before and after training on all workers, and every
`evaluation.every_steps` steps beside training, one at a time.

`run` calls `measure_all` before and after training, `loop` calls `start_if_due` after each publish.
Each evaluation writes one row of `evaluations.jsonl`, which belongs to exactly one weight version:

    version, weight_versions [version], step    what was measured; step: learner steps by then
    accuracy, mean_response_tokens,
    truncated (share), num_prompts              the result; the accuracy is avg@k
    k, temperature, top_p                       how the responses were sampled
    engine (all | snapshot | dedicated)         where
    wall_s, waited_s                            duration, and the part before the first prompt

and one file of `evaluations/` with the accuracy of each problem.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from typing import Any

from dapo_async.config import Config
from dapo_async.evaluate import Evaluation
from dapo_async.runtime.actors.evaluator import NAME
from dapo_async.runtime.handles.actors import EvaluatorHandle
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed
from dapo_async.runtime.system import System
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.sinks import Sinks
from dapo_async.tracking.timeline import Timeline
from dapo_async.utils.files import disk_fault
from dapo_async.weights import Announcement, check_attestation
from dapo_async.weights.handshake import HandshakeOutcome
from dapo_async.weights.publisher import HandshakeError


class Evaluations:
    """Starts evaluations and records their results.

    `rows`: results of this incarnation. `num_skipped`: evaluations that fell due while another ran,
    or whose evaluator died.
    """

    def __init__(self, config: Config, *, system: System, run_dir: RunDir, sinks: Sinks) -> None:
        self.rows: list[dict[str, Any]] = []
        self.num_skipped = 0
        self._config, self._system = config, system
        self._run_dir, self._sinks = run_dir, sinks
        self._version = 0
        self._waiting_for = ""  # which actor has to do what next
        self._running: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int | None:
        """The version that is being measured beside training, if any."""
        return self._version if self._running is not None and not self._running.done() else None

    async def measure_all(self, name: str) -> Evaluation:
        """The initial or final evaluation, shared among all workers, which do nothing else."""
        began_s = time.monotonic()
        evaluation = await self._system.evaluate()
        self._book(evaluation, f"{name} evaluation", engine="all", began_s=began_s, waited_s=0.0)
        return evaluation

    def start_if_due(self, step: int) -> None:
        """Starts the evaluation of version `step + 1` if it is due, and returns at once.

        Call it right after the publish of that version has begun. The last version is left to the
        final evaluation.
        """
        config, version = self._config.evaluation, step + 1
        is_last = version == self._config.train.num_steps
        if not config.during_training or version % config.every_steps or is_last:
            return
        if self.in_flight is not None:
            self.num_skipped += 1
            self._sinks.say(
                f"evaluation of version {version} skipped: the one before is still running"
            )
            return
        evaluator, announcement = self._system.evaluator, self._system.publisher.newest
        assert evaluator is not None, "a run that evaluates during training has an evaluator"
        assert announcement is not None, f"version {version} is not published"
        assert announcement.version == version, (
            f"version {announcement.version} is published, {version} is due"
        )
        self._version = version
        self._running = self._system.in_background(
            self._run(evaluator, announcement), f"evaluation of version {version}"
        )

    async def collect(self, timeline: Timeline, *, deadline_s: float) -> None:
        """Adds the evaluator's spans to the timeline, once, at the end of the run."""
        if self._system.evaluator is not None:
            timeline.add(NAME, await self._system.evaluator.within(deadline_s).take_spans())

    def clear(self) -> None:
        """Removes the version on disk. Call it again after the actors' end: a write that was given
        up may still have been under way."""
        shutil.rmtree(self._run_dir.evaluated, ignore_errors=True)

    async def _run(self, evaluator: EvaluatorHandle, announcement: Announcement) -> None:
        deadline_s, began_s = self._config.deadlines.work_s, time.monotonic()
        try:
            async with asyncio.timeout(deadline_s) as limit:
                if not await self._load(evaluator, announcement):
                    return
                loaded_s = time.monotonic()
                self._waiting_for = f"{evaluator.name} to evaluate"
                evaluation = await evaluator.evaluate()
                if evaluation is None:
                    self._skip_lost(announcement)
                    return
        except ActorDied as error:  # the supervisor replaces evaluator and learner
            self._skip(announcement, str(error))
            return
        except (ActorFailed, TimeoutError) as error:
            why = str(error)
            if isinstance(error, TimeoutError) and limit.expired():
                why = f"the driver waited {deadline_s:g} s for {self._waiting_for}"
            if not self._waiting_for.startswith(evaluator.name):
                raise type(error)(f"evaluation of version {announcement.version}: {why}") from error
            self._skip(announcement, why)
            evaluator.kill()  # its engine may be broken: the supervisor starts another one
            return
        self._book(
            evaluation,
            "evaluation",
            engine=self._config.evaluation.engine,
            began_s=began_s,
            waited_s=loaded_s - began_s,
        )

    async def _load(self, evaluator: EvaluatorHandle, announcement: Announcement) -> bool:
        """The learner writes the published snapshot, the evaluator reads it and attests what it
        serves (handshake). False: the disk refused the snapshot, or the engine is lost.

        Raises HandshakeError.
        """
        learner, folder = self._system.learner, self._run_dir.evaluated
        try:
            self._waiting_for = f"{learner.first.name} to write"
            announced = await learner.write_once(announcement, folder)
            self._waiting_for = f"{evaluator.name} to load"
            attestation = await evaluator.read(announcement, str(folder))
        except ActorFailed as error:
            if (why := disk_fault(error)) is None:
                raise
            self.num_skipped += 1
            self._sinks.disk.note(
                "weights for an evaluation", why, consequence="this evaluation is skipped"
            )
            return False
        finally:
            await asyncio.to_thread(self.clear)
        if attestation is None:
            self._skip_lost(announcement)
            return False
        tolerance = self._config.model.probe_tolerance
        result = check_attestation(announced, attestation, tolerance=tolerance)
        if result.outcome is HandshakeOutcome.MISMATCH:
            raise HandshakeError(f"wrong weights for an evaluation: {result.detail}")
        return True

    def _skip_lost(self, announcement: Announcement) -> None:
        """The supervisor says why the engine was lost, and starts another evaluator."""
        self._skip(announcement, "the evaluator has lost its engine")

    def _skip(self, announcement: Announcement, why: str) -> None:
        self.num_skipped += 1
        self._sinks.say(f"evaluation of version {announcement.version} skipped: {why}")

    def _book(
        self, evaluation: Evaluation, name: str, *, engine: str, began_s: float, waited_s: float
    ) -> None:
        (version,) = evaluation.weight_versions  # an evaluation measures one version
        wall_s = time.monotonic() - began_s
        row = {
            "version": version,
            "step": version,
            "accuracy": evaluation.accuracy,
            "mean_response_tokens": evaluation.mean_response_tokens,
            "num_prompts": evaluation.num_prompts,
            "truncated": evaluation.truncated,
            "k": evaluation.num_samples,
            "temperature": self._config.evaluation.temperature,
            "top_p": self._config.evaluation.top_p,
            "weight_versions": [version],
            "engine": engine,
            "wall_s": wall_s,
            "waited_s": waited_s,
        }
        self.rows.append(row)
        try:
            self._run_dir.log_evaluation(row, accuracies=evaluation.accuracies)
        except OSError as error:
            self._sinks.disk.note(
                self._run_dir.evaluations.name,
                disk_fault(error) or str(error),
                consequence="the result of this evaluation is only in this output",
            )
        self._sinks.evaluation(row)
        place = "" if engine == "all" else f", {engine}, {wall_s:.1f} s"
        self._sinks.say(
            f"{name} of version {version}: accuracy {evaluation.accuracy:.3f}, "
            f"length {evaluation.mean_response_tokens:.1f}, "
            f"{evaluation.num_prompts} held-out prompts, {self._config.evaluation.how}{place}"
        )
