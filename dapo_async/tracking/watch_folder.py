"""Results of `dapo-async eval --watch` in a run directory, and its claim on checkpoints.

    watched/lock                    locked by the one watcher, also against other machines
    watched/lease.json              while a watcher runs: {pid, host, count}; the count grows
    watched/version_000020.json     the result of one checkpoint, written by one rename
    watched/*.partial.jsonl         its finished problems, until then

Only the watcher writes here, except that a resume removes the results of versions that it trains
again. Only the driver removes checkpoints. It keeps those without a result as long as the lease
lives. A watcher that ends removes the lease. One that was killed stops counting: the driver then
drops the lease LEASE_S after it has seen the last count. Neither side compares clocks of two
machines.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

from dapo_async.utils.files import atomic_write

RENEW_S = 10.0  # between two counts of a watcher
LEASE_S = 180.0  # without a new count: the watcher is dead. NFS may show a file 60 s late
RESULT = re.compile(r"version_(\d{6,})\.json(\..+)?")


@dataclass(frozen=True, slots=True)
class WatchFolder:
    """The folder `watched/` of one run."""

    root: Path

    @property
    def lease(self) -> Path:
        return self.root / "lease.json"

    def result(self, version: int) -> Path:
        """As `dapo-async eval --json` writes it, with `version` and `checkpoint_sums` in its
        settings."""
        return self.root / f"version_{version:06d}.json"

    def versions(self) -> list[int]:
        """The measured versions, ascending."""
        found = (RESULT.fullmatch(path.name) for path in self.root.glob("version_*.json"))
        return sorted(int(match[1]) for match in found if match and not match[2])

    def read(self, version: int) -> dict[str, Any]:
        """A result; empty if it is missing or broken."""
        try:
            values = json.loads(self.result(version).read_bytes())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def rows(self) -> list[dict[str, Any]]:
        """One row per measured version, ascending: see `watched_row`."""
        rows = (watched_row(version, self.read(version)) for version in self.versions())
        return [row for row in rows if row]

    def forget(self, *, after: int) -> None:
        """Removes the results of the versions after `after`: a resumed run trains them again."""
        for path in self.root.glob("version_*"):
            match = RESULT.fullmatch(path.name)
            if match and int(match[1]) > after:
                path.unlink(missing_ok=True)


def watched_row(version: int, result: Mapping[str, Any]) -> dict[str, Any]:
    """What a result says about its version; empty for anything else than a result.

    version, k, temperature, top_p, num_prompts
    accuracy                    avg@k; `low` and `high` are its interval
    pass_at_k, maj_at_k         of all k responses
    mean_response_tokens, truncated, answered
    """
    try:
        settings, totals = result["settings"], result["totals"]
        k = int(settings["k"])
        average = totals[f"avg@{k}"]
        return {
            "version": version,
            "k": k,
            "temperature": float(settings["temperature"]),
            "top_p": float(settings["top_p"]),
            "num_prompts": int(totals["problems"]),
            "accuracy": float(average["mean"]),
            "low": float(average["low"]),
            "high": float(average["high"]),
            "pass_at_k": float(totals[f"pass@{k}"]["mean"]),
            "maj_at_k": float(totals[f"maj@{k}"]["mean"]),
            "mean_response_tokens": float(totals["mean_response_tokens"]),
            "truncated": float(totals["truncated"]),
            "answered": float(totals["answered"]),
        }
    except (KeyError, TypeError, ValueError):
        return {}


class WatchLease:
    """Held by the one watcher of a run; a thread renews it."""

    def __init__(self, folder: WatchFolder, *, renew_s: float = RENEW_S) -> None:
        """Raises ValueError if another process watches this run, or if it can't write there."""
        self._folder, self._renew_s = folder, renew_s
        try:
            folder.root.mkdir(exist_ok=True)
            self._lock = os.open(folder.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ValueError(
                f"{folder.root} can't be written: {error.strerror}; give a run directory that "
                "this process may write"
            ) from error
        try:
            # A POSIX lock of a file: NFS keeps it on its server, so it holds for all machines.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ValueError(
                    f"another process watches {folder.root.parent}; wait until it ends, or end it"
                ) from error
            raise ValueError(
                f"{folder.root / 'lock'} can't be locked: {error.strerror}; mount the file system "
                "with locks, such as NFS with local_lock=none"
            ) from error
        self._owner = {"pid": os.getpid(), "host": socket.gethostname()}
        self._count, self._ended = 0, Event()
        self._thread = Thread(target=self._keep, name="lease", daemon=True)

    def renew(self) -> None:
        """Counts on. A disk that refuses it is no reason to end: the next count may succeed."""
        self._count += 1
        values = {**self._owner, "count": self._count}
        with suppress(OSError):
            atomic_write(self._folder.lease, json.dumps(values) + "\n")

    def _keep(self) -> None:
        while not self._ended.wait(self._renew_s):
            self.renew()

    def __enter__(self) -> Self:
        self.renew()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError, ValueError):
            lease = json.loads(self._folder.lease.read_bytes())
            # A file system whose locks are local to each machine lets others watch, too.
            if lease == {**self._owner, "count": lease["count"]}:
                self._folder.lease.unlink(missing_ok=True)
        os.close(self._lock)


class WatchClaims:
    """The driver's view: which checkpoints a living watcher has still to measure."""

    def __init__(self, folder: WatchFolder, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._now_s = folder, now_s
        self._seen: tuple[str, float] | None = None  # the newest lease, and when it was new

    def unmeasured(self, versions: Sequence[int]) -> list[int]:
        """Those of `versions` that have to stay. None of them where nothing watches the run."""
        if not self._lives():
            return []
        measured = set(self._folder.versions())
        return [version for version in versions if version not in measured]

    def _lives(self) -> bool:
        try:
            lease = self._folder.lease.read_text()
        except OSError:
            return False
        now_s = self._now_s()
        if self._seen is None or self._seen[0] != lease:
            self._seen = (lease, now_s)
        return now_s - self._seen[1] < LEASE_S
