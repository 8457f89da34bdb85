"""Everything that shows a run while it goes on: the progress output and MLflow.

In: rows of metrics and of evaluations, and lines, from the driver in `runtime/`. Out: the same rows
on the terminal and, where `tracking.mlflow` is set, in an MLflow run.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dapo_async.config import STOP_S, Config
from dapo_async.tracking.bottleneck import BottleneckWatch, Layout
from dapo_async.tracking.disk_faults import DiskFaults
from dapo_async.tracking.mlflow_store import MlflowStore, known_run_id
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.terminal import Outlet, Progress


def open_progress(*, num_steps: int, max_staleness: int) -> Progress:
    """The live display if standard output is a terminal that can move its cursor, else lines."""
    out = Outlet.on(sys.stdout)
    if not out.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return Progress(out, num_steps=num_steps, max_staleness=max_staleness)
    from dapo_async.tracking.live_display import LiveProgress  # imports rich

    # Closing the terminal must end the display and not the run. The actors inherit this.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return LiveProgress(out, num_steps=num_steps, max_staleness=max_staleness)


class Sinks:
    """Passes rows and lines on. No method raises or waits, except `finish`.

    `finish` waits for MLflow for at most STOP_S.
    """

    def __init__(self, config: Config, run_dir: RunDir, progress: Progress) -> None:
        self._progress = progress
        self._mlflow: MlflowStore | None = None
        if config.tracking.mlflow is not None:
            self._mlflow = MlflowStore(
                config, run_dir, say=progress.say, run_id=known_run_id(config, run_dir)
            )
        self.say = progress.say
        self.disk = DiskFaults(progress.say)
        self._bottleneck = BottleneckWatch(Layout.of(config))

    def start(self) -> None:
        """Opens the MLflow run in the background."""
        if self._mlflow is not None:
            self._mlflow.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """Takes one row of metrics.jsonl."""
        self._progress.step(row)
        if found := self._bottleneck.add(row):
            self.say(f"after step {row['version']}: {found.line}")
        if self._mlflow is not None:
            self._mlflow.log_step(row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Takes one row of evaluations.jsonl.

        It has `version`, `accuracy`, `mean_response_tokens` and any further measured number.
        """
        self._progress.evaluation(row)
        if self._mlflow is not None:
            self._mlflow.log_evaluation(row)

    def finish(self, status: str, reason: str) -> None:
        """Ends the MLflow run; call it when the run directory is complete, summary included."""
        if self._mlflow is not None:
            self._mlflow.finish(status, reason, deadline_s=STOP_S)

    @property
    def bottleneck(self) -> str | None:
        """One sentence on what limited the speed so far; None if no step told."""
        return self._bottleneck.summary()

    @property
    def split(self) -> dict[str, Any] | None:
        """What the planner says about the last steps; None without rates."""
        return self._bottleneck.split()

    @property
    def caught(self) -> Counter[str]:
        """Errors of the sinks, by name, that did not reach the run."""
        mlflow = self._mlflow.caught if self._mlflow else Counter[str]()
        return self._progress.caught + mlflow + self.disk.counts

    @property
    def mlflow_run_id(self) -> str | None:
        """None until MLflow has answered, and where MLflow is off."""
        return self._mlflow.run_id if self._mlflow else None
