"""The run directory (L3): which files a run writes, and where.

The driver writes them; the replay actor writes `rollouts/` and `recorded/`, learner ranks
`checkpoints/` and `weights/`. Nothing in them names the folder itself, so it can be moved.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_async.tracking.disk_faults import append_whole, row_bytes
from dapo_async.tracking.watch_folder import WatchFolder, watched_row
from dapo_async.utils.checkpoint_dir import CheckpointFolder
from dapo_async.utils.files import PARTIAL, atomic_write, partial_path
from dapo_async.utils.manifest import FileSum, sums_of
from dapo_async.utils.paths import for_shell
from dapo_async.utils.reasons import unreadable

DUMP_SIGNAL = signal.SIGUSR1  # asks the driver for a dump


@dataclass(frozen=True, slots=True)
class RunDir:
    """`config.yaml, metrics.jsonl, summary.json, timeline.json, rollouts/, …` under one root."""

    root: Path

    @classmethod
    def create(cls, root: Path) -> RunDir:
        """Makes the directory. Raises ValueError if that fails or if it holds anything."""
        if (line := unusable(root)) is not None:
            raise ValueError(line)
        try:
            for name in ("rollouts", "checkpoints"):
                (root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:  # below a file, no permission, a name too long, …
            raise ValueError(not_made(root, error)) from error
        return cls(root)

    def discard(self, made: Sequence[Path]) -> None:
        """Removes the folder of a run that never began, and of `made` the folders that are empty.

        `made`: the folders that `create` has made, see `missing_folders`.
        """
        self.config.unlink(missing_ok=True)
        for folder in (self.rollouts, self.checkpoints, *made):
            with suppress(OSError):  # something else is in it
                folder.rmdir()

    def reopen(self, version: int) -> list[Path]:
        """Prepares a resume at learner `version`: removes what later steps wrote.

        The summary stays until the next one replaces it. Checkpoints of later steps are renamed;
        returns their new paths.
        """
        aside = CheckpointFolder(self.checkpoints).set_aside(after=version)
        _keep_rows(self.metrics, lambda row: row["step"] < version)
        _keep_rows(self.evaluations, lambda row: row["version"] <= version > 0)
        for folder in (self.rollouts, self.recorded):
            for path in folder.glob("step_*"):
                unfinished = path.name.endswith(PARTIAL)  # a kill left it
                if unfinished or int(path.stem.removeprefix("step_")) >= version:
                    path.unlink()
        _keep_rows(self.files, lambda row: (self.root / row["file"]).exists())
        for path in self.problems.glob("version_*.json"):
            if not int(path.stem.removeprefix("version_")) <= version > 0:
                path.unlink()
        self.watched.forget(after=version)
        for folder in (self.weights, self.evaluated):
            shutil.rmtree(folder, ignore_errors=True)
        self.error.unlink(missing_ok=True)
        if self.timeline.exists():
            number = 1 + len([*self.root.glob("timeline.*.json")])
            self.timeline.rename(self.root / f"timeline.{number}.json")
        return aside

    def lock(self) -> None:
        """Held until this process ends. Raises ValueError when another process holds it."""
        folder = os.open(self.root, os.O_RDONLY)  # stays open, and children do not inherit it
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(folder)
            raise ValueError(
                f"the run in {self.root} is still running in another process; "
                "wait for its end, or end it first"
            ) from error

    def is_locked(self) -> bool:
        """Whether a process of this machine, or of one that shares the lock, runs in the folder."""
        folder = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(folder)
        return False

    def sign(self) -> None:
        """Notes which process runs in this directory, for `dapo-async dump`."""
        signed = {"pid": os.getpid(), "host": socket.gethostname()}
        atomic_write(self.driver, json.dumps(signed) + "\n")

    @property
    def driver(self) -> Path:
        """{pid, host} of the newest driver."""
        return self.root / "process.json"

    @property
    def scale(self) -> Path:
        """How `dapo-async scale` and the driver talk, see `runtime/scale_desk.py`."""
        return self.root / "scale"

    @property
    def dumps(self) -> Path:
        """What every actor did at some instant, as text."""
        return self.root / "dumps"

    def new_dump(self) -> Path:
        self.dumps.mkdir(exist_ok=True)
        count = len([*self.dumps.glob("*.txt")])
        return self.dumps / f"{count + 1:03d}-{time.strftime('%H%M%S')}.txt"

    def best_version(self, versions: Sequence[int]) -> int | None:
        """The version with the best evaluation, the newer of two equal ones; None without any.

        The results of `dapo-async eval --watch` count, if there are any, else those of the run.
        """
        found = [watched_row(version, self.watched.read(version)) for version in versions]
        rows = [row for row in found if row]
        if not rows and self.evaluations.exists():
            rows = [json.loads(line) for line in self.evaluations.read_text().splitlines()]
        known = [(row["accuracy"], row["version"]) for row in rows if row["version"] in versions]
        return max(known)[1] if known else None

    @property
    def config(self) -> Path:
        """The resolved config with every knob; `--resume` reads it."""
        return self.root / "config.yaml"

    @property
    def engines(self) -> Path:
        """The output of each SGLang server: NAME.log."""
        return self.root / "engines"

    @property
    def timeline(self) -> Path:
        """Of the newest start; timeline.1.json, timeline.2.json, … are of those before it."""
        return self.root / "timeline.json"

    @property
    def evaluations(self) -> Path:
        """One JSON row per evaluation."""
        return self.root / "evaluations.jsonl"

    @property
    def problems(self) -> Path:
        """One file per evaluation: {version, rows [N] of the data set, accuracies [N]}.

        The report draws the pass rates per problem from them.
        """
        return self.root / "evaluations"

    @property
    def watched(self) -> WatchFolder:
        """Results of `dapo-async eval --watch`, and its claim on checkpoints."""
        return WatchFolder(self.root / "watched")

    @property
    def recorded(self) -> Path:
        """Whole batches, with `train.record`."""
        return self.root / "recorded"

    @property
    def files(self) -> Path:
        """One JSON row, with the checksum, per file of `rollouts/`, `recorded/`, `non_finite/` and
        `guarded/`."""
        return self.root / "files.jsonl"

    def list_file(self, path: Path) -> None:
        """Adds a file that was just written to `files.jsonl`."""
        (written,) = sums_of([path])
        row = {"file": str(path.relative_to(self.root)), **written.to_json()}
        append_whole(self.files, [row_bytes(row)])

    @property
    def quarantine(self) -> Path:
        """One JSON row per prompt that is left out, because the verifier failed on it so often."""
        return self.root / "quarantine.jsonl"

    def log_quarantine(self, values: Mapping[str, Any]) -> None:
        append_whole(self.quarantine, [row_bytes(values)])

    def quarantined(self) -> list[dict[str, Any]]:
        """The rows of `quarantine.jsonl`; a last line that a kill left unfinished is dropped."""
        if not self.quarantine.exists():
            return []
        lines = self.quarantine.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def listed_files(self) -> dict[str, FileSum]:
        """The sums in `files.jsonl`, by path from this folder. Raises ValueError."""
        rows = self.files.read_text().splitlines() if self.files.exists() else []
        try:
            listed = [json.loads(line) for line in rows]
            return {str(row["file"]): FileSum.from_json(row) for row in listed}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.files} can't be read ({unreadable(error)})") from error

    def recorded_step(self, step: int) -> Path:
        self.recorded.mkdir(exist_ok=True)
        return self.recorded / f"step_{step:06d}.safetensors"

    def non_finite_step(self, step: int) -> Path:
        """The batch of a step whose loss or gradient was not finite; format of `recorded`."""
        folder = self.root / "non_finite"
        folder.mkdir(exist_ok=True)
        return folder / f"step_{step:06d}.safetensors"

    def guarded_step(self, step: int) -> Path:
        """A batch of a step that broke a rule of `train.guards`; format of `recorded`."""
        folder = self.root / "guarded"
        folder.mkdir(exist_ok=True)
        return folder / f"step_{step:06d}.safetensors"

    @property
    def groups(self) -> Path:
        """What happened to each group and when, see `group_log.py`."""
        return self.root / "groups.jsonl"

    @property
    def events(self) -> Path:
        """One JSON line per event of the run, see `event_log.py`."""
        return self.root / "events.jsonl"

    @property
    def journal(self) -> Path:
        """Of the replay actor, while the run goes on."""
        return self.root / "journal"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def profile(self) -> Path:
        """Traces of the learner's ranks, with `learner.profile`."""
        return self.root / "profile"

    @property
    def model(self) -> Path:
        """The base model with `model.max_positions`: links, and a config.json."""
        return self.root / "model"

    @property
    def weights(self) -> Path:
        """Versions for engines that load from disk."""
        return self.root / "weights"

    @property
    def evaluated(self) -> Path:
        """The version that is being evaluated, until its engine has read it.

        Not in `weights`, where older versions are removed.
        """
        return self.root / "evaluated"

    @property
    def error(self) -> Path:
        """The whole traceback of a failed run, the failed actor's own included."""
        return self.root / "error.txt"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def status(self) -> Path:
        """The newest state of the run and of each engine, see `runtime/beat.py`."""
        return self.root / "status.json"

    @property
    def picture(self) -> Path:
        return self.root / "dynamics.png"

    @property
    def mlflow(self) -> Path:
        """Which MLflow run this is: {uri, experiment, run_id}, uri as in tracking.mlflow."""
        return self.root / "mlflow.json"

    @property
    def tensorboard(self) -> Path:
        """Event files, with `tracking.sinks=tensorboard`."""
        return self.root / "tensorboard"

    def relative(self, path: Path) -> str:
        """As files of the run folder name `path`: from this folder where it lies inside."""
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)

    def log_step(self, values: Mapping[str, Any]) -> None:
        """Appends a flat JSON object; null stands for nan and infinity."""
        append_whole(self.metrics, [row_bytes(values)])

    def log_evaluation(self, values: Mapping[str, Any], *, accuracies: Mapping[int, float]) -> None:
        """Appends a JSON object; writes the `accuracies` by problem to a file of the version."""
        append_whole(self.evaluations, [row_bytes(values)])
        self.problems.mkdir(exist_ok=True)
        rows = sorted(accuracies)
        solved = {
            "version": values["version"],
            "rows": rows,
            "accuracies": [accuracies[row] for row in rows],
        }
        atomic_write(
            self.problems / f"version_{values['version']:06d}.json", json.dumps(solved) + "\n"
        )

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of every step so far."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def write_status(self, text: str) -> None:
        """The newest state, for readers of a run that goes on; a power failure may lose it."""
        partial = partial_path(self.status)
        partial.write_text(text + "\n")
        partial.replace(self.status)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        atomic_write(self.summary, json.dumps(summary, indent=2) + "\n")


def unusable(root: Path) -> str | None:
    """Why `root` can't become the directory of a new run, in one line; None where it can.

    Makes nothing: a dry run calls it, too.
    """
    try:
        if root.exists() and not root.is_dir():
            return f"run_dir {root} is a file; choose another run_dir"
        if root.exists() and any(root.iterdir()):
            return (
                f"run_dir {root} is not empty; continue with train --resume {for_shell(root)}, "
                "choose another run_dir, or remove it"
            )
        there = next(folder for folder in (root, *root.parents) if folder.exists())
        if not there.is_dir():
            return f"run_dir {root} can't be made: {there} is a file; choose another run_dir"
        if not os.access(there, os.W_OK | os.X_OK):
            return (
                f"run_dir {root} can't be made: {there} can't be written to; choose another run_dir"
            )
    except OSError as error:  # a name too long, a folder that can't be entered, …
        return not_made(root, error)
    return None


def too_full(root: Path, num_bytes: int) -> str | None:
    """Why `root` can't hold a checkpoint of at least `num_bytes`, in one line; None where it can.

    Makes nothing.
    """
    try:
        there = next(folder for folder in (root, *root.parents) if folder.exists())
        total, _, free = shutil.disk_usage(there)
    except OSError:
        return None  # `unusable` reports it
    if free >= num_bytes or not total:  # /proc has no size
        return None
    return (
        f"run_dir {root} has {free / 2**20:,.1f} MiB free, a checkpoint of this model needs at "
        f"least {num_bytes / 2**20:,.1f} MiB; free some space, or choose another run_dir"
    )


def not_made(root: Path, error: OSError) -> str:
    """One line for an error while the directory of a new run is made."""
    return f"run_dir {root} can't be made: {error.strerror}; choose another run_dir"


def missing_folders(path: Path) -> list[Path]:
    """`path` and its parents as far as they do not exist, the innermost first."""
    # Unlike Path.exists it raises nothing.
    return [folder for folder in (path, *path.parents) if not os.path.exists(folder)]


def _keep_rows(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Keeps the wanted rows of a file. A last line that a kill left unfinished is dropped."""
    if not path.exists():
        return
    kept = [
        line
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n") and wanted(json.loads(line))
    ]
    atomic_write(path, "".join(kept))
