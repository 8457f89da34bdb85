"""Everything that shows a run while it goes on: the progress output and the sinks of metrics.

In: rows of metrics and of evaluations, and lines, from the driver in `runtime/`. Out: the same rows
on the terminal and in what `tracking.sinks` names: MLflow, TensorBoard, W&B.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from dapo_async.config import STOP_S, Config
from dapo_async.tracking.bottleneck import BottleneckWatch, Layout
from dapo_async.tracking.disk_faults import DiskFaults
from dapo_async.tracking.event_log import EventLog
from dapo_async.tracking.metric_names import parameters_of
from dapo_async.tracking.mlflow_store import MlflowStore, known_run_id
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.sink_thread import MetricSink, ThreadedSink
from dapo_async.tracking.tensorboard_writer import TensorBoardWriter
from dapo_async.tracking.terminal import Outlet, Progress
from dapo_async.tracking.wandb_writer import WandbWriter

# Counts of metrics.jsonl that are events when they grow.
GUARDED_COUNTS = ("groups.evicted", "groups.failed", "handshake.mismatch")


def open_progress(*, num_steps: int, max_staleness: int) -> Progress:
    """The live display if standard output is a terminal that can move its cursor, else lines."""
    out = Outlet.on(sys.stdout)
    if not out.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return Progress(out, num_steps=num_steps, max_staleness=max_staleness)
    from dapo_async.tracking.live_display import LiveProgress  # imports rich

    # Closing the terminal must end the display and not the run. The actors inherit this.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return LiveProgress(out, num_steps=num_steps, max_staleness=max_staleness)


def _file_sinks(config: Config, run_dir: RunDir, say: Callable[[str], None]) -> list[MetricSink]:
    """The sinks that write to the run directory."""
    sinks: list[MetricSink] = []
    if "tensorboard" in config.tracking.names:
        folder = run_dir.tensorboard
        sinks.append(ThreadedSink("tensorboard", lambda: TensorBoardWriter(folder), say=say))
    if "wandb" in config.tracking.names:
        parameters = parameters_of(config)
        sinks.append(ThreadedSink("wandb", lambda: WandbWriter(run_dir.root, parameters), say=say))
    return sinks


class Sinks:
    """Passes rows and lines on. No method raises or waits, except `finish`.

    `finish` waits for all sinks together for at most STOP_S.
    """

    def __init__(self, config: Config, run_dir: RunDir, progress: Progress) -> None:
        self._progress = progress
        self._mlflow: MlflowStore | None = None
        # MLflow comes last: at the end of a run it may need all of the time that the others leave.
        self._stores: list[MetricSink] = _file_sinks(config, run_dir, progress.say)
        if "mlflow" in config.tracking.names:
            self._mlflow = MlflowStore(
                config, run_dir, say=progress.say, run_id=known_run_id(config, run_dir)
            )
            self._stores.append(self._mlflow)
        self.say = progress.say
        self.disk = DiskFaults(progress.say)
        self._bottleneck = BottleneckWatch(Layout.of(config))
        self._events = EventLog(run_dir.events, self.disk, run=run_dir.root.name)
        self.event = self._events.add
        self.on_evaluation: list[Callable[[Mapping[str, Any]], None]] = []  # get each row, too
        self._guarded: dict[str, float] = {}  # by kind: the count of the newest row

    def start(self) -> None:
        """Opens every sink in the background."""
        for store in self._stores:
            store.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """Takes one row of metrics.jsonl."""
        self._progress.step(row)
        self._events.step = row["version"]
        if not self._guarded and row["step"] > 0:  # a resumed run: earlier ones are known
            self._guarded = {name: row.get(name, 0) for name in GUARDED_COUNTS}
        self.guards({name: row.get(name, 0) for name in GUARDED_COUNTS})
        if found := self._bottleneck.add(row):
            self.say(f"after step {row['version']}: {found.line}")
            self.event("verdict", kind=found.kind, line=found.line)
        for store in self._stores:
            store.log_step(row)

    def guards(self, counts: Mapping[str, float]) -> None:
        """An event for each count that has grown: steps by broken rule, evicted groups, …"""
        for kind, count in counts.items():
            before = self._guarded.get(kind, 0)
            if count > before:
                self.event("guard", kind=kind, count=count - before)
            self._guarded[kind] = count

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Takes one row of evaluations.jsonl.

        It has `version`, `accuracy`, `mean_response_tokens` and any further measured number.
        """
        self._progress.evaluation(row)
        self.event("evaluation", **row)
        for listener in self.on_evaluation:
            listener(row)
        for store in self._stores:
            store.log_evaluation(row)

    def finish(self, status: str, reason: str) -> None:
        """Ends every sink; call it when the run directory is complete, summary included."""
        end_s = time.monotonic() + STOP_S
        for store in self._stores:
            store.finish(status, reason, deadline_s=max(0.1, end_s - time.monotonic()))

    @property
    def bottleneck(self) -> str | None:
        """One sentence on what limited the speed so far; None if no step told."""
        return self._bottleneck.summary()

    @property
    def split(self) -> dict[str, Any] | None:
        """What the planner says about the last steps; None without rates."""
        return self._bottleneck.split()

    @property
    def faults(self) -> list[str]:
        """What was wrong in the run, with the steps of each fault."""
        return self._bottleneck.faults

    @property
    def newest_bottleneck(self) -> str | None:
        """What limits the speed now; None during the first ten steps."""
        return self._bottleneck.newest

    @property
    def caught(self) -> Counter[str]:
        """Errors of the sinks, by name, that did not reach the run."""
        stores = sum((store.caught for store in self._stores), start=Counter[str]())
        return self._progress.caught + stores + self.disk.counts

    @property
    def mlflow_run_id(self) -> str | None:
        """None until MLflow has answered, and where MLflow is off."""
        return self._mlflow.run_id if self._mlflow else None
