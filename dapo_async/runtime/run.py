"""One run from start to end: connect to Ray, start the actors, evaluate, train, evaluate, end.

The command `train` calls `run_training`. Whatever ends the run, it ends in order, and
`summary.json` has the status and the reason.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any, NoReturn

import psutil

from dapo_async.config import STOP_S, Config
from dapo_async.evaluate import Evaluation
from dapo_async.runtime.cluster.connection import RayConnection
from dapo_async.runtime.cluster.environment import LOCAL
from dapo_async.runtime.cluster.head_watch import NodeGone
from dapo_async.runtime.cluster.reservation import reserve
from dapo_async.runtime.dump import write_dump
from dapo_async.runtime.handles.handle import ActorDied
from dapo_async.runtime.loop import TrainingStopped, train_loop
from dapo_async.runtime.resume import START, ResumePoint
from dapo_async.runtime.run_keeper import LifeSign
from dapo_async.runtime.services import Services, build_services, measured_before
from dapo_async.runtime.shutdown import shut_down
from dapo_async.runtime.signals import Interrupts
from dapo_async.runtime.status import (
    EXIT_FAILED,
    EXIT_WRONG_INPUT,
    RunOutcome,
    Status,
    WrongInput,
)
from dapo_async.runtime.step_metrics import Tracker
from dapo_async.runtime.summary import RunProgress, summarise_run
from dapo_async.tracking.plot import draw_dynamics, import_library
from dapo_async.tracking.run_dir import DUMP_SIGNAL, RunDir
from dapo_async.tracking.sinks import Sinks
from dapo_async.tracking.terminal import Progress
from dapo_async.utils.files import atomic_write, disk_fault
from dapo_async.utils.paths import for_shell
from dapo_async.utils.state_clock import StateClock

RETRY_S = 1.0  # between two tries to write a summary that the disk refused


def run_training(
    config: Config,
    *,
    run_dir: RunDir,
    progress: Progress,
    resume: ResumePoint = START,
    train_data: str,
    heldout_data: str = "",
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """Trains `config` into `run_dir`; returns the exit code of the process.

    `train_data`, `heldout_data`: fingerprints of the prompts, kept for a resume. `prepare` is
    called once Ray runs, and readies the run directory of a resumed run. Raises ValueError for what
    the user has to change, before anything is written.
    """
    sinks = Sinks(config, run_dir, progress)
    run = Run(
        config,
        run_dir,
        sinks,
        resume=resume,
        train_data=train_data,
        heldout_data=heldout_data,
        prepare=prepare,
    )
    outcome = asyncio.run(run.live())
    if outcome.exit_code == EXIT_WRONG_INPUT:
        raise ValueError(outcome.reason)
    return outcome.exit_code


class Run:
    """One incarnation of a run. `services` exists from the start of the actors on."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        sinks: Sinks,
        *,
        resume: ResumePoint,
        train_data: str,
        heldout_data: str,
        prepare: Callable[[], None] = lambda: None,
        ray: RayConnection | None = None,
        draw: Callable[[RunDir], bool] = draw_dynamics,
    ) -> None:
        self._config, self._run_dir, self._sinks = config, run_dir, sinks
        self._resume, self._before = resume, measured_before(resume)
        self._train_data, self._heldout_data = train_data, heldout_data
        self._incarnation = secrets.token_hex(4)
        self._clock = StateClock("driver")
        self._began_s = self._clock.now_s()
        self._ray, self._draw = ray or RayConnection(config), draw
        self._prepare = prepare
        self._is_ending = False  # whatever comes now, the outcome is known
        self._interrupts = Interrupts(
            sinks.say, self._note, self._end_at_once, is_ending=lambda: self._is_ending
        )
        self._life_sign = LifeSign()
        self._services: Services | None = None
        self._unwritten_summary: dict[str, Any] | None = None  # the disk refused it
        self._refusal: OSError | None = None
        evaluations = resume.driver.get("evaluations", {})
        self._record = RunProgress(
            evaluations={name: Evaluation.from_json(values) for name, values in evaluations.items()}
        )

    async def live(self) -> RunOutcome:
        """Runs to the end and writes the summary; every failure becomes an outcome."""
        task = asyncio.create_task(self._work())
        self._interrupts.listen(task)
        time_limit = asyncio.create_task(self._watch_time_limit(task))
        self._life_sign.start()
        try:
            await task
        except asyncio.CancelledError:
            if not self._is_ending:
                self._note(signal.SIGINT)  # it came before `listen`
        except WrongInput as error:
            if not self._is_ending:
                await self._close_ray()
                return RunOutcome(Status.FAILED, str(error), EXIT_WRONG_INPUT)
        except Exception as error:  # noqa: BLE001 (every failure becomes an outcome and an orderly end)
            self._fail(error)
        self._is_ending = True
        time_limit.cancel()
        self._clock.enter("stop")
        try:
            if self._services is not None:
                failed = self._record.outcome
                can_answer = not failed.lost_node
                if failed.status is Status.FAILED and can_answer:
                    await self._attempt("a dump", self._dump(failed.reason))
                await shut_down(
                    self._services,
                    self._record.outcome,
                    config=self._config,
                    attempt=self._attempt,
                    write_timeline=self._write_timeline,
                )
        finally:
            # Before the end of Ray: where a signal to the whole process group has ended Ray
            # already, its end may take this process with it.
            self._write_summary()
        outcome = self._record.outcome
        self._note_end()
        if self._services is not None:
            state = "done" if not outcome.is_unfinished else "ended"
            last = self._services.beat.end(state, outcome.reason)
            await self._attempt("the last status", last)
        await asyncio.gather(
            self._close_ray(),
            self._attempt("the picture", asyncio.to_thread(self._draw, self._run_dir)),
        )
        # It may wait STOP_S for MLflow.
        finish = asyncio.to_thread(self._sinks.finish, outcome.status.value, outcome.reason)
        await self._attempt("the end of MLflow's run", finish, within_s=2 * STOP_S)
        self._write_summary()  # again, with what the sinks have caught
        await self._insist_on_summary()
        return outcome

    async def _insist_on_summary(self) -> None:
        """On a full disk: tries for STOP_S, then prints the summary, so that nothing is lost.

        Raises the error of the disk then: a summary that is there is of an earlier start.
        """
        tries = int(STOP_S / RETRY_S)
        while self._unwritten_summary is not None and tries:
            await asyncio.sleep(RETRY_S)
            self._write_summary()
            tries -= 1
        if self._unwritten_summary is not None:
            outcome = self._record.outcome
            self._sinks.say(f"{outcome.status.value}: {outcome.reason}")
            self._sinks.say(f"summary.json: {json.dumps(self._unwritten_summary)}")
            assert self._refusal is not None
            raise self._refusal

    async def _close_ray(self) -> None:
        within_s = 2 * STOP_S  # half of it for a start that goes on
        await self._attempt("the end of Ray", self._ray.close(), within_s=within_s)

    async def _work(self) -> None:
        with self._timed("start_s"):
            try:
                self._sinks.say(await self._ray.open())
                # Again: Ray has replaced the handlers by its own, which print a stack trace.
                task = asyncio.current_task()
                assert task is not None
                self._interrupts.listen(task)
                reservation = await reserve(self._config, say=self._sinks.say)
            except ValueError as error:
                raise WrongInput(str(error)) from error
            self._prepare()
            with suppress(OSError):  # a full disk; only `dapo-async dump` needs it
                self._run_dir.sign()
            asyncio.get_running_loop().add_signal_handler(DUMP_SIGNAL, self._dump_on_request)
            self._services = services = build_services(
                self._config,
                run_dir=self._run_dir,
                sinks=self._sinks,
                clock=self._clock,
                incarnation=self._incarnation,
                resume=self._resume,
                driver_state=self._driver_state,
                reservation=reservation,
            )
            own_ray = self._config.ray.address == LOCAL
            self._sinks.event(
                "start", incarnation=self._incarnation, first_step=self._resume.version
            )
            for info in await services.system.start():
                self._sinks.event(
                    "actor_ready",
                    actor=info.name,
                    pid=info.pid,
                    node=info.node,
                    detail=info.detail,
                )
                node = info.node if own_ray else f"{info.node} (node {info.node_id})"
                self._sinks.say(f"{info.name:<10} pid {info.pid} on {node}  {info.detail}")
            services.beat.start()
            self._sinks.start()
        async with self._life_sign.of_the_loop():
            await services.system.watched(self._train(services))

    async def _train(self, services: Services) -> None:
        system, tracker = services.system, services.tracker
        # Before the first token every engine attests that it serves the learner's weights.
        await system.publisher.publish(await system.first_snapshot(), on_served=_no_credits)
        if "initial" not in self._record.evaluations:
            await self._evaluate("initial", services)
        await tracker.start()
        await system.replay.serve(self._resume.version)
        stopped = await train_loop(
            system,
            tracker,
            services.checkpointer,
            services.evaluations,
            config=self._config,
            first_step=self._resume.version,
        )
        self._clock.enter("wait for publish")
        await system.settle()
        await services.checkpointer.save(deadline_s=self._config.deadlines.work_s)
        if stopped is not None:
            self._record.outcome = (
                RunOutcome(Status.SOLVED, stopped.reason)
                if stopped.solved
                else RunOutcome(Status.FAILED, stopped.reason, EXIT_FAILED, restartable=False)
            )
        await system.replay.close()
        # For the picture, while the driver waits for the evaluation.
        threading.Thread(target=import_library, daemon=True).start()
        await self._evaluate("final", services)

    async def _evaluate(self, name: str, services: Services) -> None:
        if self._config.evaluation.num_prompts == 0:
            return
        with self._timed(f"{name}_evaluation_s"), self._clock.during("evaluate"):
            self._record.evaluations[name] = await services.evaluations.measure_all(name)

    def _driver_state(self, tracker: Tracker) -> dict[str, Any]:
        """What a resumed driver must know of this one."""
        return {
            "incarnation": self._incarnation,
            "wall_s": self._wall_s,
            "totals": asdict(tracker.totals) | {"train_s": tracker.train_s},
            "guards": tracker.guards.state(),
            "evaluations": {
                name: evaluation.to_json() for name, evaluation in self._record.evaluations.items()
            },
            "train_data": self._train_data,
            "heldout_data": self._heldout_data,
        }

    @property
    def _wall_s(self) -> float:
        """Of all incarnations."""
        earlier_s: float = self._resume.driver.get("wall_s", 0.0)
        return earlier_s + self._clock.now_s() - self._began_s

    # How a run ends.

    def _fail(self, error: Exception) -> None:
        self._record.caught[type(error).__name__] += 1
        hangs = isinstance(error, TimeoutError)
        lost_actor = error.actor if isinstance(error, ActorDied) else None
        lost_node = isinstance(error, NodeGone)
        if self._is_ending:  # a signal or the time limit came first
            self._record.outcome = replace(
                self._record.outcome, lost_actor=lost_actor, lost_node=lost_node, hangs=hangs
            )
            return
        reason = " ".join(str(error).split()) or repr(error)
        if (why := disk_fault(error)) is not None:
            told = "" if why in reason.lower() else f": {why}"
            reason = (
                f"{reason.rstrip('.;')}{told}; free some space on the disk of "
                f"{self._run_dir.root}, and continue with "
                f"dapo-async train --resume {for_shell(self._run_dir.root)}"
            )
        if hangs and self._services is not None:
            reason += self._services.system.unserved()
        if lost_actor is not None and self._services is not None:
            process = self._services.system.supervisor.processes.get(lost_actor)
            reason += f" (pid {process.pid} on {process.node})" if process is not None else ""
        self._record.outcome = RunOutcome(
            Status.FAILED,
            reason,
            EXIT_FAILED,
            lost_actor=lost_actor,
            lost_node=lost_node,
            hangs=hangs,
            restartable=not isinstance(error, TrainingStopped),
        )
        trace = "".join(traceback.format_exception(error))
        try:
            atomic_write(self._run_dir.error, trace)
        except OSError as refused:  # the reason is in the summary and on the terminal
            consequence = "the run ends without the traceback"
            self._sinks.disk.note("error.txt", disk_fault(refused), consequence=consequence)

    def _dump_on_request(self) -> None:
        dump = self._attempt("a dump", self._dump(f"{DUMP_SIGNAL.name} received"))
        self._dumping = asyncio.create_task(dump)  # kept, so that it is not collected

    async def _dump(self, why: str) -> None:
        """Writes what every actor does now."""
        if self._services is None:
            return
        path = await write_dump(self._services.system, self._run_dir, self._clock, why=why)
        self._sinks.say(f"dump: {path}")

    def _note(self, number: signal.Signals) -> None:
        """Writes the summary before the running step has ended: the process may be killed before
        the end of the run, `ray job stop` leaves three seconds."""
        self._is_ending = True
        self._record.outcome = RunOutcome(
            Status.INTERRUPTED, f"{number.name} received", 128 + number
        )
        self._write_summary()

    def _end_at_once(self, number: signal.Signals) -> NoReturn:
        """Ends the process. The reaper ends what is left of an own Ray; a cluster ends the actors
        of a driver that is gone."""
        self._record.outcome = outcome = RunOutcome(
            Status.INTERRUPTED,
            f"{number.name} received while the run was ending: "
            "the steps after its newest checkpoint are lost",
            128 + number,
        )
        try:
            self._ray.watch_orphans()
            self._write_summary()
            self._note_end()
            self._sinks.say(
                f"{number.name} again: ended at once; "
                f"continue with dapo-async train --resume {for_shell(self._run_dir.root)}"
            )
        finally:
            os._exit(outcome.exit_code)

    def _note_end(self) -> None:
        outcome = self._record.outcome
        self._sinks.event(
            "end",
            status=outcome.status.value,
            reason=outcome.reason,
            exit_code=outcome.exit_code,
            lost_actor=outcome.lost_actor,
        )

    async def _watch_time_limit(self, task: asyncio.Task[None]) -> None:
        """Ends `task` so early that one more step, a checkpoint and an orderly end still fit into
        `train.max_wall_s`."""
        limit_s, began_s = self._config.train.max_wall_s, psutil.Process().create_time()
        if limit_s is None:
            return
        end_s = limit_s - STOP_S
        while time.time() - began_s + self._longest_step_s < end_s:
            await asyncio.sleep(0.2)
        if self._is_ending:
            return
        self._is_ending = True
        self._record.outcome = RunOutcome(
            Status.OUT_OF_TIME,
            f"train.max_wall_s ({limit_s:g}) would have passed within the next step; "
            f"continue with dapo-async train --resume {for_shell(self._run_dir.root)}",
        )
        task.cancel()

    @property
    def _longest_step_s(self) -> float:
        return self._services.longest_step_s if self._services is not None else 0.0

    async def _write_timeline(self) -> None:
        assert self._services is not None
        timeline = self._services.tracker.timeline
        timeline.add("driver", self._clock.take_spans())
        timeline.close()

    def _write_summary(self) -> None:
        measured = self._services.measured() if self._services is not None else self._before
        summary = summarise_run(
            self._record,
            measured,
            config=self._config,
            run_dir=self._run_dir,
            incarnation=self._incarnation,
            resume=self._resume,
            wall_s=self._wall_s,
            mlflow_run_id=self._sinks.mlflow_run_id,
            caught=self._sinks.caught,
            bottleneck=self._sinks.bottleneck,
            faults=self._sinks.faults,
            split=self._sinks.split,
        )
        self._unwritten_summary = summary
        try:
            self._run_dir.write_summary(summary)
        except OSError as error:
            self._refusal = error
            consequence = "it is kept in memory, and written as soon as there is space"
            self._sinks.disk.note(
                "summary.json", disk_fault(error) or str(error), consequence=consequence
            )
        else:
            self._unwritten_summary = None

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began_s = self._clock.now_s()
        try:
            yield
        finally:
            self._record.seconds[name] = self._clock.now_s() - began_s

    async def _attempt(
        self, what: str, awaitable: Awaitable[object], *, within_s: float = STOP_S
    ) -> None:
        """See `shutdown.Attempt`."""
        try:
            await asyncio.wait_for(awaitable, within_s)
        except Exception as error:  # noqa: BLE001 (the end goes on without what can't be had, and says so)
            self._record.caught[what] += 1
            reason = " ".join(str(error).split()) or repr(error)
            self._sinks.say(f"the run ends without {what}: {reason}")


async def _no_credits(version: int) -> None:
    """For the first publish, which no group has trained."""
