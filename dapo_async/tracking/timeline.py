"""Law 6 made visible: the spans of every actor's state clock, as totals, idle shares and a Chrome/Perfetto trace with one row per actor."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from dapo_async.utils.state_clock import Span


class Timeline:
    """Collects the spans that the actors hand over."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Span]] = defaultdict(list)

    def add(self, actor: str, spans: Iterable[Span]) -> None:
        """Appends `actor`'s newest spans; a span that goes on where the last one was cut joins it."""
        row = self.spans[actor]
        for span in spans:
            if row and (row[-1].state, row[-1].detail, row[-1].end_s) == (
                span.state,
                span.detail,
                span.start_s,
            ):
                row[-1] = Span(span.state, row[-1].start_s, span.end_s, span.detail)
            elif span.end_s > span.start_s:
                row.append(span)

    def totals(
        self, actor: str, *, start_s: float = 0.0, end_s: float = float("inf")
    ) -> dict[str, float]:
        """Seconds per state within a window, largest first."""
        totals: dict[str, float] = defaultdict(float)
        for span in self.spans[actor]:
            totals[span.state] += max(0.0, min(span.end_s, end_s) - max(span.start_s, start_s))
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def idle_share(self, actor: str, busy: Iterable[str], *, start_s: float, end_s: float) -> float:
        """1 − the share of the window that `actor` spent in a busy state."""
        totals = self.totals(actor, start_s=start_s, end_s=end_s)
        return (
            1.0 - sum(totals.get(state, 0.0) for state in busy) / (end_s - start_s)
            if end_s > start_s
            else 0.0
        )

    def write(self, path: Path) -> None:
        """Chrome's trace event format (microseconds); opens in Perfetto and chrome://tracing."""
        events: list[dict[str, object]] = []
        for pid, (actor, spans) in enumerate(sorted(self.spans.items()), start=1):
            events.append(
                {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": actor}}
            )
            events += [
                {
                    "name": span.state,
                    "cat": actor,
                    "ph": "X",
                    "ts": round(span.start_s * 1e6),
                    "dur": round(span.end_s * 1e6) - round(span.start_s * 1e6),
                    "pid": pid,
                    "tid": 0,
                    "args": {"detail": span.detail} if span.detail else {},
                }
                for span in spans
            ]
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
