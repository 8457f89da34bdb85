"""MLflow off the training path: one daemon thread and a bounded queue, and whatever becomes of them, the run goes on.

Rows arrive from the driver and are sent in order. A store that is away is tried again every `RETRY_S`; at the end of the run it is not waited for.
The run directory has everything anyway, so that nothing here is ever worth stopping for: errors are counted in `caught` and told once.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from dapo_async.config import Config, redacted
from dapo_async.tracking.mlflow_run import (
    Description,
    MlflowRun,
    finite_numbers,
    flat_parameters,
    is_refusal,
    prepare_environment,
    store_uri,
)
from dapo_async.tracking.run_dir import RunDir

EXPERIMENT = "dapo-async"  # unless MLflow's own variable MLFLOW_EXPERIMENT_NAME names another
RETRY_S = 15.0
MAX_WAITING = 10_000  # calls that the queue holds; further rows stay in the run directory alone
NUM_ROLLOUT_FILES, NEWEST_ROLLOUT_FILES = (
    10,
    3,
)  # of rollouts/: at even intervals along the run, and at its end
CLOSED = {"failed": "FAILED", "interrupted": "KILLED"}  # by the run's status; FINISHED otherwise

Call = Callable[[MlflowRun], None]


class MlflowStore:
    """The MLflow side of one run. `start`, then rows, then `finish`; none of them raises or waits for MLflow, but `finish` up to its deadline."""

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
        """`run_id`: the MLflow run to go on with, if the store still has it."""
        assert config.tracking.mlflow is not None, "tracking.mlflow is off"
        prepare_environment()
        self.run_id: str | None = None  # known when the store has answered
        self.caught: Counter[str] = Counter()
        self._run_dir, self._say, self._open_run, self._retry_s = run_dir, say, open_run, retry_s
        self._description = describe(config, run_dir)
        self._every = max(1, config.train.num_steps // NUM_ROLLOUT_FILES)
        self._known_run_id = run_id
        self._run: MlflowRun | None = None
        self._queue: SimpleQueue[Call | None] = SimpleQueue()  # None: the end
        self._ending, self._told = Event(), False
        self._thread = Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        """Opens the MLflow run in the background: seconds of a core for MLflow's import, so that it had better not be where others start as well."""
        self._queue.put(partial(_add_files, paths=[self._run_dir.config]))
        self._thread.start()

    def log_step(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl: its numbers at its step, and now and then the step's rollouts."""
        step = int(row["step"])
        self._put(
            partial(_log, step=step, values=finite_numbers(row), time_ms=int(time.time() * 1000))
        )
        if step % self._every == 0:
            self._put(
                partial(
                    _add_files,
                    paths=[self._run_dir.rollouts / f"step_{step:06d}.jsonl"],
                    folder="rollouts",
                )
            )

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """One evaluation: its numbers as `evaluation.NAME`, at the weight version that was measured."""
        values = finite_numbers(row, prefix="evaluation.")
        self._put(
            partial(_log, step=int(row["version"]), values=values, time_ms=int(time.time() * 1000))
        )

    def finish(self, status: str, reason: str, *, deadline_s: float) -> None:
        """Sends the artifacts and closes the MLflow run. Returns at the latest after `deadline_s`; what is not sent by then is given up."""
        if self._thread.ident is None:  # the run ended before its actors were up
            self.start()
        run_dir = self._run_dir
        newest = sorted(run_dir.rollouts.glob("step_*.jsonl"))[-NEWEST_ROLLOUT_FILES:]
        self._queue.put(partial(_add_files, paths=newest, folder="rollouts"))
        self._queue.put(
            partial(
                _add_files, paths=[run_dir.config, run_dir.summary, run_dir.picture, run_dir.error]
            )
        )
        self._queue.put(partial(_close, status=status, reason=redacted(reason)))
        self._queue.put(None)
        self._ending.set()
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._tell(
                "late", f"has not taken everything within {deadline_s:g} s (deadlines.stop_s)"
            )

    def _put(self, call: Call) -> None:
        if self._queue.qsize() < MAX_WAITING:
            self._queue.put(call)
        else:
            self._tell("queue full", f"has {MAX_WAITING} calls waiting")

    def _work(self) -> None:
        """The thread: one call after another, each until it is done or refused."""
        last_attempt = False
        while (call := self._queue.get()) is not None:
            while not self._attempt(call):
                # A store that was never there is not worth a last attempt at the end of the run; one that went away may be back.
                if self._ending.wait(self._retry_s):
                    if last_attempt or self._run is None:
                        return
                    last_attempt = True

    def _attempt(self, call: Call) -> bool:
        """False when the store is away and `call` has to be made again."""
        try:
            call(self._run or self._open())
        except Exception as error:  # noqa: BLE001 (tracking's network edge: whatever a store, its drivers or the network raise is counted and told)
            self._tell(
                type(error).__name__,
                f"can't be used: {' '.join(str(error).split())[:300] or repr(error)}",
            )
            return self._run is not None and is_refusal(error)
        return True

    def _open(self) -> MlflowRun:
        self._run = run = self._open_run(self._description, self._known_run_id)
        uri, experiment = redacted(self._description.uri), self._description.experiment
        self._run_dir.write(
            self._run_dir.mlflow,
            json.dumps({"uri": uri, "experiment": experiment, "run_id": run.run_id}, indent=2)
            + "\n",
        )
        self.run_id = run.run_id
        return run

    def _tell(self, what: str, why: str) -> None:
        """Counts each trouble, and says one line of the first."""
        self.caught[f"mlflow: {what}"] += 1
        if not self._told:
            self._told = True
            self._say(
                redacted(
                    f"MLflow at {self._description.uri} {why}; the run goes on, and {self._run_dir.root} has everything"
                )
            )


def describe(config: Config, run_dir: RunDir) -> Description:
    """The MLflow run that belongs to `run_dir`."""
    assert config.tracking.mlflow is not None, "tracking.mlflow is off"
    uri, artifacts = store_uri(config.tracking.mlflow, run_dir.root.parent)
    shown = replace(
        config, tracking=replace(config.tracking, mlflow=redacted(config.tracking.mlflow))
    )
    tags = {"status": "running", "run_dir": str(run_dir.root)}
    return Description(
        uri,
        os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT,
        run_dir.root.name,
        artifacts,
        dict(flat_parameters(asdict(shown))),
        tags,
    )


def known_run_id(config: Config, run_dir: RunDir) -> str | None:
    """The MLflow run that an earlier incarnation wrote to, if that was in the store of `config`."""
    if not run_dir.mlflow.exists():
        return None
    known, wanted = json.loads(run_dir.mlflow.read_text()), describe(config, run_dir)
    same = (known["uri"], known["experiment"]) == (redacted(wanted.uri), wanted.experiment)
    return str(known["run_id"]) if same else None


def _log(run: MlflowRun, *, step: int, values: Mapping[str, float], time_ms: int) -> None:
    run.log(step, values, time_ms=time_ms)


def _add_files(run: MlflowRun, *, paths: list[Path], folder: str | None = None) -> None:
    for path in paths:
        run.add_file(path, folder)


def _close(run: MlflowRun, *, status: str, reason: str) -> None:
    run.tag({"status": status, "reason": reason})
    run.close(CLOSED.get(status, "FINISHED"))
