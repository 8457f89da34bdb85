"""What limits a run: faults first, then the slower side, with the next thing to change.

In: rows of metrics.jsonl in order, and the layout of the run. Out: findings in one sentence each.
Nothing here reads a clock or a file. `sinks.py` prints a finding when it is new; `summary.json` has
the sentence on the whole run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from dapo_async.config import Config
from dapo_async.planner.from_run import has_rates
from dapo_async.tracking.next_split import added_rates, compared, next_split

WINDOW = 10  # steps that one finding is about
IDLE = 0.1  # below this share a side does not wait noticeably
MUCH_LESS = 0.25  # the side whose idle share is below this times the other's limits the speed
LEAST_GAIN = 1.05  # smaller gains are not advised
SLOW_STEP = 6.0  # times the median
LOW_ESS = 0.5  # of `behaviour_ess`: below it half of a batch's samples no longer count
LOW_ACCEPTANCE, LOW_ENTROPY = 0.3, 0.1
MANY_FAILED, MANY_CLIPPED, MANY_TRUNCATED = 0.05, 0.3, 0.2
LEARNED = 0.9  # accuracy from which on a low entropy is no fault
PARTS = ("queued", "no_credit", "tail", "sync")
Row = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the devices of a run are divided."""

    learner_devices: int
    learner_unit: int  # devices that the learner can gain or lose at once: its tensor parallelism
    engines: int
    engine_devices: int  # of one engine
    num_slots: int  # of one engine
    max_staleness: int
    on_gpus: bool  # else both sides share the cores of a machine
    adapts_slots: bool = False  # `num_slots` is what it is now
    config: Config | None = None  # with it the planner advises

    @classmethod
    def of(cls, config: Config) -> Layout:
        learner, rollout = config.learner, config.rollout
        return cls(
            learner_devices=learner.data_parallel * learner.tensor_parallel,
            learner_unit=learner.tensor_parallel,
            engines=rollout.num_workers,
            engine_devices=rollout.tensor_parallel,
            num_slots=rollout.fixed_slots,
            adapts_slots=rollout.adapts_slots,
            max_staleness=config.replay.max_staleness,
            on_gpus=config.model.torch_device == "cuda",
            config=config,
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a user should know. `kind` names it in a few words.

    An event is shown each time, a state only when it begins.
    """

    kind: str
    line: str
    is_event: bool = False


@dataclass(frozen=True, slots=True)
class Idle:
    """Idle shares of both sides over some steps, weighted by the seconds of the steps."""

    learner: float
    rollout: float
    parts: Mapping[str, float]  # of `rollout`
    num_slots: float = math.nan  # of one engine, mean; nan: as in the config

    @classmethod
    def over(cls, rows: Sequence[Row]) -> Idle | None:
        """None if no step has both shares."""
        known = [row for row in rows if not math.isnan(row.get("slots.idle", math.nan))]
        total_s = sum(row["step_s"] for row in known)
        if total_s <= 0:
            return None

        def mean(name: str) -> float:
            return sum(row.get(name, 0.0) * row["step_s"] for row in known) / total_s

        parts = {name: mean(f"slots.{name}") for name in PARTS}
        measured = all("slots_per_engine" in row for row in known)
        num_slots = mean("slots_per_engine") if measured else math.nan
        return cls(mean("idle.learner"), mean("slots.idle"), parts, num_slots)

    def slots(self, layout: Layout) -> int:
        """Of one engine in these steps."""
        return layout.num_slots if math.isnan(self.num_slots) else round(self.num_slots)

    @property
    def queue_is_long(self) -> bool:
        """Whether requests that wait for KV memory are the main reason for idle slots."""
        queued = self.parts["queued"]
        return queued >= IDLE and queued == max(self.parts.values())

    def __str__(self) -> str:
        return f"idle: learner {self.learner:.0%}, engine slots {self.rollout:.0%}"


def bottleneck(rows: Sequence[Row], layout: Layout) -> Finding | None:
    """What limits the speed in these steps; None if nothing was measured."""
    idle = Idle.over(rows)
    if idle is None:
        return None
    learner, rollout = idle.learner, idle.rollout
    if max(learner, rollout) < IDLE:
        return Finding("nothing", f"learner and engines are both busy ({idle})")
    if learner < IDLE or learner < MUCH_LESS * rollout:
        return _learner_limits(idle, layout, rows)
    if rollout < IDLE or rollout < MUCH_LESS * learner:
        return _generation_limits(idle, layout, rows)
    largest = max(idle.parts, key=lambda name: idle.parts[name])
    if largest == "no_credit" and _mean(rows, "group_staleness_max") < layout.max_staleness - 0.5:
        return _admission_limits(idle)
    if largest == "queued":
        return _memory_limits(idle, layout, rows)
    return _BOTH_WAIT[largest](idle, layout)


def better_split(idle: Idle, layout: Layout) -> tuple[int, int, float] | None:
    """The division of the same devices that makes a step shortest, and its gain.

    A side's work per step is its devices times the share of time in which they work; a side with
    other devices takes its work divided by them. Returns learner devices, engines, and the present
    step time over the expected one. None if no division gains enough. Without measured speeds of
    the engine by occupied slots this is an estimate.
    """
    size, total = (
        layout.engine_devices,
        layout.learner_devices + layout.engines * layout.engine_devices,
    )
    learner_work = layout.learner_devices * (1.0 - idle.learner)
    engine_work = layout.engines * size * (1.0 - idle.rollout)
    now = max(1.0 - idle.learner, 1.0 - idle.rollout)
    best: tuple[float, int, int] | None = None
    for engines in range(1, total // size + 1):
        devices = total - engines * size
        if devices > 0 and devices % layout.learner_unit == 0:
            time = max(learner_work / devices, engine_work / (engines * size))
            if best is None or time < best[0]:
                best = time, devices, engines
    if best is None or best[0] <= 0 or now / best[0] < LEAST_GAIN:
        return None
    return best[1], best[2], now / best[0]


def _split_advice(idle: Idle, layout: Layout, rows: Sequence[Row]) -> str:
    """A better division of the GPUs by the planner, or an empty text.

    Rows without the rates that the planner needs: by the idle shares alone.
    """
    if not layout.on_gpus:
        return ""
    if layout.config is not None and any(map(has_rates, rows)):
        planned = next_split(rows, layout.config)
        split = None
        if planned is not None:
            split = planned.learner_gpus, planned.engines, planned.gain
    else:
        # An engine whose requests queue for memory is busy: its slots are too many.
        busy = replace(idle, rollout=max(0.0, idle.rollout - idle.parts["queued"]))
        split = better_split(busy, layout)
    if split is None:
        return ""
    devices, engines, gain = split
    now = layout.learner_devices
    return (
        f"{devices} instead of {now} GPUs for the learner and rollout.num_workers={engines} "
        f"instead of {layout.engines} should be about {gain:.2f} times as fast"
    )


def _learner_limits(idle: Idle, layout: Layout, rows: Sequence[Row]) -> Finding:
    if idle.queue_is_long:
        advice = f"{_full_memory(idle, layout)}; more engines do not help, {_less_queueing(layout)}"
        return _finding("the learner", "the learner limits the speed", idle, advice)
    advice = _split_advice(idle, layout, rows)
    slots = idle.slots(layout)
    enough = math.ceil(slots * (1.0 - idle.rollout))
    if not advice and not layout.adapts_slots and enough <= 0.8 * slots:
        advice = f"rollout.num_slots={enough} is enough: same speed, fresher tokens"
    return _finding("the learner", "the learner limits the speed", idle, advice)


def _generation_limits(idle: Idle, layout: Layout, rows: Sequence[Row]) -> Finding:
    advice = (
        _split_advice(idle, layout, rows) or "more engines (rollout.num_workers) make it faster"
    )
    acceptance = _acceptance(rows)
    if acceptance < 1.0 - IDLE:
        advice = f"the filters accept {acceptance:.0%} of the groups; {advice}"
    return _finding("generation", "generation limits the speed", idle, advice)


def _memory_limits(idle: Idle, layout: Layout, rows: Sequence[Row]) -> Finding:
    split = _split_advice(idle, layout, rows)
    advice = (
        f"{_full_memory(idle, layout)}; more slots do not help, {_less_queueing(layout)}"
        f"{f'; {split}' if split else ''}"
    )
    return _finding("KV memory", "the KV memory of the engines limits the speed", idle, advice)


def _full_memory(idle: Idle, layout: Layout) -> str:
    slots = idle.slots(layout)
    running = round(slots * (1.0 - idle.rollout))
    return f"engines run {running} of {slots} slots because the KV cache is full"


def _less_queueing(layout: Layout) -> str:
    """What to change if requests queue for KV memory."""
    memory = "give the servers more memory (rollout.server_flags)"
    if layout.adapts_slots:
        return memory
    return f"lower rollout.num_slots (same speed, fresher tokens; auto finds it) or {memory}"


def _bound_limits(idle: Idle, layout: Layout) -> Finding:
    gain = 1.0 / max(1.0 - idle.learner, 1.0 - idle.rollout)
    advice = (
        f"replay.max_staleness={layout.max_staleness + 1} instead of {layout.max_staleness} gives "
        f"the engines more to do: at most {gain:.2f} times as fast"
    )
    return _finding("the staleness bound", "the staleness bound limits the speed", idle, advice)


def _admission_limits(idle: Idle) -> Finding:
    advice = (
        f"{idle.parts['no_credit']:.0%} of the slots wait for a group, though groups are fresher "
        "than replay.max_staleness allows: replay.admission=eager starts them sooner"
    )
    return _finding("admission", "admission limits the speed", idle, advice)


def _tail_limits(idle: Idle, layout: Layout) -> Finding:
    advice = (
        f"{idle.parts['tail']:.0%} of the slots wait for the end of long responses: "
        "rollout.weight_update=recompute keeps them busy"
    )
    return _finding("long responses", "long responses limit the speed", idle, advice)


def _updates_limit(idle: Idle, layout: Layout) -> Finding:
    gain = 1.0 / (1.0 - min(idle.parts["sync"], 0.9))
    advice = (
        f"new weights stop the engines for {idle.parts['sync']:.0%} of the time: "
        f"a larger replay.groups_per_step updates less often, at most {gain:.2f} times as fast"
    )
    return _finding("weight updates", "weight updates limit the speed", idle, advice)


_BOTH_WAIT: Mapping[str, Callable[[Idle, Layout], Finding]] = {
    "no_credit": _bound_limits,
    "tail": _tail_limits,
    "sync": _updates_limit,
}


def _finding(kind: str, what: str, idle: Idle, advice: str) -> Finding:
    return Finding(kind, f"{what} ({idle}){f'; {advice}' if advice else ''}")


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
    acceptance = _acceptance(rows)
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
    share = _mean(rows, "behaviour_ess")
    if not share < LOW_ESS:
        return ""
    return (
        f"effective samples {share:.0%}: the tokens are too stale for this learning rate; "
        "lower replay.max_staleness or learner.lr"
    )


def _much_clipped(rows: Sequence[Row], first: Row) -> str:
    share = _mean(rows, "clip_low_fraction") + _mean(rows, "clip_high_fraction")
    return (
        f"{share:.0%} of the tokens are clipped: lower learner.lr" if share > MANY_CLIPPED else ""
    )


def _much_truncated(rows: Sequence[Row], first: Row) -> str:
    share = _mean(rows, "truncated")
    if not share > MANY_TRUNCATED:
        return ""
    return f"{share:.0%} of the responses are cut: raise rollout.max_response_tokens"


def _no_exploration(rows: Sequence[Row], first: Row) -> str:
    now, before = _mean(rows, "entropy"), first.get("entropy", math.nan)
    if not now < LOW_ENTROPY * before or _mean(rows, "accuracy") > LEARNED:
        return ""
    return (
        f"the entropy fell from {before:.2f} to {now:.3f}: responses no longer differ; "
        "raise algorithm.clip_high or lower learner.lr"
    )


def _one_slow_step(rows: Sequence[Row], first: Row) -> str:
    seconds = [row["step_s"] for row in rows]
    slowest = max(rows, key=lambda row: row["step_s"])
    median = statistics.median(seconds)
    if len(rows) < WINDOW or slowest["step_s"] < SLOW_STEP * median:
        return ""
    pauses = {
        "a checkpoint": slowest.get("checkpoint_pause_s", 0.0),
        "a publish": slowest.get("publish_pause_s", 0.0),
        "the learner's wait for a batch": slowest.get("idle.learner", 0.0) * slowest["step_s"],
    }
    longest = max(pauses, key=lambda name: pauses[name])
    return (
        f"step {slowest['version']:.0f} took {slowest['step_s']:.1f} s, the median is "
        f"{median:.1f} s; {pauses[longest]:.1f} s of it were {longest}"
    )


_FAULTS: Sequence[tuple[str, Callable[[Sequence[Row], Row], str]]] = (
    ("not finite", _not_finite),
    ("engines lost", _engines_lost),
    ("verifier failures", _unjudged),
    ("groups without gradient", _no_gradient),
    ("stale tokens", _few_effective),
    ("clipping", _much_clipped),
    ("truncation", _much_truncated),
    ("entropy", _no_exploration),
    ("slow step", _one_slow_step),
)
_EVENTS = {"not finite", "engines lost", "slow step"}


def _acceptance(rows: Sequence[Row]) -> float:
    """The share of the offered groups that the filters accepted; 1 if none was offered."""
    offered = sum(row.get("offered", 0.0) for row in rows)
    accepted = sum(row.get("offered", 0.0) * row.get("acceptance", 1.0) for row in rows)
    return accepted / offered if offered else 1.0


def _mean(rows: Sequence[Row], name: str) -> float:
    """The mean over the steps that have the number, else nan."""
    values = [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]
    return statistics.mean(values) if values else math.nan


class BottleneckWatch:
    """Takes the rows of a run one by one."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._first: Row | None = None
        self._rows: list[Row] = []  # of the window that is being filled
        self._windows: list[tuple[int, int, Row, Finding]] = []  # steps, mean shares, bottleneck
        self._shown: set[str] = set()  # kinds that were returned and still hold

    def add(self, row: Row) -> Finding | None:
        """Returns at most one finding after each `WINDOW` steps: the most urgent new one."""
        row = {name: value for name, value in row.items() if isinstance(value, int | float)}
        self._first = self._first or row
        self._rows.append(row)
        if len(self._rows) < WINDOW:
            return None
        rows, self._rows = self._rows, []
        window = self._window(rows)
        self._windows += window
        found = [*faults(rows, first=self._first), *(each[3] for each in window)]
        self._shown &= {each.kind for each in found}
        for each in found:
            if each.is_event or each.kind not in self._shown:
                self._shown.add(each.kind)
                return each
        return None

    def split(self) -> dict[str, Any] | None:
        """What the planner says about the last steps, for summary.json; None without rates."""
        if self._layout.config is None:
            return None
        return compared([means for _, _, means, _ in self._windows[-1:]], self._layout.config)

    def summary(self) -> str | None:
        """One sentence on the whole run: its bottleneck, or its bottlenecks by steps."""
        rest = self._rows if len(self._rows) >= WINDOW // 2 or not self._windows else []
        windows = [*self._windows, *self._window(rest)]
        if not windows:
            return None
        regimes = [
            (kind, [*members]) for kind, members in groupby(windows, key=lambda each: each[3].kind)
        ]
        if len(regimes) == 1:
            found = bottleneck([means for _, _, means, _ in windows], self._layout)
            return found.line if found else None
        spans = ", ".join(
            f"by {kind} in steps {members[0][0]}-{members[-1][1]}" for kind, members in regimes
        )
        last = bottleneck([means for _, _, means, _ in regimes[-1][1]], self._layout)
        return f"limited {spans}; at the end: {last.line}" if last else f"limited {spans}"

    def _window(self, rows: Sequence[Row]) -> list[tuple[int, int, Row, Finding]]:
        """At most one: the first and last step, the means, and the bottleneck."""
        idle, found = Idle.over(rows), bottleneck(rows, self._layout)
        if idle is None or found is None:
            return []
        means = {
            "step_s": sum(row["step_s"] for row in rows),
            "idle.learner": idle.learner,
            "slots.idle": idle.rollout,
            **{f"slots.{name}": share for name, share in idle.parts.items()},
            "slots_per_engine": idle.slots(self._layout),
            "group_staleness_max": _mean(rows, "group_staleness_max"),
            "offered": sum(row.get("offered", 0.0) for row in rows),
            "acceptance": _acceptance(rows),
            **added_rates(rows),
        }
        return [(int(rows[0]["version"]), int(rows[-1]["version"]), means, found)]
