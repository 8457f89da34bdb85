"""The life of a run: connect, start, publish, evaluate, train, evaluate, and an orderly end whatever happened, with a summary of every exit."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import psutil

from dapo_async.config import Config
from dapo_async.evaluate import Evaluation
from dapo_async.runtime.checkpointer import Checkpointer
from dapo_async.runtime.cluster.connect import connect, disconnect
from dapo_async.runtime.cluster.environment import LOCAL
from dapo_async.runtime.cluster.orphan_reaper import Reaper
from dapo_async.runtime.evaluations import Evaluations
from dapo_async.runtime.handles.handle import ActorDied
from dapo_async.runtime.launch import start_actors
from dapo_async.runtime.loop import train_loop
from dapo_async.runtime.resume import START, ResumePoint
from dapo_async.runtime.signals import Interrupts
from dapo_async.runtime.status import EXIT_WRONG_INPUT, RunOutcome, Status, WrongInput
from dapo_async.runtime.step_metrics import Totals, Tracker
from dapo_async.runtime.summary import summarise_run
from dapo_async.runtime.system import System
from dapo_async.tracking.plot import draw_dynamics
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.sinks import Sinks
from dapo_async.tracking.terminal import Progress
from dapo_async.utils.state_clock import StateClock


@dataclass(slots=True)
class Run:
    """One run from connecting to the summary."""

    config: Config
    run_dir: RunDir
    sinks: Sinks
    resume: ResumePoint = START
    incarnation: str = field(default_factory=lambda: secrets.token_hex(4))
    clock: StateClock = field(default_factory=lambda: StateClock("driver"))
    ending: RunOutcome = field(default_factory=RunOutcome)
    seconds: dict[str, float] = field(default_factory=dict)  # start_s, initial_evaluation_s, …
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    train_data: str = ""  # fingerprint of the training prompts
    began_s: float = 0.0
    caught: Counter[str] = field(default_factory=Counter)  # errors of the end that did not stop it
    lost: str | None = None  # the actor whose death ended the run
    system: System | None = None
    tracker: Tracker | None = None
    checkpointer: Checkpointer | None = None
    held_out: Evaluations | None = None
    out_of_time: bool = False
    hangs: bool = False  # what ended the run is a passed deadline
    interrupts: Interrupts = field(init=False)
    # Ray's thread lives as long as the run: Ray's processes die with the thread that started them. Not the loop's own executor, which would be
    # waited for without end when Ray's start hangs.
    ray_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="ray")
    )
    connecting: asyncio.Future[str] | None = None
    reaper: Reaper | None = None  # of an own Ray

    def __post_init__(self) -> None:
        self.interrupts = Interrupts(self.say, self._note, self._end_at_once)

    @property
    def say(self) -> Callable[[str], None]:
        return self.sinks.say

    async def live(self) -> int:
        """Runs to the end and writes the summary; the supervisor of law 8. Returns the exit code."""
        self.began_s = self.clock.now_s()
        task = asyncio.create_task(self._work())
        self.interrupts.listen(task)
        wall = asyncio.create_task(self._watch_wall(task))
        try:
            await task
        except asyncio.CancelledError:
            if self.out_of_time:
                limit = f"train.max_wall_s ({self.config.train.max_wall_s:g}) would have passed within the next step"
                self.ending = RunOutcome(
                    Status.OUT_OF_TIME,
                    f"{limit}; go on with dapo-async train --resume {self.run_dir.root}",
                )
            elif self.interrupts.first is None:  # before the signals were listened for
                self._note(signal.SIGINT)
        except Exception as error:  # noqa: BLE001 (the supervisor: every failure becomes a status, a reason and an orderly end)
            self.caught[type(error).__name__] += 1
            self.lost, self.hangs = (
                error.actor if isinstance(error, ActorDied) else None,
                isinstance(error, TimeoutError),
            )
            reason = (" ".join(str(error).split()) or repr(error)) + (
                self._unpublished() if isinstance(error, TimeoutError) else ""
            )
            self.ending = RunOutcome(
                Status.FAILED, reason, EXIT_WRONG_INPUT if isinstance(error, WrongInput) else 1
            )
            self.run_dir.error.write_text("".join(traceback.format_exception(error)))
        wall.cancel()
        self.clock.enter("stop")
        try:
            await self._end()
        finally:
            # Before Ray's end, which may take this process with it when a signal to the whole process group has ended Ray already.
            self._write_summary()
        await asyncio.gather(self._disconnect(), asyncio.to_thread(draw_dynamics, self.run_dir))
        await asyncio.to_thread(self.sinks.finish, self.ending.status.value, self.ending.reason)
        self._write_summary()  # once more, with what tracking has come to
        return self.ending.exit_code

    def _note(self, number: signal.Signals) -> None:
        """At once, before the step that runs is waited for: whoever interrupts may kill before the end, `ray job stop` leaves three seconds."""
        self.ending = RunOutcome(Status.INTERRUPTED, f"{number.name} received", 128 + number)
        self._write_summary()

    def _end_at_once(self, number: signal.Signals) -> NoReturn:
        """Ends the process. What remains of an own Ray is the reaper's; a cluster ends its actors with the driver that they belong to."""
        self.ending = RunOutcome(
            Status.INTERRUPTED,
            f"{number.name} received while the run was ending: what its newest checkpoint lacks is lost",
            128 + number,
        )
        try:
            if self.reaper is not None:
                self.reaper.watch()
            self._write_summary()
            self.say(
                f"{number.name} again: ended at once; go on with  dapo-async train --resume {self.run_dir.root}"
            )
        finally:
            os._exit(self.ending.exit_code)

    def _write_summary(self) -> None:
        self.run_dir.write_summary(summarise_run(self, self.clock.now_s() - self.began_s))

    async def _watch_wall(self, task: asyncio.Task[None]) -> None:
        """Ends `task` so early that one more step, a checkpoint and an orderly end still fit into `train.max_wall_s`."""
        limit_s, began_s = self.config.train.max_wall_s, psutil.Process().create_time()
        while limit_s is not None and not self.out_of_time:
            await asyncio.sleep(0.2)
            longest_s = self.tracker.longest_step_s if self.tracker else 0.0
            longest_s += self.checkpointer.longest_write_s if self.checkpointer else 0.0
            if time.time() - began_s + longest_s + self.config.deadlines.stop_s >= limit_s:
                self.out_of_time = True
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
            self.interrupts.listen(task)
            self.system = System(
                self.config,
                start_actors(
                    self.config,
                    self.run_dir,
                    incarnation=self.incarnation,
                    resume=self.resume.state,
                ),
                say=self.say,
            )
            self.tracker = Tracker(
                self.system,
                self.run_dir,
                self.clock,
                show=self.sinks.step,
                totals=Totals(**self.resume.driver.get("totals", {})),
                first_step=self.resume.version,
            )
            self.held_out = held_out = Evaluations(
                self.config, system=self.system, run_dir=self.run_dir, sinks=self.sinks
            )
            self.checkpointer = Checkpointer(
                self.config,
                system=self.system,
                tracker=self.tracker,
                run_dir=self.run_dir,
                driver_state=self._driver_state,
                in_evaluation=lambda: held_out.in_flight,
            )
            for info in await self.system.start():
                node = (
                    info.node
                    if self.config.ray.address == LOCAL
                    else f"{info.node} (node {info.node_id})"
                )
                self.say(f"{info.name:<10} pid {info.pid} on {node}  {info.detail}")
            self.sinks.start()
        await self.system.watched(self._train(self.system, self.tracker))

    async def _connect(self) -> None:
        if self.config.ray.address == LOCAL:
            self.reaper = Reaper()
        try:
            async with asyncio.timeout(self.config.deadlines.start_s):
                self.connecting = asyncio.get_running_loop().run_in_executor(
                    self.ray_thread, connect, self.config
                )
                self.say(await asyncio.shield(self.connecting))
            if self.reaper is not None:
                self.reaper.watch()
        except ValueError as error:
            raise WrongInput(str(error)) from error
        except TimeoutError as error:
            raise TimeoutError(
                f"the driver waited {self.config.deadlines.start_s:g} s for Ray to start"
            ) from error

    async def _disconnect(self) -> None:
        """Ends Ray. A start that was interrupted goes to its end first, for half a Ray can't be shut down; one that hangs is left alone."""
        if self.connecting is None:
            return
        started, _ = await asyncio.wait([self.connecting], timeout=self.config.deadlines.stop_s)
        if started:
            with self.reaper.hasten() if self.reaper is not None else nullcontext():
                await asyncio.get_running_loop().run_in_executor(self.ray_thread, disconnect)
        if self.reaper is not None:
            self.reaper.dismiss()

    async def _train(self, system: System, tracker: Tracker) -> None:
        # Before the first token every engine proves that it serves the learner's weights.
        first_step = self.resume.version
        await system.publisher.publish(await system.learner.snapshot(), on_served=_nobody)
        if "initial" not in self.evaluations:
            await self._evaluate("initial")
        await tracker.start()
        await system.replay.serve(first_step)
        assert self.checkpointer is not None
        assert self.held_out is not None
        verdict = await train_loop(
            system,
            tracker,
            self.checkpointer,
            self.held_out,
            config=self.config,
            first_step=first_step,
        )
        self.clock.enter("wait for publish")
        await system.settle()
        await self.checkpointer.save(deadline_s=self.config.deadlines.work_s)
        if verdict is not None:
            self.ending = (
                RunOutcome(Status.SOLVED, verdict.reason)
                if verdict.solved
                else RunOutcome(Status.FAILED, verdict.reason, 1)
            )
        await system.replay.close()
        await self._evaluate("final")

    async def _evaluate(self, name: str) -> None:
        if self.config.evaluation.num_prompts == 0:
            return
        assert self.held_out is not None
        with self._timed(f"{name}_evaluation_s"), self.clock.during("evaluate"):
            self.evaluations[name] = await self.held_out.measure_all(name)

    async def _end(self) -> None:
        """Checkpoint, last reports, timeline, then the end of every actor; what can't be had any more is counted and left out."""
        deadline_s = self.config.deadlines.stop_s
        # Where nothing is known to hang: whoever has no time for a checkpoint interrupts once more.
        save_s = deadline_s if self.hangs else max(deadline_s, self.config.deadlines.work_s)
        if self.system is not None and self.tracker is not None:
            if self.ending.status in (Status.FAILED, Status.INTERRUPTED, Status.OUT_OF_TIME):
                await self._attempt("the last rows of metrics", self.tracker.flush(deadline_s=1.0))
                # Of the newest step: at most what was generated since is lost. Without learner or replay room the newest periodic one has to do.
                if (
                    self.checkpointer is not None
                    and self.lost != "replay"
                    and not (self.lost or "").startswith("learner")
                ):
                    await self._attempt(
                        "a last checkpoint",
                        self.checkpointer.save(deadline_s=save_s),
                        within_s=save_s,
                    )
            if self.lost is not None:
                await self._attempt("the lost groups", self.system.replay.lose_worker(self.lost))
            await self._attempt("the last counts", self.system.replay.close())
            if self.system.started:
                await self._attempt(
                    "the last reports", self.tracker.collect(deadline_s=0.8 * deadline_s)
                )
            if self.held_out is not None and self.lost != "evaluator":
                await self._attempt(
                    "the evaluator's spans",
                    self.held_out.collect(self.tracker.timeline, deadline_s=0.8 * deadline_s),
                )
            await self._attempt("the timeline", self._write_timeline(self.tracker))
            self.system.kill()
            if self.held_out is not None:
                self.held_out.clear()

    async def _write_timeline(self, tracker: Tracker) -> None:
        tracker.timeline.add("driver", self.clock.take_spans())
        tracker.timeline.write(self.run_dir.timeline)

    def _driver_state(self) -> dict[str, Any]:
        """What a resumed run has to know of this one besides learner and replay room."""
        assert self.tracker is not None
        return {
            "incarnation": self.incarnation,
            "wall_s": self.resume.driver.get("wall_s", 0.0) + self.clock.now_s() - self.began_s,
            "totals": asdict(self.tracker.totals) | {"train_s": self.tracker.train_s},
            "evaluations": {
                name: evaluation.to_json() for name, evaluation in self.evaluations.items()
            },
            "train_data": self.train_data,
        }

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began_s = self.clock.now_s()
        try:
            yield
        finally:
            self.seconds[name] = self.clock.now_s() - began_s

    async def _attempt(
        self, what: str, awaitable: Awaitable[Any], *, within_s: float | None = None
    ) -> None:
        try:
            await asyncio.wait_for(awaitable, within_s or self.config.deadlines.stop_s)
        except Exception as error:  # noqa: BLE001 (an orderly end goes on without what can't be had any more, and says so)
            self.caught[what] += 1
            self.say(f"the run ends without {what}: {' '.join(str(error).split()) or repr(error)}")


async def _nobody(version: int) -> None:
    """The first publish: there is no group whose credit could return."""


def train(
    config: Config,
    *,
    run_dir: RunDir,
    progress: Progress,
    resume: ResumePoint = START,
    train_data: str,
) -> int:
    """Trains `config` into `run_dir`; returns the process's exit code. Raises ValueError for what the user has to change.

    `train_data`: fingerprint of the training prompts, kept for a resume.
    """
    run = Run(config, run_dir, Sinks(config, run_dir, progress), resume, train_data=train_data)
    run.evaluations |= {
        name: Evaluation.from_json(values)
        for name, values in resume.driver.get("evaluations", {}).items()
    }
    code = asyncio.run(run.live())
    if code == EXIT_WRONG_INPUT:
        raise ValueError(run.ending.reason)
    return code
