"""Sections of a scenario for the planner, from the rows of a benchmark.

A scenario has the speed of an engine as `step_s[n] + context_s · K` seconds per decode step, with n
running sequences and K tokens of context in all, and that of a learner as seconds per token. See
`planner.EngineSpeed` and `planner.LearnerSpeed`. The publish is that of the first row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from dapo_async.bench.figures import BenchRow

DIGITS = 4
MOST_CONTEXT = 0.9  # of a measured step: what the context may explain


def scenario_of(rows: Sequence[BenchRow], *, slots: int) -> dict[str, Any]:
    """The sections that these rows tell; empty if they tell none.

    `slots`: of one engine.
    """
    kinds: dict[str, list[BenchRow]] = {}
    for row in rows:
        if row.figures:
            kinds.setdefault(str(row.what["kind"]), []).append(row)
    sections: dict[str, Any] = {}
    if "decode" in kinds:
        sections["engine"] = {"slots": slots, **_decode(kinds["decode"])}
    if "engine" in sections and "prefill" in kinds:
        rates = [row.figures["prefill_tokens_per_s"].median for row in kinds["prefill"]]
        sections["engine"]["prefill_s"] = _rounded(1 / median(rates))
    if "engine" in sections and "capacity" in kinds:
        (capacity,) = kinds["capacity"]
        sections["engine"]["kv_tokens"] = int(capacity.figures["kv_capacity_tokens"].median)
    if "step" in kinds:
        fastest = max(row.figures["tokens_per_s"].median for row in kinds["step"])
        sections["learner"] = {"token_s": _rounded(1 / fastest)}
    if "publish" in kinds:
        sections["publish"] = _publish(kinds["publish"][0])
    if "replay" in kinds:
        # Nothing overlaps while both sides take no time, so it is an upper bound.
        step_s = kinds["replay"][0].figures["step_s"].median
        sections["control"] = {"fetch_s": _rounded(step_s)}
    return sections


def scenario_line(sections: Mapping[str, Any]) -> str:
    """The sections as YAML on one line."""
    return ", ".join(f"{name}: {_flow(value)}" for name, value in sections.items())


def _decode(rows: Sequence[BenchRow]) -> dict[str, Any]:
    """Least squares: one `step_s` per number of running sequences, and `context_s` for all."""
    points: dict[int, list[tuple[float, float]]] = {}  # (tokens of context, seconds)
    for row in rows:
        running, context = int(row.what["running"]), int(row.what["context"])
        seconds = row.figures["decode_step_s"].median
        points.setdefault(running, []).append((running * context, seconds))
    means = {
        running: (fmean(x for x, _ in each), fmean(y for _, y in each))
        for running, each in points.items()
    }
    products = squares = 0.0
    for running, each in points.items():
        mean_x, mean_y = means[running]
        products += sum((x - mean_x) * (y - mean_y) for x, y in each)
        squares += sum((x - mean_x) ** 2 for x, _ in each)
    # Noise must not make a step, or what the context adds to it, negative.
    most = min(MOST_CONTEXT * y / x for x, y in means.values())
    context_s = min(max(0.0, products / squares), most) if squares else 0.0
    step_s = {running: _rounded(y - context_s * x) for running, (x, y) in sorted(means.items())}
    return {"step_s": step_s, "context_s": _rounded(context_s)}


def _publish(row: BenchRow) -> dict[str, float]:
    """An engine can't stand still longer than the publish takes."""
    seconds, pause_s = (row.figures[name].median for name in ("publish_s", "standstill_s"))
    return {"seconds": _rounded(seconds), "pause_s": _rounded(min(pause_s, seconds))}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _flow(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return "{" + ", ".join(f"{name}: {_flow(each)}" for name, each in value.items()) + "}"
