"""Figure 1 and Table 1 of the DAPO paper (arXiv 2503.14476) beside the runs of a report.

In: the held-out evaluations and the config of runs. Out: the curve of avg@k over the steps with
the published values, and one row per run with the rung of the table that its config stands for.
`report.py` draws both. The published values are avg@32 on AIME 2024 of Qwen2.5-32B, at temperature
1 and top-p 0.7, so they stand only beside runs that are measured on AIME 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapo_async.tracking.panels import Points, Trace
from dapo_async.tracking.report_reading import RunRecord, number

AIME_2024 = "aime24"  # in the name of the held-out problems
MODEL = "Qwen2.5-32B"
# Table 1: each rung adds one technique to the one before.
GRPO, FILTERING, CLIP_HIGHER, SOFT_OVERLONG, TOKEN_LOSS, DYNAMIC_SAMPLING = (
    ("GRPO", 0.30),
    ("+ overlong filtering", 0.36),
    ("+ clip-higher", 0.38),
    ("+ soft overlong punishment", 0.41),
    ("+ token-level loss", 0.42),
    ("+ dynamic sampling (DAPO)", 0.50),
)
R1_ZERO = ("DeepSeek-R1-Zero-Qwen-32B", 0.47)  # the line of Figure 1


@dataclass(frozen=True, slots=True)
class Measured:
    """The held-out accuracy of one run over its versions."""

    rows: Sequence[Mapping[str, float]]  # version, accuracy; low and high where known
    k: int

    @property
    def label(self) -> str:
        return f"avg@{self.k}"

    @property
    def best(self) -> Mapping[str, float]:
        """The newest of several equal ones."""
        return max(self.rows, key=lambda row: (row["accuracy"], row["version"]))

    @property
    def last(self) -> Mapping[str, float]:
        return self.rows[-1]


def measured(run: RunRecord) -> Measured | None:
    """From `eval --watch`, else from the run's own evaluations with several responses."""
    for rows in (run.watched, run.evaluations):
        known = [row for row in rows if row.get("k", 1) > 1 and "accuracy" in row]
        if known:
            k = int(known[-1]["k"])
            return Measured([row for row in known if row["k"] == k], k)
    return None


def rung(config: Mapping[str, Any]) -> tuple[str, float]:
    """The row of Table 1 for a config, by its topmost technique, and the published value."""
    if config.get("replay.dynamic_sampling"):
        return DYNAMIC_SAMPLING
    if config.get("algorithm.loss_mean") == "token":
        return TOKEN_LOSS
    if config.get("reward.overlong_cache_tokens") is not None:
        return SOFT_OVERLONG
    if number(config.get("algorithm.clip_high")) > number(config.get("algorithm.clip_low")):
        return CLIP_HIGHER
    return FILTERING if config.get("algorithm.overlong_filtering") else GRPO


def is_comparable(run: RunRecord) -> bool:
    """Whether the run is measured on the problems of the published values."""
    return AIME_2024 in str(run.config.get("data.heldout")).lower()


def curves(runs: Sequence[RunRecord]) -> list[Trace]:
    """A line per run, and a level line per published value of Figure 1."""
    found = [_curve(number, run) for number, run in enumerate(runs)]
    lines = [line for line in found if line is not None]
    if not lines or not any(is_comparable(run) for run in runs):
        return lines
    end = max(1.0, *(line.points.steps[-1] for line in lines))
    levels = (("DAPO", DYNAMIC_SAMPLING[1]), R1_ZERO)
    for place, (name, value) in enumerate(levels, start=1):
        label = f"{name}, published"
        points = Points([0.0, end], [value] * 2, [0.0, end], [value] * 2, [value] * 2)
        number = len(runs) + place
        lines.append(Trace(number, f"{label}, {MODEL}", place, label, points))
    return lines


def _curve(number: int, run: RunRecord) -> Trace | None:
    found = measured(run)
    if found is None:
        return None
    steps = [row["version"] for row in found.rows]
    values, low, high = (
        [row.get(name, row["accuracy"]) for row in found.rows]
        for name in ("accuracy", "low", "high")
    )
    return Trace(number, run.name, 0, found.label, Points(steps, values, steps, low, high))
