"""One sink of metrics behind a thread with a bounded queue, so that training never waits for it.

In: rows from the driver. Out: calls of a writer, such as `tensorboard_writer`, which is opened and
used in that thread only. Every error is counted in `caught`, and the first one is printed: the run
directory has everything anyway.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from dapo_async.config import redacted
from dapo_async.tracking.metric_names import finite_numbers

MAX_WAITING = 10_000  # calls in the queue; further rows are only in the run directory


class MetricSink(Protocol):
    """What `Sinks` calls. No method raises or waits, except that `finish` has a deadline."""

    caught: Counter[str]

    def start(self) -> None: ...

    def log_step(self, row: Mapping[str, Any]) -> None: ...

    def log_evaluation(self, row: Mapping[str, Any]) -> None: ...

    def finish(self, status: str, reason: str, *, deadline_s: float) -> None: ...


class MetricWriter(Protocol):
    """What a thread calls. Any method may raise."""

    def log(self, step: int, values: Mapping[str, float], *, time_s: float) -> None: ...

    def close(self, status: str, reason: str) -> None: ...


class ThreadedSink:
    """A `MetricSink` over a writer."""

    def __init__(
        self, name: str, open_writer: Callable[[], MetricWriter], *, say: Callable[[str], None]
    ) -> None:
        """`name` begins the names of its errors. `open_writer` may import what takes seconds."""
        self.caught: Counter[str] = Counter()
        self._name, self._open_writer, self._say = name, open_writer, say
        self._queue: SimpleQueue[Callable[[MetricWriter], None]] = SimpleQueue()
        self._is_over = False
        self._thread = Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Opens the writer in the background."""
        self._thread.start()

    def log_step(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl, at its `version`: steps count from 1."""
        self.log(int(row["version"]), finite_numbers(row))

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """One evaluation: its numbers as `evaluation/NAME`, at the version it measured."""
        self.log(int(row["version"]), finite_numbers(row, prefix="evaluation."))

    def finish(self, status: str, reason: str, *, deadline_s: float) -> None:
        """Writes the rest and closes. What is not written by the deadline is given up."""
        if self._thread.ident is None:  # the run ended before its actors had started
            self.start()
        shown = redacted(reason)

        def close(writer: MetricWriter) -> None:
            self._is_over = True
            writer.close(status, shown)

        self._queue.put(close)
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._report("late", f"has not taken everything within {deadline_s:g} s")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Any metrics of one step."""
        time_s = time.time()
        if self._queue.qsize() < MAX_WAITING:
            self._queue.put(lambda writer: writer.log(step, values, time_s=time_s))
        elif not self._is_over:
            self._report("queue full", f"has {MAX_WAITING} calls waiting")

    def _work(self) -> None:
        try:
            writer = self._open_writer()
        except Exception as error:  # noqa: BLE001 (a library, a disk or a network may raise anything)
            self._is_over = True
            self._note(error, "can't be opened and gets nothing")
            return
        while not self._is_over:
            call = self._queue.get()
            try:
                call(writer)
            except Exception as error:  # noqa: BLE001 (as above; the next call may succeed)
                self._note(error, "refuses a call")

    def _note(self, error: Exception, what: str) -> None:
        why = " ".join(str(error).split())[:300].rstrip(".;") or repr(error)
        self._report(type(error).__name__, f"{what}: {why}")

    def _report(self, kind: str, why: str) -> None:
        is_first = not self.caught
        self.caught[f"{self._name}: {kind}"] += 1
        if is_first:
            line = f"{self._name} {why}; the run goes on, and its folder has everything"
            self._say(redacted(line))
