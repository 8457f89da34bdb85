"""Sends the results of `dapo-async eval --watch` to the sinks of the watched run.

In: one row per measured version, from `runtime/watch.py`. Out: metrics `watched/NAME` at the step
of that version: in the MLflow run that the driver has opened, and in a TensorBoard folder of its
own. What a sink refuses is said once and kept for the next attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dapo_async.config import Config, load
from dapo_async.tracking.metric_names import finite_numbers
from dapo_async.tracking.mlflow_run import log_to_known_run, prepare_environment, store_uri
from dapo_async.tracking.mlflow_store import known_run_id
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.sink_thread import ThreadedSink
from dapo_async.tracking.tensorboard_writer import TensorBoardWriter

PREFIX = "watched."
CLOSE_S = 10.0


class WatchSink:
    """`add` and `close` raise nothing."""

    def __init__(
        self, run_dir: RunDir, overrides: Sequence[str], *, say: Callable[[str], None]
    ) -> None:
        """`overrides` may name the store with its password, which config.yaml never has."""
        self._run_dir, self._say = run_dir, say
        self._config: Config = load(run_dir.config, overrides, files=False)
        self._unsent: list[Mapping[str, Any]] = []
        self._has_told = False
        self._board: ThreadedSink | None = None
        if "mlflow" in self._config.tracking.names:
            prepare_environment()
        if "tensorboard" in self._config.tracking.names:
            folder = run_dir.tensorboard / "watched"
            self._board = ThreadedSink("tensorboard", lambda: TensorBoardWriter(folder), say=say)
            self._board.start()

    def add(self, row: Mapping[str, Any]) -> None:
        """One `watched_row`."""
        if self._board is not None:
            self._board.log(int(row["version"]), finite_numbers(row, prefix=PREFIX))
        if "mlflow" in self._config.tracking.names:
            self._unsent.append(row)
            self._send()

    def close(self, reason: str) -> None:
        """The last attempt."""
        self._send()
        if self._board is not None:
            self._board.finish("watched", reason, deadline_s=CLOSE_S)

    def _send(self) -> None:
        try:
            run_id = known_run_id(self._config, self._run_dir)
            if run_id is None or not self._unsent:  # MLflow has not answered the driver yet
                return
            uri, _ = store_uri(self._config.tracking.mlflow, self._run_dir.root.parent)
            while self._unsent:
                row = self._unsent[0]
                values = finite_numbers(row, prefix=PREFIX)
                log_to_known_run(uri, run_id, step=int(row["version"]), values=values)
                self._unsent.pop(0)
        except Exception as error:  # noqa: BLE001 (a store, its driver or the network may raise anything)
            if not self._has_told:
                self._has_told = True
                self._say(
                    f"MLflow does not take the results: {' '.join(str(error).split())}; they are "
                    f"in {self._run_dir.watched.root}, and are sent again with the next one"
                )
