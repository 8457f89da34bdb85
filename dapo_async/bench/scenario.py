"""Sections of a scenario for the planner, from the rows of a benchmark.

A scenario has the speed of an engine as `step_s[n] + context_s · K` seconds per decode step, with n
running sequences and K tokens of context in all, and that of a learner as seconds per token. See
`planner.EngineSpeed` and `planner.LearnerSpeed`. The publish is that of the first row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dapo_async.bench.figures import BenchResult, BenchRow

DIGITS = 4
MOST_SLOWDOWN = 4.0  # of a side while the other one works; more is noise
MOST_CONTEXT = 0.9  # of a measured step: what the context may explain


def scenario_of_results(files: Sequence[Path]) -> dict[str, Any]:
    """The sections that these results of `--json` tell, without the slots; later files win.

    Raises ValueError for a file that is no result, or that tells none.
    """
    sections: dict[str, Any] = {}
    for file in files:
        found = scenario_of(BenchResult.read(file).rows, slots=0)
        if not found:
            raise ValueError(f"{file} has no figures for a scenario; measure again")
        sections |= found
    if "engine" in sections:
        del sections["engine"]["slots"]
    return sections


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
        # While both sides take no time nothing overlaps, so it is an upper bound.
        (row,) = kinds["replay"]
        rest_s = row.figures["step_s"].median - float(row.what.get("learner step s", 0.0))
        sections["control"] = {"fetch_s": _rounded(max(0.0, rest_s))}
    if "end-to-end" in kinds:
        sections |= _sides({str(row.what["replaced"]): row for row in kinds["end-to-end"]}, slots)
    return sections


def _sides(rows: Mapping[str, BenchRow], slots: int) -> dict[str, Any]:
    """Both sides' rates within the loop, and how much they slow each other.

    A side's work takes longer while the other side works, on shared cores. The row of both sides
    has this slowdown for the share of time in which the other one works.
    """
    alone = {
        "engine": _median(rows.get("learner"), "decode_step_s"),
        "learner": _median(rows.get("rollout"), "train_token_s"),
    }
    both = rows.get("nothing")
    sections: dict[str, Any] = {}
    if publishes := both or rows.get("learner"):
        sections["publish"] = _publish(publishes)
    if alone["engine"]:
        sections["engine"] = {"slots": slots, "step_s": _rounded(alone["engine"])}
    if alone["learner"]:
        sections["learner"] = {"token_s": _rounded(alone["learner"])}
    idle, decoding = _median(both, "idle_learner"), _median(both, "decoding")
    if None in alone.values() or idle is None or not decoding:
        return sections
    together = {
        "engine": (_median(both, "decode_step_s"), 1 - idle),
        "learner": (_median(both, "train_token_s"), decoding),
    }
    sections["shared"] = {
        side: _rounded(_slowdown((taken or 0.0) / (alone[side] or 1.0), share))
        for side, (taken, share) in together.items()
    }
    return sections


def _slowdown(ratio: float, share: float) -> float:
    """While the other side works, if work takes `ratio` times as long over a time of which the
    other side works in this `share`: 1/ratio = 1 - share + share / slowdown."""
    if ratio <= 1 or share <= 0:
        return 1.0
    return 1 / max(1 / MOST_SLOWDOWN, 1 - (1 - 1 / ratio) / share)


def _median(row: BenchRow | None, figure: str) -> float | None:
    return row.figures[figure].median if row is not None and figure in row.figures else None


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
