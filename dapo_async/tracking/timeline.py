"""Time accounting of a run: seconds per state and actor, and the trace `timeline.json` (L3).

The driver adds the spans that each actor's state clock hands over, once per step. Totals and idle
shares are sums over all spans. The trace is for people: short stays are drawn as part of the
longer ones around them, so its size depends on the number of steps, not of state changes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dapo_async.tracking.group_log import FlowPoint
from dapo_async.utils.files import atomic_write
from dapo_async.utils.state_clock import Span

SHORT_STAY_S = 0.01  # a stay shorter than this has no bar of its own
MOST_UNPLACED = 1000  # points of arrows that wait for the report of their step
KEPT_STEPS = 32  # steps whose groups may still be reported as trained


class Timeline:
    """Exact sums over the spans of every actor; each span is also passed to the trace."""

    def __init__(self, trace: TraceFile | None = None) -> None:
        self._trace = trace
        self._totals: defaultdict[str, defaultdict[str, float]] = defaultdict(
            lambda: defaultdict(float)
        )
        self._recent: defaultdict[str, list[Span]] = defaultdict(list)
        # By the name of a step: which rank trained it, and when, in the middle of it.
        self._trained: dict[str, tuple[str, float]] = {}
        self._unplaced: list[FlowPoint] = []  # in a step that no rank has reported yet

    @property
    def actors(self) -> list[str]:
        return list(self._totals)

    def add(self, actor: str, spans: Iterable[Span]) -> None:
        """Adds `actor`'s newest spans, each of them once."""
        spans = [span for span in spans if span.end_s > span.start_s]
        for span in spans:
            self._totals[actor][span.state] += span.end_s - span.start_s
            if span.state == "train":
                self._trained[span.detail] = actor, (span.start_s + span.end_s) / 2
                if len(self._trained) > KEPT_STEPS:
                    del self._trained[next(iter(self._trained))]
        self._recent[actor] += spans
        if self._trace is not None:
            self._trace.add(actor, spans)

    def flow(self, points: Iterable[FlowPoint]) -> None:
        """Draws points of the groups' arrows, those of a step as soon as a rank has reported it."""
        if self._trace is None:
            return
        placed, waiting = [], list[FlowPoint]()
        for point in (*self._unplaced, *points):
            if point.step is None:
                placed.append((point, point.actor, point.time_s))
            elif (trained := self._trained.get(f"step {point.step}")) is not None:
                placed.append((point, *trained))
            else:
                waiting.append(point)
        self._unplaced = waiting[-MOST_UNPLACED:]
        self._trace.flow(placed)

    def totals(self, actor: str) -> dict[str, float]:
        """Seconds per state so far, largest first."""
        totals = self._sums(actor)
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def seconds(
        self, actor: str, states: Collection[str], *, until_s: float = float("inf")
    ) -> float:
        """Seconds that `actor` spent in `states` until a time, which `forget` has not passed."""
        sums = self._sums(actor)
        total = sum(sums.get(state, 0.0) for state in states)
        after = sum(
            span.end_s - max(span.start_s, until_s)
            for span in self._recent.get(actor, ())
            if span.state in states and span.end_s > until_s
        )
        return total - after

    def forget(self, before_s: float) -> None:
        """Keeps only the sums of what ended before this time: no later question is about it."""
        for actor, spans in self._recent.items():
            self._recent[actor] = [span for span in spans if span.end_s > before_s]

    def _sums(self, actor: str) -> Mapping[str, float]:
        sums: Mapping[str, float] = self._totals.get(actor, defaultdict(float))
        return sums

    def close(self) -> None:
        """Completes the trace."""
        if self._trace is not None:
            self._trace.close()


@dataclass(slots=True)
class _Bar:
    """One drawn event: a stay in `state`, with the short stays in other states that it covers."""

    state: str
    detail: str
    start_s: float
    end_s: float
    own_s: float  # in `state`; the rest was spent in the states that are covered
    covered: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def of(cls, span: Span) -> _Bar:
        length_s = span.end_s - span.start_s
        return cls(span.state, span.detail, span.start_s, span.end_s, length_s)

    @property
    def is_short(self) -> bool:
        return self.end_s - self.start_s < SHORT_STAY_S

    def extend(self, span: Span) -> bool:
        """Whether `span`, which follows, is part of this bar."""
        seconds = span.end_s - span.start_s
        same = (span.state, span.detail) == (self.state, self.detail)
        if span.start_s != self.end_s or not (same or seconds < SHORT_STAY_S or self.is_short):
            return False
        if same:
            self.own_s += seconds
        elif seconds > self.own_s:  # the longest stay gives the bar its name
            self.covered[self.state] += self.own_s
            self.state, self.detail, self.own_s = span.state, span.detail, seconds
        else:
            self.covered[span.state] += seconds
        self.end_s = span.end_s
        return True


class TraceFile:
    """Chrome's trace events: a JSON array while the run goes on, an object at its end.

    Both are formats of Perfetto and chrome://tracing. Both read the array also without its closing
    bracket, as a kill leaves it.
    One row per actor; microseconds since `start_s`. `args.covered_ms` lists the short stays in
    other states that a bar covers.
    """

    def __init__(self, path: Path, *, start_s: float) -> None:
        """`start_s`: the time of the state clocks that is drawn as 0."""
        self._path, self._start_s = path, start_s
        self._bars: dict[str, _Bar] = {}  # by actor: drawn up to here, not written yet
        self._numbers: dict[str, int] = {}
        self._file: TextIO | None = None  # opened with the first event
        self._closed = False
        self.error: str | None = None  # why the file is not complete

    def add(self, actor: str, spans: Iterable[Span]) -> None:
        """Writes the bars that are complete. A bar that covers others ends with its report."""
        events: list[dict[str, Any]] = []
        for span in spans:
            bar = self._bars.get(actor)
            if bar is None or not bar.extend(span):
                if bar is not None:
                    events += self._events(actor, bar)
                self._bars[actor] = _Bar.of(span)
        bar = self._bars.get(actor)
        if bar is not None and bar.covered:
            events += self._events(actor, self._bars.pop(actor))
        self._write(events)

    def flow(self, points: Iterable[tuple[FlowPoint, str, float]]) -> None:
        """Writes points of arrows: each with its actor and time. An arrow joins the points of a
        group in order of time, and each point belongs to the bar at its time."""
        for point, actor, time_s in points:
            pid, row = self._row(actor)
            event = {
                "name": f"group {point.group_id}",
                "cat": "group",
                "ph": point.phase,
                "id": point.group_id,
                "ts": round((time_s - self._start_s) * 1e6),
                "pid": pid,
                "tid": 0,
            }
            self._write([*row, event | ({"bp": "e"} if point.phase == "f" else {})])

    def close(self) -> None:
        """Writes what is left and makes the file an object; a second call does nothing.

        Raises OSError if the file could not be written, now or during the run.
        """
        if self._closed:
            self._raise_error()
            return
        for actor, bar in self._bars.items():
            self._write(self._events(actor, bar))
        self._raise_error()
        if self._file is not None:
            self._file.close()
            events = self._path.read_text()
            atomic_write(self._path, f'{{"displayTimeUnit":"ms","traceEvents":{events}\n]}}\n')
        self._closed = True

    def _raise_error(self) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise OSError(f"{self._path} is not complete: {error}")

    def _events(self, actor: str, bar: _Bar) -> list[dict[str, Any]]:
        pid, row = self._row(actor)
        start, end = (round((time_s - self._start_s) * 1e6) for time_s in (bar.start_s, bar.end_s))
        event: dict[str, Any] = {
            "name": bar.state,
            "ph": "X",
            "ts": start,
            "dur": end - start,
            "pid": pid,
            "tid": 0,
        }
        args: dict[str, Any] = {"detail": bar.detail} if bar.detail else {}
        if bar.covered:
            args["covered_ms"] = {
                state: round(seconds * 1e3, 3) for state, seconds in bar.covered.items()
            }
        if args:
            event["args"] = args
        return [*row, event]

    def _row(self, actor: str) -> tuple[int, list[dict[str, Any]]]:
        """The number of an actor, and the event that names its row, once."""
        if actor in self._numbers:
            return self._numbers[actor], []
        self._numbers[actor] = pid = len(self._numbers) + 1
        name = {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": actor}}
        return pid, [name]

    def _write(self, events: Iterable[dict[str, Any]]) -> None:
        lines = [json.dumps(event, separators=(",", ":")) for event in events]
        if not lines or self._closed:
            return
        separator = ",\n"
        try:
            if self._file is None:
                self._file, separator = self._path.open("w"), "[\n"
            self._file.write(separator + ",\n".join(lines))
            self._file.flush()  # whole lines: what a kill leaves can be read
        except OSError as error:  # such as a full disk: a picture never ends a run
            self.error = str(error)
            self._closed = True
