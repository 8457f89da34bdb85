"""What a person sees of a run: one line per step, or on a terminal a live display with all other lines above it.

Rows of metrics arrive from the tracker, lines from everybody. Whatever happens to the terminal, the run goes on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO


class Outlet:
    """A text stream that outlives its reader: when the pipe or terminal behind it is closed, the rest goes nowhere, and `lost` says so."""

    def __init__(self, file: TextIO) -> None:
        self._file, self.lost = file, False

    def write(self, text: str) -> int:
        try:
            return self._file.write(text)
        except UnicodeEncodeError:  # a terminal of few letters
            encoding = self._file.encoding or "ascii"
            return self._file.write(text.encode(encoding, "replace").decode(encoding))
        except OSError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError:
            self._let_go()

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def encoding(self) -> str:
        return self._file.encoding or "ascii"

    def _let_go(self) -> None:
        """What is written from now on, by whomever, goes to the null device: a buffer that can't be emptied would raise again at the exit."""
        self.lost = True
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (self._file, sys.stderr):
            if stream is self._file or stream.isatty():
                os.dup2(null, stream.fileno())
        os.close(null)


class Progress:
    """Lines, wherever standard output goes: a file, a pipe, a job's log."""

    def __init__(self, out: Outlet, *, num_steps: int, max_staleness: int) -> None:
        self._out, self._num_steps, self._max_staleness = out, num_steps, max_staleness

    def say(self, line: str) -> None:
        """One line, at once."""
        self._out.write(line + "\n")
        self._out.flush()

    def step(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""
        self.say(step_line(row, num_steps=self._num_steps, max_staleness=self._max_staleness))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """One evaluation, `version`, `accuracy` and `mean_response_tokens` at least: for a display; its line is said by the run."""

    def close(self) -> None:
        """Nothing moves any more; `say` still works."""

    @property
    def caught(self) -> Counter[str]:
        """The troubles that the run did not hear of."""
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


def open_progress(*, num_steps: int, max_staleness: int) -> Progress:
    """The live display where standard output is a terminal that can move its cursor, else plain lines."""
    out = Outlet(sys.stdout)
    if not out.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return Progress(out, num_steps=num_steps, max_staleness=max_staleness)
    from dapo_async.tracking.live_display import LiveProgress  # rich, only for those who see it

    # A terminal that is closed takes the display with it, not the run; the actors inherit this.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return LiveProgress(out, num_steps=num_steps, max_staleness=max_staleness)


def step_line(row: Mapping[str, Any], *, num_steps: int, max_staleness: int) -> str:
    """One line that fits a terminal: where the run is, whether it learns, whether it is healthy."""
    rejected = " ".join(
        f"-{row[name]} {name.removeprefix('rejected.')}"
        for name in sorted(row)
        if name.startswith("rejected.")
    )
    entropy, staleness = row.get("entropy", float("nan")), row.get("staleness", float("nan"))
    return (
        f"step {row['step'] + 1:>3}/{num_steps} {row['time_s']:6.1f} s  accuracy {row['accuracy']:.2f}  length {row['response_tokens']:5.1f}  "
        f"entropy {entropy:.2f}  staleness {staleness:.2f} (max {row['group_staleness_max']:.0f}/{max_staleness})  "
        f"{row['tokens_per_s']:6.0f} tok/s  idle learner {row['idle.learner']:4.0%} rollout {row['idle.rollout']:4.0%}  {rejected}"
    ).rstrip()
