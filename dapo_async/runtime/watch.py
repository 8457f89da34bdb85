"""`dapo-async eval --watch RUN_DIR`: measures each checkpoint of a run as it appears. Without Ray.

In: the checkpoints of a run directory, which a driver writes meanwhile, perhaps on other machines.
Out: one result per version in `watched/`, which `report` draws, and its numbers in the MLflow run
of the training run. `tracking/watch_folder.py` says how the driver learns which checkpoints are
still needed. Called by `cli/evaluate.py`.
"""

from __future__ import annotations

import hashlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any

from dapo_async.evaluate.command import Job, Options, measure, prepare_evaluation
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.run_status import RunState, read_status
from dapo_async.tracking.watch_folder import WatchLease, watched_row
from dapo_async.tracking.watch_sink import WatchSink
from dapo_async.utils.checkpoint_dir import STATE, CheckpointFolder
from dapo_async.utils.manifest import MANIFEST

POLL_S = 5.0
PATIENCE_S = 120.0  # after a run was interrupted or killed: `--supervise` may resume it
MAX_FAILED = 3  # failures in a row of one version; the last one ends the watch
BASE = 0  # the version of the base model
# Settings that differ from version to version.
OWN_SETTINGS = ("checkpoint", "data", "weights_sha256", "version", "checkpoint_sums")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Watcher:
    """Measures versions in ascending order, the base model first."""

    def __init__(
        self,
        root: Path,
        overrides: Sequence[str],
        options: Options,
        *,
        until_end: bool,
        say: Callable[[str], None],
        poll_s: float = POLL_S,
        patience_s: float = PATIENCE_S,
        prepare: Callable[[str, Sequence[str], Options], Job] = prepare_evaluation,
        measure: Callable[..., int] = measure,
        state: Callable[[Path], RunState] = lambda root: read_status(root).state,
    ) -> None:
        """`options.checkpoint` and `options.out` are set here for each version.

        Raises ValueError for a folder that is no run directory.
        """
        self._run_dir = RunDir(root.resolve())
        if not self._run_dir.config.is_file():
            raise ValueError(
                f"--watch {root} is no run directory: it has no {self._run_dir.config.name}; "
                "give the folder that a run has printed"
            )
        # Never the servers that generate for the run: an evaluation loads other weights into them.
        self._overrides, self._options = ("rollout.servers=''", *overrides), options
        self._until_end, self._say = until_end, say
        self._poll_s, self._patience_s = poll_s, patience_s
        self._prepare, self._measure, self._state = prepare, measure, state
        self._checkpoints = CheckpointFolder(self._run_dir.checkpoints)
        self._left_out: set[int] = set()
        self._failed: Counter[int] = Counter()
        self._ended_s: float | None = None  # since when the run has ended without being done
        self._signal: signal.Signals | None = None
        self._stop = Event()

    def run(self) -> int:
        """The exit code: 0 when the run has ended, 1 when a version could not be measured, 130 or
        143 when interrupted. Raises ValueError for wrong input."""
        folder = self._run_dir.watched
        before = {number: signal.getsignal(number) for number in SIGNALS}
        sink = WatchSink(self._run_dir, self._overrides, say=self._say)
        try:
            with WatchLease(folder):
                self._listen()
                code = self._follow(sink)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        line = f"{len(folder.versions())} versions are measured, in {folder.root}"
        sink.close(line)
        self._say(line)
        return code

    def _follow(self, sink: WatchSink) -> int:
        while self._signal is None:
            # Read first: a run that has ended writes no further checkpoint.
            is_over = self._is_over() if self._until_end else False
            todo = self._todo()
            if todo:
                code = self._measure_version(todo[0], sink)
                self._listen()  # the evaluation had handlers of its own
                if code:
                    return code
            elif is_over:
                return 0
            else:
                self._stop.wait(self._poll_s)
        return 128 + self._signal

    def _is_over(self) -> bool:
        state = self._state(self._run_dir.root)
        if state in (RunState.RUNNING, RunState.STUCK):
            self._ended_s = None
            return False
        now_s = time.monotonic()
        self._ended_s = now_s if self._ended_s is None else self._ended_s
        return state is RunState.DONE or now_s - self._ended_s >= self._patience_s

    def _todo(self) -> list[int]:
        """Versions to measure, ascending. A result of other weights, from before a resume, does
        not count."""
        versions = [BASE, *(v for v in self._checkpoints.versions() if v != BASE)]
        return [v for v in versions if v not in self._left_out and not self._is_measured(v)]

    def _is_measured(self, version: int) -> bool:
        settings = self._run_dir.watched.read(version).get("settings")
        if not isinstance(settings, dict):
            return False
        return settings.get("checkpoint_sums") == self._sums(version)

    def _sums(self, version: int) -> str:
        """What tells two checkpoints of one version apart: a digest of their manifest."""
        if version == BASE:
            return ""
        path = self._checkpoints.path(version) / STATE / MANIFEST
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            return ""

    def _measure_version(self, version: int, sink: WatchSink) -> int:
        """0, or the exit code of the watch."""
        folder, sums = self._run_dir.watched, self._sums(version)
        out = folder.result(version)
        try:
            job = self._job(version, out, sums)
            self._check_alike(job.settings, except_for=version)
            self._drop_stale(version, sums)
            code = self._measure(job, out=out, say=self._say)
        except (ValueError, OSError) as error:
            if self._is_gone(version, sums):
                return 0
            if version == BASE:
                self._left_out.add(BASE)
                self._say(f"the base model is not measured: {' '.join(str(error).split())}")
                return 0
            raise
        if code == 1:
            return 0 if self._is_gone(version, sums) else self._count_failure(version)
        if code:
            return code
        if not self._is_gone(version, sums):
            sink.add(watched_row(version, folder.read(version)))
        return 0

    def _job(self, version: int, out: Path, sums: str) -> Job:
        checkpoint = None if version == BASE else self._checkpoints.path(version)
        options = replace(self._options, checkpoint=checkpoint, out=out)
        job = self._prepare(str(self._run_dir.config), self._overrides, options)
        settings = {**job.settings, "version": version, "checkpoint_sums": sums}
        return replace(job, settings=settings)

    def _check_alike(self, settings: dict[str, Any], *, except_for: int) -> None:
        """Raises ValueError if other versions were measured in another way."""
        folder = self._run_dir.watched
        for version in folder.versions():
            before = folder.read(version).get("settings")
            if version == except_for or not isinstance(before, dict):
                continue
            for name in settings:
                if name not in OWN_SETTINGS and before.get(name) != settings[name]:
                    raise ValueError(
                        f"{folder.root} has results with other settings: {name} was "
                        f"{before.get(name)!r}, is {settings[name]!r}; use the same settings, or "
                        "move that folder away"
                    )
            return

    def _drop_stale(self, version: int, sums: str) -> None:
        """Removes what an earlier watch has measured of other weights."""
        folder = self._run_dir.watched
        partial = folder.result(version).with_name(f"{folder.result(version).name}.partial.jsonl")
        if folder.result(version).exists():  # else `_todo` would not have named the version
            folder.result(version).unlink()
        if partial.exists() and f'"checkpoint_sums": "{sums}"'.encode() not in _head(partial):
            partial.unlink()

    def _is_gone(self, version: int, sums: str) -> bool:
        """Whether the checkpoint was removed, or replaced after a resume, meanwhile."""
        if version == BASE or (
            self._checkpoints.path(version).is_dir() and self._sums(version) == sums
        ):
            return False
        self._say(f"version {version} was removed while it was measured")
        return True

    def _count_failure(self, version: int) -> int:
        self._failed[version] += 1
        if self._failed[version] >= MAX_FAILED:
            self._say(f"version {version} failed {MAX_FAILED} times; the watch ends")
            return 1
        self._say(f"version {version} is tried again")
        self._stop.wait(self._poll_s)
        return 0

    def _listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        self._stop.set()


def _head(path: Path) -> bytes:
    """The first line, which has the settings."""
    with path.open("rb") as file:
        return file.readline()
