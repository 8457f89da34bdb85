"""One run in MLflow, seen synchronously: parameters, metrics per step, tags, artifacts, an end. The only module that imports `mlflow`.

Called by the one thread of `mlflow_store.py`, which knows what to do when a call fails.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOCAL = "local"  # tracking.mlflow: SQLite beside the run directories
MAX_PARAMETERS, MAX_PARAMETER_CHARACTERS, MAX_TAG_CHARACTERS = 100, 6000, 5000  # MLflow's limits
# A server that is away costs one request of so long; MLflow's own 7 retries of 120 s would hold up the end of a run for minutes.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_LOGGING_LEVEL": "ERROR",  # its creation of a database is no news, nor is where a finished run can be seen
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


@dataclass(frozen=True, slots=True)
class Description:
    """What a new MLflow run is given."""

    uri: str  # of the store
    experiment: str
    name: str
    artifacts: (
        Path | None
    )  # where the artifacts of a new experiment go; None: where the server wants them
    parameters: Mapping[str, str]
    tags: Mapping[str, str]


def prepare_environment() -> None:
    """What MLflow reads when it is imported: short deadlines and no telemetry. What the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def store_uri(mlflow: str, runs: Path) -> tuple[str, Path | None]:
    """The tracking URI of the knob `tracking.mlflow` and the folder of its artifacts; `runs` is the folder of the run directories."""
    return (
        (f"sqlite:///{runs / 'mlflow.db'}", runs / "mlartifacts")
        if mlflow == LOCAL
        else (mlflow, None)
    )


def flat_parameters(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A tree of knobs as dotted names and texts that MLflow takes: `("learner.lr", "0.0003")`."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_parameters(value, f"{prefix}{name}.")
        else:
            yield (
                prefix + name,
                ("null" if value is None else str(value))[:MAX_PARAMETER_CHARACTERS],
            )


def finite_numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """What of a row is a metric: finite numbers that are not its step or version."""
    return {
        prefix + name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float)
        and math.isfinite(value)
        and name not in ("step", "version")
    }


class MlflowRun:
    """An open MLflow run. Every method may raise whatever MLflow raises."""

    def __init__(self, description: Description, run_id: str | None) -> None:
        """Goes on with `run_id` where the store knows it, else makes a new run, and the experiment and the database where they are missing."""
        from mlflow import MlflowClient

        self._client = MlflowClient(description.uri)
        self._experiment_id = self._find_experiment(description)
        known = self._find_run(run_id) if run_id else None
        if known is None:
            known = self._client.create_run(self._experiment_id, run_name=description.name)
        self.run_id: str = known.info.run_id
        self._client.update_run(self.run_id, status="RUNNING")
        self._log_parameters(description.parameters, known.data.params)
        self.tag(description.tags)

    def _find_experiment(self, description: Description) -> str:
        from mlflow.exceptions import MlflowException

        artifacts = description.artifacts.as_uri() if description.artifacts else None
        found = self._client.get_experiment_by_name(description.experiment)
        if found is None:
            try:
                return str(
                    self._client.create_experiment(
                        description.experiment, artifact_location=artifacts
                    )
                )
            except MlflowException:
                # Another run has made it meanwhile; else the error is the one to tell.
                if (found := self._client.get_experiment_by_name(description.experiment)) is None:
                    raise
        return str(found.experiment_id)

    def _find_run(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.get_http_status_code() != 404:
                raise
            return None  # its store was removed since

    def _log_parameters(self, wanted: Mapping[str, str], known: Mapping[str, str]) -> None:
        """MLflow never changes a parameter: what a resumed run changed becomes a tag."""
        from mlflow.entities import Param

        new = [Param(name, value) for name, value in wanted.items() if name not in known]
        for start in range(0, len(new), MAX_PARAMETERS):
            self._client.log_batch(self.run_id, params=new[start : start + MAX_PARAMETERS])
        self.tag(
            {
                f"resumed.{name}": value
                for name, value in wanted.items()
                if known.get(name, value) != value
            }
        )

    def tag(self, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self._client.set_tag(self.run_id, name, value[:MAX_TAG_CHARACTERS])

    def log(self, step: int, values: Mapping[str, float], *, time_ms: int) -> None:
        """One batch of metrics; the same batch twice is one."""
        from mlflow.entities import Metric

        self._client.log_batch(
            self.run_id,
            metrics=[Metric(name, value, time_ms, step) for name, value in values.items()],
        )

    def add_file(self, path: Path, folder: str | None = None) -> None:
        """Adds a copy of `path` to the artifacts; a file that is not there is passed over."""
        if path.is_file():
            self._client.log_artifact(self.run_id, str(path), folder)

    def close(self, status: str) -> None:
        """`status`: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)


def is_refusal(error: Exception) -> bool:
    """Whether the store answered and took no offence at anything but this one request: to send it again would change nothing."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.get_http_status_code() in (
        400,
        404,
        409,
        413,
    )
