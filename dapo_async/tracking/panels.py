"""What is drawn of a run: the panels of `dynamics.png` and of the report, as numbers.

In: rows of metrics.jsonl and evaluations.jsonl. Out: traces, which `charts.py` draws. Steps are
counted from 1 on every axis: step n is the row whose `step` is n − 1 and whose `version` is n. An
evaluation of version n stands at step n, because n steps made these weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dapo_async.tracking.report_reading import RunRecord

MAX_POINTS = 400  # of one trace; a longer run is drawn as means over equal blocks of steps
REJECTED = "rejected."
HELD_OUT = "held out"


@dataclass(frozen=True, slots=True)
class Curve:
    """One column of metrics.jsonl and its name for people."""

    column: str
    label: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart. `held_out` names the column of evaluations.jsonl that is drawn beside it."""

    title: str
    curves: tuple[Curve, ...]
    caption: str
    held_out: str | None = None
    in_picture: bool = False  # also in dynamics.png


def _one(column: str, label: str = "trained") -> tuple[Curve, ...]:
    return (Curve(column, label),)


PANELS = (
    Panel(
        "Accuracy",
        _one("accuracy"),
        "Trained groups, which dynamic sampling keeps near one half, and held-out prompts.",
        held_out="accuracy",
        in_picture=True,
    ),
    Panel("Reward", _one("reward"), "Mean shaped reward of the trained rollouts.", in_picture=True),
    Panel(
        "Response length (tokens)",
        _one("response_tokens"),
        "Mean over the trained rollouts, and over the held-out prompts.",
        held_out="mean_response_tokens",
        in_picture=True,
    ),
    Panel(
        "Throughput (trained tokens/s)",
        _one("tokens_per_s"),
        "Trained tokens of a step, divided by its seconds.",
        in_picture=True,
    ),
    Panel(
        "Idle shares",
        (
            Curve("idle.learner", "learner"),
            Curve("idle.rollout", "rollout"),
            Curve("slots.idle", "rollout slots"),
        ),
        "Share of time in which a side does not work, and share of slots without a sequence.",
        in_picture=True,
    ),
    Panel(
        "Rejected groups (per step)",
        (),  # one curve for each reason that occurred
        "all correct: nothing left to learn. all wrong: no reward to learn from.",
        in_picture=True,
    ),
    Panel(
        "Entropy (nats)",
        _one("entropy"),
        "Mean over the tokens in the loss. Near 0 the policy no longer explores.",
        in_picture=True,
    ),
    Panel(
        "Probability of the chosen tokens",
        _one("probability"),
        "Mean probability that the learner gives to the sampled tokens.",
        in_picture=True,
    ),
    Panel(
        "Staleness (versions)",
        (Curve("staleness", "mean of the tokens"), Curve("group_staleness_max", "oldest group")),
        "Learner version minus the version that sampled. max_staleness bounds the oldest group.",
        in_picture=True,
    ),
    Panel(
        "Clip fractions (share of tokens)",
        (
            Curve("clip_low_fraction", "lower clip"),
            Curve("clip_high_fraction", "upper clip"),
            Curve("dual_clip_fraction", "dual clip"),
        ),
        "Tokens whose gradient a clip removes.",
        in_picture=True,
    ),
    Panel(
        "Gradient norm",
        _one("grad_norm"),
        "Before clipping, mean over the updates of a step.",
        in_picture=True,
    ),
    Panel(
        "Effective sample size (share)",
        (
            Curve("behaviour_ess", "importance ratios"),
            Curve("behaviour_weight_ess", "after the correction"),
        ),
        "Of the ratios of proximal and behaviour policy. Below 0.5 half of the batch is lost.",
        in_picture=True,
    ),
    Panel(
        "KL of behaviour and proximal policy (nats)",
        (Curve("behaviour_kl_k3", "all tokens"), Curve("mismatch_k3", "same version")),
        "Staleness and rounding together, and rounding alone.",
    ),
    Panel(
        "Truncated responses (share)",
        _one("truncated"),
        "Responses that were cut at rollout.max_response_tokens.",
        held_out="truncated",
    ),
    Panel("Acceptance (share of groups)", _one("acceptance", "accepted"), "After all filters."),
    Panel(
        "Idle slots by cause (share)",
        (
            Curve("slots.queued", "queued"),
            Curve("slots.no_credit", "no credit"),
            Curve("slots.tail", "tail"),
            Curve("slots.sync", "sync"),
        ),
        "queued: a server is short of KV memory. no credit: the learner is behind. "
        "tail: last siblings run. sync: weights are loaded.",
    ),
    Panel(
        "KV memory (share)",
        (Curve("kv.use", "in use"), Curve("prefix.hit", "prefix hits")),
        "Memory of the engines for keys and values; prompt tokens that were in it already.",
    ),
    Panel(
        "Imbalance of the learner ranks",
        _one("imbalance", "slowest rank"),
        "Time of the slowest rank, added up over the passes, over the even share. 1 is ideal.",
    ),
    Panel("Seconds per step", _one("step_s", "seconds"), "From the end of the previous step."),
)


@dataclass(frozen=True, slots=True)
class Points:
    """Places on the step axis and their values; nan is a gap.

    Where a point stands for several steps, `last_steps` has the last of them, and `low` and `high`
    the range of their values.
    """

    steps: list[float]
    values: list[float]
    last_steps: list[float]
    low: list[float]
    high: list[float]

    @property
    def in_blocks(self) -> bool:
        """Whether a point stands for several steps."""
        return self.steps != self.last_steps


@dataclass(frozen=True, slots=True)
class Trace:
    """One line of a chart: run number `run`, and `curve` numbered within its panel."""

    run: int
    run_name: str
    curve: int
    label: str
    points: Points

    @property
    def held_out(self) -> bool:
        return self.label == HELD_OUT


def traces(panel: Panel, runs: Sequence[RunRecord]) -> list[Trace]:
    """The lines of a chart, run by run; a curve without any number is left out."""
    found = []
    for number, run in enumerate(runs):
        for place, curve in enumerate(_curves(panel, runs)):
            if any(curve.column in row for row in run.rows):
                points = blocks(*series(run.rows, curve.column))
                found.append(Trace(number, run.name, place, curve.label, points))
        measured = [row for row in run.evaluations if panel.held_out in row]
        if panel.held_out and measured:
            steps = [row["version"] for row in measured]
            points = blocks(steps, [row[panel.held_out] for row in measured])
            found.append(Trace(number, run.name, -1, HELD_OUT, points))
    return found


def series(rows: Sequence[Mapping[str, float]], column: str) -> tuple[list[float], list[float]]:
    """Steps, counted from 1, and values of one column. A missing step or number is a nan.

    A reason of rejection that did not occur has no column. It counts as 0 in a step whose filters
    saw groups.
    """
    steps, values = list[float](), list[float]()
    for row in rows:
        missing = 0.0 if column.startswith(REJECTED) and "offered" in row else math.nan
        step = row["step"] + 1
        if steps and step > steps[-1] + 1:
            steps.append(steps[-1] + 1)
            values.append(math.nan)
        steps.append(step)
        values.append(row.get(column, missing))
    return steps, values


def blocks(steps: list[float], values: list[float]) -> Points:
    """All points, or for a long series the mean, minimum and maximum of equal blocks."""
    size = -(-len(steps) // MAX_POINTS)
    if size <= 1:
        return Points(steps, values, steps, values, values)
    starts = range(0, len(steps), size)
    cut = [[v for v in values[start : start + size] if not math.isnan(v)] for start in starts]
    return Points(
        steps[::size],
        [mean_known(block, without=math.nan) for block in cut],
        [steps[min(start + size, len(steps)) - 1] for start in starts],
        [min(block, default=math.nan) for block in cut],
        [max(block, default=math.nan) for block in cut],
    )


def mean_known(values: Iterable[float], *, without: float) -> float:
    """Mean of the values that are not nan; `without` if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else without


def has_lonely(values: Sequence[float]) -> bool:
    """Whether a value stands between two gaps: no line reaches it, so it needs a marker."""
    known = [False, *(not math.isnan(value) for value in values), False]
    return any(
        here and not before and not after
        for before, here, after in zip(known, known[1:], known[2:], strict=False)
    )


def _curves(panel: Panel, runs: Sequence[RunRecord]) -> tuple[Curve, ...]:
    """The panel's curves; for the rejected groups one per reason that occurred in any run."""
    if panel.curves:
        return panel.curves
    names = {name for run in runs for row in run.rows for name in row if name.startswith(REJECTED)}
    labels = {name: name.removeprefix(REJECTED).replace("_", " ") for name in names}
    return tuple(Curve(name, labels[name]) for name in sorted(names))


def in_picture() -> list[Panel]:
    """The panels of dynamics.png. Their captions are left to the report."""
    return [replace(panel, caption="") for panel in PANELS if panel.in_picture]
