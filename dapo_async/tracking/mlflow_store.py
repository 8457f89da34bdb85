"""Sends a run to MLflow from one daemon thread with a bounded queue, so that training never waits.

In: rows from the driver, in order. Out: calls of `mlflow_run.MlflowRun`. A store that does not
answer is tried again every `RETRY_S`; one that can't be used is given up, see `mlflow_faults`.
Errors are counted in `caught`, and the first one is printed: the run directory has everything
anyway.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from dapo_async.config import Config, redacted
from dapo_async.tracking.metric_names import finite_numbers, parameters_of
from dapo_async.tracking.mlflow_faults import Course, fault_of
from dapo_async.tracking.mlflow_run import (
    NOTE,
    SOURCE,
    SOURCE_TYPE,
    Description,
    MlflowRun,
    prepare_environment,
    store_uri,
)
from dapo_async.tracking.next_split import split_line
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.verdict import verdict
from dapo_async.utils.files import atomic_write
from dapo_async.utils.paths import for_shell

EXPERIMENT = "dapo-async"  # unless MLflow's own variable MLFLOW_EXPERIMENT_NAME names another
RETRY_S = 15.0
MAX_WAITING = 10_000  # calls in the queue; further rows are only in the run directory
NUM_ROLLOUT_FILES = 10  # of rollouts/, at even intervals along the run
NEWEST_ROLLOUT_FILES = 3  # of rollouts/, at the end of the run
CLOSED = {"failed": "FAILED", "interrupted": "KILLED"}  # by the run's status, else FINISHED

CAN_NOT = {
    Course.RETRY: "does not answer and is tried again",
    Course.SKIP: "refuses a request",
    Course.STOP: "can't be used and gets nothing more",
}

Call = Callable[[MlflowRun], None]


class MlflowStore:
    """The MLflow side of one run: `start`, then rows, then `finish`.

    No method raises or waits for MLflow, except that `finish` waits up to its deadline.
    """

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        *,
        say: Callable[[str], None],
        run_id: str | None = None,
        open_run: Callable[[Description, str | None], MlflowRun] = MlflowRun,
        retry_s: float = RETRY_S,
    ) -> None:
        """`run_id`: the MLflow run to continue, if the store still has it."""
        prepare_environment()
        self.run_id: str | None = None  # known when the store has answered
        self.caught: Counter[str] = Counter()
        self._config, self._run_dir, self._say = config, run_dir, say
        self._open_run, self._retry_s = open_run, retry_s
        self._description = describe(config, run_dir)
        self._store = redacted(config.tracking.mlflow)
        self._every = max(1, config.train.num_steps // NUM_ROLLOUT_FILES)
        self._known_run_id = run_id
        self._run: MlflowRun | None = None
        self._queue: SimpleQueue[Call | None] = SimpleQueue()  # None: the end
        self._ending, self._told = Event(), set[Course | None]()
        self._given_up = False
        self._thread = Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        """Opens the MLflow run in the background. Importing MLflow takes seconds of a core."""
        self._queue.put(partial(_add_files, paths=[self._run_dir.config]))
        self._thread.start()

    def log_step(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl, at its `version`: steps count from 1 in MLflow.

        Every tenth of the run the rollouts of the step are sent, too.
        """
        self._log(int(row["version"]), finite_numbers(row))
        step = int(row["step"])
        if step % self._every == 0:
            path = self._run_dir.rollouts / f"step_{step:06d}.jsonl"
            self._put(partial(_add_files, paths=[path], folder="rollouts"))

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """One evaluation: its numbers as `evaluation/NAME`, at the weight version it measured."""
        self._log(int(row["version"]), finite_numbers(row, prefix="evaluation."))

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._put(partial(_log, step=step, values=values, time_ms=int(time.time() * 1000)))

    def finish(self, status: str, reason: str, *, deadline_s: float) -> None:
        """Sends the artifacts and closes the MLflow run.

        Returns after at most `deadline_s`; whatever is not sent by then is given up.
        """
        if self._thread.ident is None:  # the run ended before its actors had started
            self.start()
        run_dir = self._run_dir
        newest = sorted(run_dir.rollouts.glob("step_*.jsonl"))[-NEWEST_ROLLOUT_FILES:]
        self._queue.put(partial(_add_files, paths=newest, folder="rollouts"))
        files = [run_dir.config, run_dir.summary, run_dir.picture, run_dir.error]
        self._queue.put(partial(_add_files, paths=files))
        summary = json.loads(run_dir.summary.read_text()) if run_dir.summary.exists() else {}
        tags = {
            "status": status,
            "reason": redacted(reason),
            "bottleneck": str(summary.get("bottleneck") or "not measured"),
            "faults": "; ".join(map(str, summary.get("faults") or ())) or "none",
            "split": split_line(summary.get("split")) or "not measured",
            NOTE: redacted(note(self._config, run_dir, said=verdict(summary, []))),
        }
        self._queue.put(partial(_close, status=status, tags=tags))
        self._queue.put(None)
        self._ending.set()
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            why = f"has not taken everything within {deadline_s:g} s"
            self._report("late", why)

    def _put(self, call: Call) -> None:
        if self._given_up:
            return
        if self._queue.qsize() < MAX_WAITING:
            self._queue.put(call)
        else:
            self._report("queue full", f"has {MAX_WAITING} calls waiting")

    def _work(self) -> None:
        """The thread's loop: each call is repeated until it is done or refused."""
        last_attempt = False
        while (call := self._queue.get()) is not None:
            while not self._attempt(call):
                if self._given_up:
                    return
                # At the end of the run a store that answered before gets one last attempt.
                if self._ending.wait(self._retry_s):
                    if last_attempt or self._run is None:
                        return
                    last_attempt = True

    def _attempt(self, call: Call) -> bool:
        """Returns False when the store did not answer and `call` has to be repeated."""
        try:
            call(self._run or self._open())
        except Exception as error:  # noqa: BLE001 (a store, its driver or the network may raise anything)
            why = " ".join(str(error).split())[:300].rstrip(".;") or repr(error)
            fault = fault_of(error, opening=self._run is None)
            self._given_up = fault.course is Course.STOP
            remedy = f"; {fault.remedy}" if fault.remedy else ""
            self._report(
                type(error).__name__,
                f"{CAN_NOT[fault.course]}: {why}{remedy}",
                course=fault.course,
            )
            return fault.course is Course.SKIP
        return True

    def _open(self) -> MlflowRun:
        self._run = run = self._open_run(self._description, self._known_run_id)
        uri, experiment = self._store, self._description.experiment
        atomic_write(
            self._run_dir.mlflow,
            json.dumps({"uri": uri, "experiment": experiment, "run_id": run.run_id}, indent=2)
            + "\n",
        )
        self.run_id = run.run_id
        return run

    def _report(self, what: str, why: str, *, course: Course | None = None) -> None:
        """Counts each error. Prints a line for the first one, and for the one that ends it all."""
        self.caught[f"mlflow: {what}"] += 1
        if not self._told or (course is Course.STOP and course not in self._told):
            self._told.add(course)
            has_all = f"the run goes on, and {self._run_dir.root} has everything"
            self._say(redacted(f"MLflow at {self._description.uri} {why}; {has_all}"))


def describe(config: Config, run_dir: RunDir) -> Description:
    """The MLflow run that belongs to `run_dir`."""
    uri, artifacts = store_uri(config.tracking.mlflow, run_dir.root.parent)
    return Description(
        uri=uri,
        experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT,
        name=run_dir.root.name,
        artifacts=artifacts,
        parameters=parameters_of(config),
        tags={
            "status": "running",
            "run_dir": str(run_dir.root),
            NOTE: note(config, run_dir, said="The run goes on."),
            SOURCE: "dapo-async train",
            SOURCE_TYPE: "LOCAL",
        },
    )


def note(config: Config, run_dir: RunDir, *, said: str) -> str:
    """The description of the run on MLflow's page, in Markdown: `said`, then what was trained."""
    replay = config.replay
    return (
        f"{said}\n\n"
        f"- model `{config.model.path}`, training data `{config.data.train}`\n"
        f"- {config.train.num_steps} steps of {replay.groups_per_step} groups of "
        f"{replay.group_size} rollouts, staleness at most {replay.max_staleness}, "
        f"objective {config.algorithm.objective}, engine {config.rollout.engine}\n"
        f"- run directory `{run_dir.root}`; draw it with "
        f"`dapo-async report {for_shell(run_dir.root)}`\n"
    )


def known_run_id(config: Config, run_dir: RunDir) -> str | None:
    """The MLflow run of an earlier incarnation, if it was in the store of `config`."""
    if not run_dir.mlflow.exists():
        return None
    known, wanted = json.loads(run_dir.mlflow.read_text()), describe(config, run_dir)
    store = redacted(config.tracking.mlflow)
    same = (known["uri"], known["experiment"]) == (store, wanted.experiment)
    return str(known["run_id"]) if same else None


def _log(run: MlflowRun, *, step: int, values: Mapping[str, float], time_ms: int) -> None:
    run.log(step, values, time_ms=time_ms)


def _add_files(run: MlflowRun, *, paths: list[Path], folder: str | None = None) -> None:
    for path in paths:
        run.add_file(path, folder)


def _close(run: MlflowRun, *, status: str, tags: Mapping[str, str]) -> None:
    run.tag(tags)
    run.close(CLOSED.get(status, "FINISHED"))
