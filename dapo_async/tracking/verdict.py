"""One sentence on a run: what it reached, and what limited its speed. For the report and MLflow.

In: `summary.json` and the rows of metrics.jsonl, as far as they exist. Out: plain text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dapo_async.tracking.faults import MANY_TRUNCATED
from dapo_async.tracking.report_reading import number

SAME_ACCURACY = 0.005


def verdict(summary: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> str:
    """For example: "Trained 30 steps in 0:52; held-out accuracy rose from 0.14 to 1.00; …"."""
    limit = str(summary.get("bottleneck") or "")
    faults = summary.get("faults")
    known = [str(fault) for fault in faults] if isinstance(faults, list) else [_truncated(rows)]
    parts = [_outcome(summary, rows), _accuracy(summary), limit, *known]
    return "; ".join(part for part in parts if part) + "."


def part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping within a mapping; empty where it is missing or something else."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def duration(seconds: float) -> str:
    """`234.2` as `3 min 54 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute} min" if hours else f"{minute} min {second} s"


def _outcome(summary: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> str:
    count = number(summary.get("steps"))
    steps = f"{len(rows) if math.isnan(count) else count:.0f} steps"
    seconds = number(summary.get("train_s"))
    took = "" if math.isnan(seconds) else f" in {duration(seconds)}"
    status = summary.get("status")
    if status is None:
        return f"{steps} are written and there is no summary: the run goes on, or was killed"
    if status == "done":
        return f"Trained {steps}{took}"
    reason = f" ({summary['reason']})" if summary.get("reason") else ""
    names = {"solved": "Ended early", "out_of_time": "Ran out of time"}
    return f"{names.get(status, str(status).capitalize())} after {steps}{took}{reason}"


def _accuracy(summary: Mapping[str, Any]) -> str:
    first, last = (number(summary.get(f"{name}_accuracy")) for name in ("initial", "final"))
    if math.isnan(first) or math.isnan(last):
        return ""
    if abs(last - first) < SAME_ACCURACY:
        return f"held-out accuracy stayed at {last:.3f}"
    return f"held-out accuracy {'rose' if last > first else 'fell'} from {first:.3f} to {last:.3f}"


def _truncated(rows: Sequence[Mapping[str, float]]) -> str:
    share = rows[-1].get("truncated", 0.0) if rows else 0.0
    if share < MANY_TRUNCATED:
        return ""
    return f"{share:.0%} of the last step's responses were cut at rollout.max_response_tokens"
