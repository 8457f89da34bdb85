"""Measures the cells of a subject one after the other; an interrupt keeps what was measured.

In: a subject and its result, still empty. Out: the exit code; the rows are in the result, and in
its file after each cell. Called by `cli/bench.py`.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dapo_async.bench.figures import BenchResult, BenchRow, spreads
from dapo_async.bench.table import figure_text, what_text
from dapo_async.utils.files import atomic_write

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
Cell = Mapping[str, str | int | float]
Figures = Mapping[str, Sequence[float]]


class CellFailed(RuntimeError):
    """A cell can't be measured, and neither can those after it."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often each figure is measured."""

    warm_up: int  # rounds that do not count
    repeats: int

    def of(self, work: Callable[[], T]) -> list[T]:
        """What each counted round of `work` returned."""
        return [work() for _ in range(self.warm_up + self.repeats)][self.warm_up :]

    async def of_async(self, work: Callable[[], Awaitable[T]]) -> list[T]:
        """As `of`."""
        return [await work() for _ in range(self.warm_up + self.repeats)][self.warm_up :]


class BenchSubject(Protocol):
    """What is measured."""

    @property
    def cells(self) -> Sequence[Cell]:
        """Every row to measure, known before anything starts."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Lines for the user about what is not measured."""
        ...

    def measuring(self) -> AbstractContextManager[Callable[[Cell], Figures]]:
        """Starts what has to run; gives the function that measures one cell."""
        ...


def measure(
    subject: BenchSubject, result: BenchResult, *, out: Path | None, say: Callable[[str], None]
) -> int:
    """Fills `result`. Returns 0, or 130 or 143 after an interrupt.

    A cell that does not fit into the memory of the device has no figures, and the others go on.
    """
    for note in subject.notes:
        say(note)
    with _interrupts() as received:
        try:
            _measure_cells(subject, result, out=out, say=say)
            result.complete = True
        except KeyboardInterrupt:
            number = received[0] if received else signal.SIGINT
            say(
                f"{number.name}: {len(result.rows)} of {len(subject.cells)} rows were measured"
                + (f"; they are in {out}" if out and result.rows else "")
            )
            return 128 + number
        _write(result, out)
    return 0


def run_interruptible(runner: asyncio.Runner, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. A signal cancels it, and is raised when it has cleaned up."""
    loop = runner.get_loop()
    task = loop.create_task(work)
    received: list[signal.Signals] = []

    def receive(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        loop.add_signal_handler(number, receive, number)
    try:
        return loop.run_until_complete(task)
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def _measure_cells(
    subject: BenchSubject, result: BenchResult, *, out: Path | None, say: Callable[[str], None]
) -> None:
    with subject.measuring() as measure_cell:
        for number, cell in enumerate(subject.cells, start=1):
            began_s = time.monotonic()
            try:
                row = BenchRow(cell, spreads(measure_cell(cell)))
            except ValueError as error:  # all input was checked before
                raise CellFailed(f"{what_text(cell)}: {error}") from error
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                row = BenchRow(cell, {}, "out of memory")
            result.rows.append(row)
            _write(result, out)
            figures = ", ".join(figure_text(*each) for each in row.figures.items()) or row.failed
            took_s = time.monotonic() - began_s
            say(
                f"{number:>3}/{len(subject.cells)}  {what_text(row.what)}: {figures} "
                f"({took_s:.1f} s)"
            )


def _write(result: BenchResult, out: Path | None) -> None:
    if out is not None:
        atomic_write(out, json.dumps(result.to_json(), indent=1) + "\n")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


@contextmanager
def _interrupts() -> Iterator[list[signal.Signals]]:
    """SIGTERM ends the measuring as SIGINT does. Gives the signals that were received."""
    received: list[signal.Signals] = []

    def receive(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
