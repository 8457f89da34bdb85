"""What happened to each group and when: `groups.jsonl` in the run directory (L3).

In: events of the replay actor. Out: JSON lines in order of time, for `dapo-async trace`, and points
of flow arrows for `timeline.json`. Events of one moment that differ only in their group share a
line. Times (`t`) are seconds since the line `start` of the same incarnation.

    start        time_s (since the epoch), incarnation, version (of the learner)
    admitted     worker, version (that all engines serve), rows (of the data set)
    offered      worker, accuracy, reward (means), tokens (per sibling), made (`group_record`)
    refused      reason; the offer belongs to no open admission
    rejected     reason
    evicted
    given_up     why; `failed` follows
    failed
    handed_back  tokens; another engine is to generate the group
    taken        step (of the learner)
    returned     step; it ended early, and the group is a finished one again
    trained      or skipped
    released     version; all engines serve it, and the credit is free
    unused       the run has ended

In memory there are at most `MOST_LINES` lines, and a time of each followed group in flight.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dapo_async.tracking.disk_faults import append_lines
from dapo_async.types import GroupFacts

MOST_LINES = 1000  # in memory; then they are to be written
MOST_POINTS = 10_000  # of flow arrows, until the driver takes them
SAME_MOMENT_S = 0.005
# Events after which a group comes no more.
LAST = frozenset(("rejected", "evicted", "failed", "unused", "released"))


@dataclass(frozen=True, slots=True)
class FlowPoint:
    """One point of a group's arrow: in the bar of `actor` at a time, or within a training step."""

    group_id: int
    phase: str  # of Chrome's format: s starts an arrow, t continues it, f ends it
    actor: str = ""
    time_s: float = 0.0
    step: int | None = None  # then actor and time are those of its training


@dataclass(slots=True)
class _Line:
    event: str
    time_s: float
    group_ids: list[int]
    fields: dict[str, Any]
    raw: str = ""  # JSON of further fields
    rows: list[int] = field(default_factory=list)

    def text(self, start_s: float) -> str:
        values: dict[str, Any] = {"event": self.event, "t": round(self.time_s - start_s, 3)}
        values |= {"group_ids": self.group_ids, **self.fields}
        if self.rows:
            values["rows"] = self.rows
        line = json.dumps(values, separators=(",", ":"))
        return f"{line[:-1]},{self.raw}}}\n" if self.raw else f"{line}\n"


class GroupLog:
    """Takes events on one thread. `append` may run on another one."""

    def __init__(
        self,
        path: Path,
        *,
        now_s: Callable[[], float],
        incarnation: str,
        version: int,
        follow_every: int,
    ) -> None:
        """`now_s`: seconds since the epoch. `follow_every`: arrows are drawn for one group in so
        many."""
        self._path, self._now_s, self._follow_every = path, now_s, follow_every
        self._start_s = now_s()
        start = {"time_s": round(self._start_s, 3), "incarnation": incarnation, "version": version}
        self._first: str = json.dumps({"event": "start", **start}, separators=(",", ":")) + "\n"
        self._lines: list[_Line] = []
        self._followed: dict[int, float] = {}  # group in flight → its admission
        self._points: deque[FlowPoint] = deque(maxlen=MOST_POINTS)
        self._writing = threading.Lock()

    @property
    def is_full(self) -> bool:
        return len(self._lines) >= MOST_LINES

    def admit(
        self, group_ids: Sequence[int], *, worker: str, version: int, rows: list[int]
    ) -> None:
        line = self._add("admitted", group_ids, worker=worker, version=version)
        line.rows += rows
        for group_id in group_ids:
            if group_id % self._follow_every == 0:
                self._followed[group_id] = line.time_s
                self._points.append(FlowPoint(group_id, "s", "replay", line.time_s))

    def offer(self, facts: GroupFacts, *, worker: str, record: str) -> None:
        """`record`: what the worker noted of the generation; empty if nothing."""
        count = len(facts.accuracies)
        self._add(
            "offered",
            [facts.group_id],
            raw=f'"made":{record}' if record else "",
            worker=worker,
            accuracy=round(sum(facts.accuracies) / count, 4),
            reward=round(sum(facts.rewards) / count, 4),
            tokens=list(facts.response_tokens),
        )
        admitted_s = self._followed.get(facts.group_id)
        if admitted_s is not None:
            self._follow_generation(facts.group_id, worker, record, admitted_s)
            self._points.append(FlowPoint(facts.group_id, "t", "replay", self._now_s()))

    def add(self, event: str, group_ids: Sequence[int], **fields: Any) -> None:
        """Any other event; see the table of the module."""
        if not group_ids:
            return
        line = self._add(event, group_ids, **fields)
        for group_id in group_ids:
            if group_id not in self._followed:
                continue
            if event == "trained":
                continue  # its point is in the learner's bar, see `trained`
            phase = "f" if event in LAST else "t"
            self._points.append(FlowPoint(group_id, phase, "replay", line.time_s))
            if event in LAST:
                del self._followed[group_id]

    def trained(self, group_ids: Sequence[int], *, step: int) -> None:
        """The learner has trained them, which the ledger books next."""
        self._points.extend(
            FlowPoint(group_id, "t", step=step)
            for group_id in group_ids
            if group_id in self._followed
        )

    def take_points(self) -> list[FlowPoint]:
        """The newest points, each given once."""
        points, self._points = list(self._points), deque(maxlen=MOST_POINTS)
        return points

    def take_text(self) -> str:
        """The newest lines, each given once, for `append`."""
        lines, self._lines = self._lines, []
        first, self._first = self._first, ""
        return first + "".join(line.text(self._start_s) for line in lines)

    def append(self, text: str) -> None:
        """Writes lines, all or none. Raises OSError."""
        with self._writing:
            append_lines(self._path, text)

    def _add(self, event: str, group_ids: Sequence[int], *, raw: str = "", **fields: Any) -> _Line:
        now_s = self._now_s()
        if self._lines and not raw:
            last = self._lines[-1]
            same = (event, fields, "") == (last.event, last.fields, last.raw)
            if same and now_s - last.time_s < SAME_MOMENT_S:
                last.group_ids += group_ids
                return last
        line = _Line(event, now_s, [*group_ids], fields, raw)
        self._lines.append(line)
        return line

    def _follow_generation(
        self, group_id: int, worker: str, record: str, admitted_s: float
    ) -> None:
        siblings = json.loads(record)["siblings"] if record else []
        starts = [sibling[0] for sibling in siblings if sibling[0] is not None]
        ends = [sibling[2] for sibling in siblings if sibling[2] is not None]
        for moment in (min(starts, default=None), max(ends, default=None)):
            if moment is not None:
                self._points.append(FlowPoint(group_id, "t", worker, admitted_s + moment / 1e3))
