"""Whoever looks at a run while it goes on: the person before the terminal, and MLflow where it is on. Told by the driver of `runtime/`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dapo_async.config import Config
from dapo_async.tracking.mlflow_store import MlflowStore, known_run_id
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.terminal import Progress


class Audience:
    """Hands on what the run tells. Nothing here raises or waits, but `finish` for up to `deadlines.stop_s`."""

    def __init__(self, config: Config, run_dir: RunDir, progress: Progress) -> None:
        self._progress, self._deadline_s = progress, config.deadlines.stop_s
        self._mlflow: MlflowStore | None = None
        if config.tracking.mlflow is not None:
            self._mlflow = MlflowStore(
                config, run_dir, say=progress.say, run_id=known_run_id(config, run_dir)
            )
        self.say = progress.say

    def start(self) -> None:
        if self._mlflow is not None:
            self._mlflow.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""
        self._progress.step(row)
        if self._mlflow is not None:
            self._mlflow.log_step(row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """One row of evaluations.jsonl: `version`, `accuracy`, `mean_response_tokens` and whatever else was measured."""
        self._progress.evaluation(row)
        if self._mlflow is not None:
            self._mlflow.log_evaluation(row)

    def finish(self, status: str, reason: str) -> None:
        """The last word: everything is written, the summary included."""
        if self._mlflow is not None:
            self._mlflow.finish(status, reason, deadline_s=self._deadline_s)

    @property
    def caught(self) -> Counter[str]:
        """The troubles that the run did not hear of, by name."""
        return self._progress.caught + (self._mlflow.caught if self._mlflow else Counter())

    @property
    def mlflow_run_id(self) -> str | None:
        """None while the store has not answered, and where MLflow is off."""
        return self._mlflow.run_id if self._mlflow else None
