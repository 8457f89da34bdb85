"""One MLflow run, synchronously: parameters, metrics per step, tags, artifacts and its end.

The only module that imports `mlflow`. Called by the one thread of `mlflow_store.py`, which handles
every error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from dapo_async.tracking.mlflow_faults import ADDRESS, Unusable

ACTIVE = "active"  # the stage of an experiment or run that is not deleted
ARTIFACTS = "mlartifacts"  # folder of the local store
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # URIs that MLflow gives to SQLAlchemy
LOCAL = "local"  # tracking.mlflow: SQLite beside the run directories
MAX_PARAMETERS, MAX_TAG_CHARACTERS = 100, 5000  # MLflow's limits
NOTE, SOURCE, SOURCE_TYPE = "mlflow.note.content", "mlflow.source.name", "mlflow.source.type"
# A request without an answer ends after 3 s. MLflow's default, 7 retries of 120 s, would delay the
# end of a run by minutes.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_LOGGING_LEVEL": "ERROR",  # not the lines on a new database and the run's address
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
}


@dataclass(frozen=True, slots=True)
class Description:
    """What a new MLflow run is made from."""

    uri: str  # of the store
    experiment: str
    name: str
    artifacts: Path | None  # folder of a new experiment's artifacts; None: the server chooses
    parameters: Mapping[str, str]
    tags: Mapping[str, str]


def prepare_environment() -> None:
    """Sets what MLflow reads at import: short deadlines, no telemetry, metrics of the machine.

    The user's values stay.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def store_uri(mlflow: str, runs: Path) -> tuple[str, Path | None]:
    """The tracking URI for the knob `tracking.mlflow`, and the folder of the artifacts.

    `runs` is the folder of the run directories.
    """
    if mlflow == LOCAL:
        return _sqlite_uri(runs / "mlflow.db"), runs / ARTIFACTS
    return mlflow, None


def _sqlite_uri(file: Path) -> str:
    """Quotes a path that would be another one as it stands, such as one with `?` or `%20`."""
    from sqlalchemy.engine import URL, make_url

    plain = make_url(f"sqlite:///{file}")
    if plain.database == str(file) and not plain.query:
        return f"sqlite:///{file}"
    # With the name of the driver, because MLflow makes the folder of a quoted path for sqlite:///.
    quoted = URL.create("sqlite+pysqlite", database=str(file))
    return quoted.render_as_string(hide_password=False)


class MlflowRun:
    """An open MLflow run. Every method raises what MLflow raises."""

    def __init__(self, description: Description, run_id: str | None) -> None:
        """Continues `run_id` if the store has it, else makes a new run.

        A missing experiment or database is made. Raises Unusable for a deleted experiment.
        """
        _connect_once(description.uri)
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
        self._monitor = _system_monitor(description.uri, self.run_id)

    def _find_experiment(self, description: Description) -> str:
        from mlflow.exceptions import MlflowException

        artifacts = description.artifacts.as_uri() if description.artifacts else None
        found = self._client.get_experiment_by_name(description.experiment)
        if found is None:
            try:
                name = description.experiment
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except MlflowException:
                # Another run may have made it in the meantime.
                if (found := self._client.get_experiment_by_name(description.experiment)) is None:
                    raise
        number = str(found.experiment_id)
        if not number:  # JSON, but not that of MLflow
            raise Unusable("no MLflow server answers there", remedy=ADDRESS)
        if found.lifecycle_stage != ACTIVE:
            raise Unusable(
                f"its experiment {description.experiment} was deleted",
                remedy=f"restore it with mlflow experiments restore --experiment-id {number}, or "
                "set MLFLOW_EXPERIMENT_NAME to another name",
            )
        if artifacts is not None and _was_moved(found.artifact_location, artifacts):
            _move_artifacts(description.uri, number, before=found.artifact_location, now=artifacts)
        return number

    def _find_run(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
            return run if run.info.lifecycle_stage == ACTIVE else None
        except MlflowException as error:
            if _status(error) != 404:
                raise
            return None  # the run or the store was removed since then

    def _log_parameters(self, wanted: Mapping[str, str], known: Mapping[str, str]) -> None:
        """MLflow can't change a parameter, so a knob that a resumed run changed becomes a tag."""
        from mlflow.entities import Param

        new = [Param(name, value) for name, value in wanted.items() if name not in known]
        for start in range(0, len(new), MAX_PARAMETERS):
            self._client.log_batch(self.run_id, params=new[start : start + MAX_PARAMETERS])
        changed = {name: value for name, value in wanted.items() if known.get(name, value) != value}
        self.tag({f"resumed.{name}": value for name, value in changed.items()})

    def tag(self, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self._client.set_tag(self.run_id, name, value[:MAX_TAG_CHARACTERS])

    def log(self, step: int, values: Mapping[str, float], *, time_ms: int) -> None:
        """Sends one batch of metrics; sending the same batch twice changes nothing."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, time_ms, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)
        if self._monitor is not None and not self._monitor._process.is_alive():
            self._monitor.start()  # its thread ends when the store does not answer once

    def add_file(self, path: Path, folder: str | None = None) -> None:
        """Adds a copy of `path` to the artifacts; a missing file is left out."""
        if path.is_file():
            self._client.log_artifact(self.run_id, str(path), folder)

    def close(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        if self._monitor is not None:
            self._monitor.finish()
        self._client.set_terminated(self.run_id, status)


def _system_monitor(uri: str, run_id: str) -> Any:
    """A thread that sends the use of CPU, memory, disk, network and GPUs of this machine.

    None if MLflow's variable MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false.
    """
    from mlflow import environment_variables

    switch: Any = environment_variables.MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    if not switch.get():
        return None
    from mlflow.system_metrics import system_metrics_monitor

    make: Any = system_metrics_monitor.SystemMetricsMonitor
    monitor = make(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def log_to_known_run(uri: str, run_id: str, *, step: int, values: Mapping[str, float]) -> None:
    """Adds metrics to a run that another process has opened, and changes nothing else of it."""
    _connect_once(uri)
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    time_ms = int(time.time() * 1000)
    metrics = [Metric(name, value, time_ms, step) for name, value in values.items()]
    MlflowClient(uri).log_batch(run_id, metrics=metrics)


def _connect_once(uri: str) -> None:
    """Connects to a database and leaves it: MLflow would try in vain for minutes.

    Makes the folder of a SQLite file, as MLflow does.
    """
    if uri.partition(":")[0].partition("+")[0] not in DATABASES:
        return
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url
    from sqlalchemy.pool import NullPool

    url = make_url(uri)
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    create_engine(url, poolclass=NullPool).connect().close()


def _was_moved(before: str, now: str) -> bool:
    """Whether a local store was moved: MLflow keeps the old folder of its artifacts for ever."""
    folder = Path(url2pathname(urlsplit(before).path))
    return (
        before != now
        and before.startswith("file:")
        and folder.name == ARTIFACTS
        and (not folder.exists() or Path(url2pathname(urlsplit(now).path)).exists())
    )


def _move_artifacts(uri: str, experiment_id: str, *, before: str, now: str) -> None:
    """Names the new folder in the SQLite store `uri`, for the experiment and all of its runs.

    MLflow has no call for it.
    """
    from sqlalchemy import create_engine, text

    engine = create_engine(uri)
    values = {"id": experiment_id, "before": before, "now": now, "size": len(before)}
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE experiments SET artifact_location = :now WHERE experiment_id = :id"),
            values,
        )
        connection.execute(
            text(
                "UPDATE runs SET artifact_uri = :now || substr(artifact_uri, :size + 1) "
                "WHERE experiment_id = :id AND substr(artifact_uri, 1, :size) = :before"
            ),
            values,
        )
    engine.dispose()


def _status(error: Any) -> int:
    return int(error.get_http_status_code())
