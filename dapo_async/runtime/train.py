"""The life of a run: connect, start, publish, evaluate, train, evaluate, and an orderly end whatever happened, with a summary of every exit."""

from __future__ import annotations

import asyncio
import secrets
import signal
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dapo_async.clock import StateClock
from dapo_async.config import Config
from dapo_async.evaluate import Evaluation
from dapo_async.replay import Counts
from dapo_async.runtime.cluster import connect, disconnect
from dapo_async.runtime.environment import LOCAL
from dapo_async.runtime.loop import train_loop
from dapo_async.runtime.reaper import Reaper
from dapo_async.runtime.remote import ActorDied
from dapo_async.runtime.system import System
from dapo_async.runtime.tracker import Totals, Tracker
from dapo_async.tracking.picture import draw_dynamics
from dapo_async.tracking.run_dir import RunDir

EXIT_WRONG_INPUT = 2


class WrongInput(Exception):
    """What the user has to change is found out only with the cluster at hand: exit code 2."""


class Status(StrEnum):
    DONE = "done"
    SOLVED = "solved"  # every recent group was all correct: nothing is left to learn
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(slots=True)
class Ending:
    """How a run ended; `exit_code` is that of the process."""

    status: Status = Status.DONE
    reason: str = "all steps trained"
    exit_code: int = 0


@dataclass(slots=True)
class Run:
    """One run from connecting to the summary."""

    config: Config
    run_dir: RunDir
    say: Callable[[str], None]
    incarnation: str = field(default_factory=lambda: secrets.token_hex(4))
    clock: StateClock = field(default_factory=lambda: StateClock("driver"))
    ending: Ending = field(default_factory=Ending)
    seconds: dict[str, float] = field(default_factory=dict)  # start_s, initial_evaluation_s, …
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    caught: Counter[str] = field(default_factory=Counter)  # errors of the end that did not stop it
    lost: str | None = None  # the actor whose death ended the run
    system: System | None = None
    tracker: Tracker | None = None
    interrupted_by: signal.Signals | None = None
    # Ray's thread lives as long as the run: Ray's processes die with the thread that started them. Not the loop's own executor, which would be
    # waited for without end when Ray's start hangs.
    ray_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="ray"))
    connecting: asyncio.Future[None] | None = None
    reaper: Reaper | None = None  # of an own Ray

    async def live(self) -> int:
        """Runs to the end and writes the summary; the supervisor of law 8. Returns the exit code."""
        began_s = self.clock.now_s()
        task = asyncio.create_task(self._work())
        self._listen(task)
        try:
            await task
        except asyncio.CancelledError:
            number = self.interrupted_by or signal.SIGINT
            self.ending = Ending(Status.INTERRUPTED, f"{number.name} received", 128 + number)
        except Exception as error:  # noqa: BLE001 (the supervisor: every failure becomes a status, a reason and an orderly end)
            self.caught[type(error).__name__] += 1
            self.lost = error.actor if isinstance(error, ActorDied) else None
            reason = (" ".join(str(error).split()) or repr(error)) + (self._unpublished() if isinstance(error, TimeoutError) else "")
            self.ending = Ending(Status.FAILED, reason, EXIT_WRONG_INPUT if isinstance(error, WrongInput) else 1)
            self.run_dir.error.write_text("".join(traceback.format_exception(error)))
        self.clock.enter("stop")
        try:
            await self._end()
        finally:
            # Before Ray's end, which may take this process with it when a signal to the whole process group has ended Ray already.
            self.run_dir.write_summary(self._summary(self.clock.now_s() - began_s))
        await self._disconnect()
        await asyncio.to_thread(draw_dynamics, self.run_dir.metrics, self.run_dir.root / "dynamics.png")
        return self.ending.exit_code

    def _listen(self, task: asyncio.Task[None]) -> None:
        """SIGINT and SIGTERM end `task`, and with it the run, in order."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._interrupt, task, number)

    def _interrupt(self, task: asyncio.Task[None], number: signal.Signals) -> None:
        self.interrupted_by = number
        self.say(f"{number.name}: ending with a checkpoint")
        task.cancel()

    def _unpublished(self) -> str:
        """Whom a publish still waits for when a deadline passes: a worker that hangs holds up a take by the credits of that publish."""
        publish = self.system.publisher.in_flight if self.system else None
        if self.system is None or publish is None or publish.done():
            return ""
        return f"; {publish.get_name()} still waited for {', '.join(worker.name for worker in self.system.workers)}"

    async def _work(self) -> None:
        with self._timed("start_s"):
            await self._connect()
            # Once more: Ray's own handler, which prints a stack trace, has come before ours.
            task = asyncio.current_task()
            assert task is not None
            self._listen(task)
            self.system = System(self.config, self.run_dir, incarnation=self.incarnation)
            train = self.config.train
            staleness = self.config.replay.max_staleness
            self.tracker = Tracker(self.system, self.run_dir, self.clock, num_steps=train.num_steps, max_staleness=staleness, say=self.say)
            for info in await self.system.start():
                self.say(f"{info.name:<10} pid {info.pid} on {info.node}  {info.detail}")
        await self.system.watched(self._train(self.system, self.tracker))

    async def _connect(self) -> None:
        if self.config.ray.address == LOCAL:
            self.reaper = Reaper()
        try:
            async with asyncio.timeout(self.config.deadlines.start_s):
                self.connecting = asyncio.get_running_loop().run_in_executor(self.ray_thread, connect, self.config)
                await asyncio.shield(self.connecting)
            if self.reaper is not None:
                self.reaper.watch()
        except ValueError as error:
            raise WrongInput(str(error)) from error
        except TimeoutError as error:
            raise TimeoutError(f"the driver waited {self.config.deadlines.start_s:g} s for Ray to start") from error

    async def _disconnect(self) -> None:
        """Ends Ray. A start that was interrupted goes to its end first, for half a Ray can't be shut down; one that hangs is left alone."""
        if self.connecting is None:
            return
        started, _ = await asyncio.wait([self.connecting], timeout=self.config.deadlines.stop_s)
        if started:
            await asyncio.get_running_loop().run_in_executor(self.ray_thread, disconnect)
        if self.reaper is not None:
            self.reaper.dismiss()

    async def _train(self, system: System, tracker: Tracker) -> None:
        # Before the first token every engine proves that it serves the learner's weights.
        await system.publisher.publish(await system.learner.snapshot(), on_served=_nobody)
        await self._evaluate("initial")
        await tracker.start()
        await system.replay.serve(0)
        verdict = await train_loop(system, tracker, config=self.config, run_dir=self.run_dir)
        self.clock.enter("wait for publish")
        await system.settle()
        await system.learner.save(self.run_dir.checkpoints)
        if verdict is not None:
            self.ending = Ending(Status.SOLVED, verdict.reason) if verdict.solved else Ending(Status.FAILED, verdict.reason, 1)
        await system.replay.close()
        await self._evaluate("final")

    async def _evaluate(self, name: str) -> None:
        if self.config.evaluation.num_prompts == 0:
            return
        assert self.system is not None
        with self._timed(f"{name}_evaluation_s"), self.clock.during("evaluate"):
            evaluation = self.evaluations[name] = await self.system.evaluate()
        (version,) = evaluation.weight_versions  # one model was measured, or this is no evaluation
        self.say(
            f"{name} evaluation of version {version}: accuracy {evaluation.accuracy:.3f}, "
            f"length {evaluation.mean_response_tokens:.1f}, {evaluation.num_prompts} held-out prompts, greedy"
        )

    async def _end(self) -> None:
        """Checkpoint, last reports, timeline, then the end of every actor; what can't be had any more is counted and left out."""
        deadline_s = self.config.deadlines.stop_s
        if self.system is not None and self.tracker is not None:
            if self.ending.status in (Status.FAILED, Status.INTERRUPTED):
                # The newest snapshot: at most the step in progress is lost.
                await self._attempt("a last checkpoint", self.system.learner.save(self.run_dir.checkpoints, deadline_s=deadline_s))
            if self.lost is not None:
                await self._attempt("the lost groups", self.system.replay.lose_worker(self.lost))
            await self._attempt("the last counts", self.system.replay.close())
            await self._attempt("the last reports", self.tracker.collect(deadline_s=0.8 * deadline_s))
            await self._attempt("the timeline", self._write_timeline(self.tracker))
            self.system.kill()

    async def _write_timeline(self, tracker: Tracker) -> None:
        tracker.timeline.add("driver", self.clock.take_spans())
        tracker.timeline.write(self.run_dir.root / "timeline.json")

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began_s = self.clock.now_s()
        try:
            yield
        finally:
            self.seconds[name] = self.clock.now_s() - began_s

    async def _attempt(self, what: str, awaitable: Awaitable[Any]) -> None:
        try:
            await asyncio.wait_for(awaitable, self.config.deadlines.stop_s)
        except Exception as error:  # noqa: BLE001 (an orderly end goes on without what can't be had any more, and says so)
            self.caught[what] += 1
            self.say(f"the run ends without {what}: {' '.join(str(error).split()) or repr(error)}")

    def _summary(self, wall_s: float) -> dict[str, Any]:
        """The fixed points of `summary.json`; 0 or null for what the run never came to."""
        tracker, evaluations = self.tracker, self.evaluations
        totals = tracker.totals if tracker else Totals()
        counts = (tracker.replay.counts if tracker and tracker.replay else Counts(0)).flat()
        rejected = {name.removeprefix("rejected."): count for name, count in counts.items() if name.startswith("rejected.")}
        saved = sorted(self.run_dir.checkpoints.glob("step_*[0-9]"))
        published = self.system.publisher if self.system else None
        return {
            "status": self.ending.status.value,
            "reason": self.ending.reason,
            **{f"{name}_accuracy": evaluations[name].accuracy if name in evaluations else None for name in ("initial", "final")},
            **{f"{name}_response_tokens": evaluations[name].mean_response_tokens if name in evaluations else None for name in ("initial", "final")},
            "wall_s": wall_s,
            "train_s": tracker.train_s if tracker else 0.0,
            **self.seconds,
            "steps": totals.steps,
            "tokens": int(totals.tokens),
            "staleness": {
                "mean": totals.staleness_sum / totals.staleness_tokens if totals.staleness_tokens else 0.0,
                "max": totals.staleness_max,
            },
            "groups": {name: count for name, count in counts.items() if not name.startswith("rejected.")} | {"rejected": rejected},
            "idle": tracker.idle if tracker else {"rollout": 0.0, "learner": 0.0},
            "weight_versions": published.num_served if published else 0,
            "handshake": dict(published.outcomes) if published else {},
            "checkpoint": str(saved[-1] if saved else self.config.model.path),
            "seconds_by_state": {actor: tracker.timeline.totals(actor) for actor in tracker.timeline.spans} if tracker else {},
            "caught": dict(self.caught),
            "failures": dict(tracker.replay.failures) if tracker and tracker.replay else {},
            "seed": self.config.seed,
            "incarnation": self.incarnation,
            "run_dir": str(self.run_dir.root),
        }


async def _nobody(version: int) -> None:
    """The first publish: there is no group whose credit could return."""


def train(config: Config, *, run_dir: RunDir, say: Callable[[str], None]) -> int:
    """Trains `config` into `run_dir`; returns the process's exit code. Raises ValueError for what the user has to change."""
    run = Run(config, run_dir, say)
    code = asyncio.run(run.live())
    if code == EXIT_WRONG_INPUT:
        raise ValueError(run.ending.reason)
    return code
