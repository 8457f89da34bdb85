"""Plain progress output: one line per step, and every other line of a run.

In: rows of metrics from the driver, lines from every part of the runtime. Out: text on standard
output. A closed pipe or terminal never ends the run. `sinks.open_progress` chooses between this
and the live display.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TextIO, cast

from dapo_async.tracking.faults import LOW_ESS


class Outlet:
    """A text stream that never raises when the pipe, terminal or disk behind it is gone.

    Later output then goes to the null device, and `lost` is True. Has every method of its stream,
    so it may stand in for `sys.stdout`.
    """

    @classmethod
    def on(cls, stream: TextIO | Outlet) -> Outlet:
        """`stream`, if it is one already, else a new one."""
        return stream if isinstance(stream, Outlet) else cls(stream)

    def __init__(self, file: TextIO) -> None:
        self._file, self.lost = file, False

    def write(self, text: str) -> int:
        try:
            return self._file.write(text)
        except UnicodeEncodeError:  # the stream's encoding lacks a character
            encoding = self._file.encoding or "ascii"
            return self._file.write(text.encode(encoding, "replace").decode(encoding))
        except OSError:
            self._redirect_to_null()
            return len(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError:
            self._redirect_to_null()

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def encoding(self) -> str:
        return self._file.encoding or "ascii"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _redirect_to_null(self) -> None:
        """Redirects the file descriptor itself.

        Python would otherwise raise again at exit, when it flushes the stream's buffer.
        """
        self.lost = True
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (self._file, sys.stderr):
            if stream is self._file or stream.isatty():
                os.dup2(null, stream.fileno())
        os.close(null)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Standard output and standard error raise nothing in this block, whatever they are.

    A standard stream that is closed becomes the null device: else the next file that is opened
    would get its number, and with it what any library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
    before = sys.stdout, sys.stderr
    outlets = [Outlet(stream or open(os.devnull, "w")) for stream in before]  # noqa: SIM115
    sys.stdout, sys.stderr = cast(list[TextIO], outlets)
    try:
        yield
    finally:
        for outlet in outlets:
            outlet.flush()
        sys.stdout, sys.stderr = before


class Progress:
    """Plain lines, for standard output that is a file, a pipe or a job's log."""

    def __init__(self, out: Outlet, *, num_steps: int, max_staleness: int) -> None:
        self._out, self._num_steps, self._max_staleness = out, num_steps, max_staleness

    def say(self, line: str) -> None:
        """Prints one line and flushes it."""
        self._out.write(line + "\n")
        self._out.flush()

    def step(self, row: Mapping[str, Any]) -> None:
        """Shows one row of metrics.jsonl."""
        self.say(step_line(row, num_steps=self._num_steps, max_staleness=self._max_staleness))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Takes one evaluation: at least `version`, `accuracy` and `mean_response_tokens`.

        Only the live display shows it; the runtime prints the line of an evaluation itself.
        """

    def close(self) -> None:
        """Stops a live display; `say` still works afterwards."""

    @property
    def caught(self) -> Counter[str]:
        """Errors of the output, by name, that did not reach the run."""
        return Counter({"display": 1} if self._out.lost else {})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def low_ess(row: Mapping[str, Any]) -> str:
    """The early warning of stale tokens, or an empty text."""
    share = row.get("behaviour_ess", 1.0)
    return f"effective samples {share:.0%}" if share < LOW_ESS else ""


def step_line(row: Mapping[str, Any], *, num_steps: int, max_staleness: int) -> str:
    """One line for one row of metrics.jsonl; steps are counted from 1."""
    entropy, staleness = row.get("entropy", float("nan")), row.get("staleness", float("nan"))
    parts = [
        f"step {row['version']:>3}/{num_steps} {row['time_s']:6.1f} s",
        f"accuracy {row['accuracy']:.2f}",
        f"length {row['response_tokens']:5.1f}",
        f"entropy {entropy:.2f}",
        f"staleness {staleness:.2f} (max {row['group_staleness_max']:.0f}/{max_staleness})",
        f"{row['tokens_per_s']:6.0f} tok/s",
        f"idle learner {row['idle.learner']:4.0%} rollout {row['idle.rollout']:4.0%}",
    ]
    rejected = [
        f"-{row[name]} {name.removeprefix('rejected.')}"
        for name in sorted(row)
        if name.startswith("rejected.")
    ]
    return "  ".join(filter(None, [*parts, low_ess(row), " ".join(rejected)]))
