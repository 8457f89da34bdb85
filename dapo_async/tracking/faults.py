"""What is wrong in a run: rules over the rows of some steps, the most urgent first.

In: rows of metrics.jsonl in order. Out: findings in one sentence each. `bottleneck.py` asks for
them every ten steps, before it says what limits the speed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

WINDOW = 10  # steps that one finding is about
SLOW_STEP = 6.0  # times the median
LOW_ESS = 0.5  # of `behaviour_ess`: below it half of a batch's samples no longer count
LOW_ACCEPTANCE, LOW_ENTROPY = 0.3, 0.1
MANY_FAILED, MANY_CLIPPED, MANY_TRUNCATED = 0.05, 0.3, 0.2
LEARNED = 0.9  # accuracy from which on a low entropy is no fault
SAME = 0.001  # of an accuracy of 0 or 1: all rollouts of a step got the same verdict
Row = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a user should know. `kind` names it in a few words.

    An event is shown each time, a state only when it begins.
    """

    kind: str
    line: str
    is_event: bool = False


def faults(rows: Sequence[Row], *, first: Row) -> Iterator[Finding]:
    """What is wrong in these steps, the most urgent first; `first` is the first row of the run."""
    for name, rule in _FAULTS:
        if line := rule(rows, first):
            yield Finding(name, line, is_event=name in _EVENTS)


def _not_finite(rows: Sequence[Row], first: Row) -> str:
    count = sum(row.get("non_finite", 0.0) > 0 for row in rows)
    if not count:
        return ""
    return (
        f"{count} of {len(rows)} steps had a loss or gradient that is not finite: lower learner.lr"
    )


def _engines_lost(rows: Sequence[Row], first: Row) -> str:
    counts = [row.get("engine_restarts", 0.0) for row in rows]
    lost = counts[-1] - counts[0]
    return f"engines were lost {lost:.0f} times: read the logs in engines/" if lost > 0 else ""


def _unjudged(rows: Sequence[Row], first: Row) -> str:
    totals = {
        name: sum(row.get(f"verdicts.{name}", 0.0) for row in rows)
        for name in {key[9:] for row in rows for key in row if key.startswith("verdicts.")}
    }
    failed, everything = totals.get("failed", 0.0), sum(totals.values())
    if not failed or failed < MANY_FAILED * everything:
        return ""
    return f"the verifier failed on {failed / everything:.0%} of the responses: see `failures`"


def _no_gradient(rows: Sequence[Row], first: Row) -> str:
    acceptance = acceptance_of(rows)
    if acceptance >= LOW_ACCEPTANCE:
        return ""
    counts = {
        name: sum(row.get(f"rejected.{name}", 0.0) for row in rows)
        for name in {key[9:] for row in rows for key in row if key.startswith("rejected.")}
    }
    most = max(counts, key=lambda name: counts[name], default="rejected").replace("_", " ")
    remedy = {"all wrong": "easier", "all correct": "harder"}.get(most)
    hint = f": {remedy} prompts cost less" if remedy else ""
    return f"only {acceptance:.0%} of the groups have a gradient, most others are {most}{hint}"


def _few_effective(rows: Sequence[Row], first: Row) -> str:
    share = mean_of(rows, "behaviour_ess")
    if not share < LOW_ESS:
        return ""
    return (
        f"effective samples {share:.0%}: the tokens are too stale for this learning rate; "
        "lower replay.max_staleness or learner.lr"
    )


def _much_clipped(rows: Sequence[Row], first: Row) -> str:
    share = mean_of(rows, "clip_low_fraction") + mean_of(rows, "clip_high_fraction")
    return (
        f"{share:.0%} of the tokens are clipped: lower learner.lr" if share > MANY_CLIPPED else ""
    )


def _much_truncated(rows: Sequence[Row], first: Row) -> str:
    share = mean_of(rows, "truncated")
    if not share > MANY_TRUNCATED:
        return ""
    return f"{share:.0%} of the responses are cut: raise rollout.max_response_tokens"


def _no_exploration(rows: Sequence[Row], first: Row) -> str:
    now, before = mean_of(rows, "entropy"), first.get("entropy", math.nan)
    if not now < LOW_ENTROPY * before or mean_of(rows, "accuracy") > LEARNED:
        return ""
    return (
        f"the entropy fell from {before:.2f} to {now:.3f}: responses no longer differ; "
        "raise algorithm.clip_high or lower learner.lr"
    )


def _no_variance(rows: Sequence[Row], first: Row) -> str:
    accuracies = [row["accuracy"] for row in rows if "accuracy" in row]
    if not accuracies or not all(min(each, 1.0 - each) <= SAME for each in accuracies):
        return ""
    if max(accuracies) - min(accuracies) > SAME or accuracies[0] > LEARNED:
        return ""  # groups differ from step to step, or the task is solved
    return (
        "all responses got the same reward, so nothing is learned: use easier prompts, or try the "
        "verifier with dapo-async grade"
    )


def _one_slow_phase(rows: Sequence[Row], first: Row) -> str:
    """One step in which something took `SLOW_STEP` times its median and made the step longer."""
    if len(rows) < WINDOW:
        return ""
    median_s = statistics.median(row["step_s"] for row in rows)
    slowest = max(rows, key=lambda row: row["step_s"])
    phases = {name: [phase(row) for row in rows] for name, phase in _PHASES.items()}
    if slowest["step_s"] >= SLOW_STEP * median_s:
        longest = max(_PHASES, key=lambda name: _PHASES[name](slowest))
        return (
            f"step {slowest['version']:.0f} took {slowest['step_s']:.1f} s, the median is "
            f"{median_s:.1f} s; {_PHASES[longest](slowest):.1f} s of it were {longest}"
        )
    for name, seconds in phases.items():
        most_s, usual_s = max(seconds), statistics.median(seconds)
        if most_s >= max(SLOW_STEP * usual_s, median_s):
            step = rows[seconds.index(most_s)]["version"]
            return (
                f"in step {step:.0f} {name} took {most_s:.1f} s, the median is {usual_s:.1f} s "
                f"(a step takes {median_s:.1f} s)"
            )
    return ""


_PHASES: Mapping[str, Callable[[Row], float]] = {
    "a checkpoint": lambda row: row.get("checkpoint_pause_s", 0.0),
    "a publish": lambda row: row.get("publish_pause_s", 0.0),
    "the learner's wait for a batch": lambda row: row.get("idle.learner", 0.0) * row["step_s"],
}


_FAULTS: Sequence[tuple[str, Callable[[Sequence[Row], Row], str]]] = (
    ("not finite", _not_finite),
    ("engines lost", _engines_lost),
    ("verifier failures", _unjudged),
    ("groups without gradient", _no_gradient),
    ("stale tokens", _few_effective),
    ("clipping", _much_clipped),
    ("truncation", _much_truncated),
    ("entropy", _no_exploration),
    ("equal rewards", _no_variance),
    ("slow phase", _one_slow_phase),
)
_EVENTS = {"not finite", "engines lost", "slow phase"}


def acceptance_of(rows: Sequence[Row]) -> float:
    """The share of the offered groups that the filters accepted; 1 if none was offered."""
    offered = sum(row.get("offered", 0.0) for row in rows)
    accepted = sum(row.get("offered", 0.0) * row.get("acceptance", 1.0) for row in rows)
    return accepted / offered if offered else 1.0


def mean_of(rows: Sequence[Row], name: str) -> float:
    """The mean over the steps that have the number, else nan."""
    values = [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]
    return statistics.mean(values) if values else math.nan
