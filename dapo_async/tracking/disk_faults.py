"""What a run does when the disk refuses a write: it goes on, warns once and counts.

In: errors of writes from every part of the driver, and rows of metrics. Out: one line per kind of
file, counts for `summary.json`, and the rows on disk as soon as there is space again.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dapo_async.utils.files import disk_fault

MOST_WAITING = 10_000  # rows in memory; the oldest ones are dropped then


class DiskFaults:
    """Counts refused writes by kind of file; the first one of each kind is printed."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.counts: Counter[str] = Counter()
        self._say = say

    def note(self, what: str, why: str | None, *, consequence: str, count: int = 1) -> None:
        """`why`: the error of the system; `consequence`: what the user loses or gets later."""
        first = what not in self.counts
        self.counts[what] += count
        if first:
            self._say(f"{what} can't be written: {why or 'the disk refused it'}; {consequence}")


class RowFile:
    """Appends rows to a file of JSON lines. What the disk refuses waits in memory."""

    def __init__(self, path: Path, faults: DiskFaults) -> None:
        self._path, self._faults = path, faults
        self._waiting: deque[bytes] = deque()

    def append(self, values: Mapping[str, Any]) -> None:
        """Adds a flat JSON object; null stands for nan and infinity."""
        self._waiting.append(row_bytes(values))
        try:
            self.flush()
        except OSError as error:
            self._faults.note(
                self._path.name,
                disk_fault(error) or str(error),
                consequence="the run goes on, and its rows are written when there is space",
            )
            if len(self._waiting) > MOST_WAITING:
                self._waiting.popleft()
                what = f"rows of {self._path.name}"
                consequence = f"only the newest {MOST_WAITING} rows are kept in memory"
                self._faults.note(what, None, consequence=consequence)

    def flush(self) -> None:
        """Writes the rows that wait. Raises OSError if the disk refuses them."""
        if self._waiting:
            append_whole(self._path, self._waiting)
            self._waiting.clear()


def row_bytes(values: Mapping[str, Any]) -> bytes:
    """A line of JSON; null stands for nan and infinity."""
    known = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    return json.dumps(known, allow_nan=False).encode() + b"\n"


def append_whole(path: Path, lines: Sequence[bytes] | deque[bytes]) -> None:
    """Appends all `lines` or none. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        try:
            rest = memoryview(b"".join(lines))
            while rest:
                rest = rest[os.write(file, rest) :]
        except OSError:
            with suppress(OSError):  # the first error is the one to report
                os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def append_lines(path: Path, text: str) -> None:
    """As `append_whole`, for a file that is never read during a run: a line that a kill has cut is
    ended first. Raises OSError."""
    whole = True
    with suppress(FileNotFoundError), path.open("rb") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            whole = file.read() == b"\n"
    append_whole(path, [b"" if whole else b"\n", text.encode()])
