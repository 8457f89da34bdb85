"""What happens in a run, for machines: `events.jsonl` in the run directory (L3).

In: events from the driver. Out: one JSON line per event, written at once:

    time     UTC, ISO 8601
    run      name of the run directory
    step     the newest step of `metrics.jsonl`, counted from 1; 0 before the first
    actor    whom the event is about
    event    its name; the other keys depend on it, see docs/metrics.md

A resumed run adds to the file. An event that the disk refuses is lost, and the run goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from dapo_async.tracking.disk_faults import DiskFaults, append_lines
from dapo_async.utils.files import disk_fault


class Event(Protocol):
    """Adds one event."""

    def __call__(self, event: str, *, actor: str = "driver", **fields: Any) -> None: ...


def ignore_event(event: str, *, actor: str = "driver", **fields: Any) -> None:
    """For callers that keep no log."""


class EventLog:
    """`add` never raises. `step` is the newest step."""

    def __init__(
        self,
        path: Path,
        faults: DiskFaults,
        *,
        run: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`faults` gets the errors of writes."""
        self._path, self._faults, self._run, self._now = path, faults, run, now
        self.step = 0

    def add(self, event: str, *, actor: str = "driver", **fields: Any) -> None:
        """Writes one event. Numbers that are not finite become null."""
        time = self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": time, "run": self._run, "step": self.step, "actor": actor, "event": event}
        known = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in fields.items()
        }
        try:
            append_lines(self._path, json.dumps(line | known, allow_nan=False) + "\n")
        except OSError as error:
            reason = disk_fault(error) or str(error)
            self._faults.note(self._path.name, reason, consequence="events are lost meanwhile")
