"""What limits a run: faults first, then the slower side, with the next thing to change.

In: rows of metrics.jsonl in order, and the layout of the run. Out: findings in one sentence each;
`faults.py` has the rules about faults.
Nothing here reads a clock or a file. `sinks.py` prints a finding when it is new; `summary.json` has
the sentence on the whole run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from dapo_async.config import Config
from dapo_async.planner.from_run import has_rates
from dapo_async.tracking.faults import WINDOW, Finding, Row, acceptance_of, faults, mean_of
from dapo_async.tracking.next_split import added_rates, compared, next_split

IDLE = 0.1  # below this share a side does not wait noticeably
MUCH_LESS = 0.25  # the side whose idle share is below this times the other's limits the speed
LEAST_GAIN = 1.05  # smaller gains are not advised
PARTS = ("queued", "no_credit", "tail", "sync")


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
    shared: bool = False  # both sides take turns on the same devices

    @classmethod
    def of(cls, config: Config) -> Layout:
        learner, rollout = config.learner, config.rollout
        return cls(
            learner_devices=learner.num_ranks,
            learner_unit=learner.ranks_per_batch,
            engines=rollout.num_workers,
            engine_devices=rollout.tensor_parallel,
            num_slots=rollout.fixed_slots,
            adapts_slots=rollout.adapts_slots,
            max_staleness=config.replay.max_staleness,
            on_gpus=config.model.torch_device == "cuda",
            config=config,
            shared=config.model.is_shared,
        )

    def with_engines(self, engines: int) -> Layout:
        """The same run with so many engines, of which some have joined or left; 0: not known."""
        if engines in (0, self.engines):
            return self
        config = self.config
        if config is not None:
            config = replace(config, rollout=replace(config.rollout, num_workers=engines))
        return replace(self, engines=engines, config=config)


@dataclass(frozen=True, slots=True)
class Idle:
    """Idle shares of both sides over some steps, weighted by the seconds of the steps."""

    learner: float
    rollout: float
    parts: Mapping[str, float]  # of `rollout`
    num_slots: float = math.nan  # of one engine, mean; nan: as in the config
    efficiency: float = math.nan  # tokens/s of the engines over their best rate

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
        num_slots, efficiency = (
            mean(name) if _all_have(known, name) else math.nan
            for name in ("slots_per_engine", "efficiency.rollout")
        )
        return cls(mean("idle.learner"), mean("slots.idle"), parts, num_slots, efficiency)

    @property
    def engines(self) -> float:
        """The share of their speed that the engines lose by waiting.

        A slot may be idle without loss, because an engine with fewer sequences is as fast. And an
        engine may be slower than its best rate with all slots busy.
        """
        if math.isnan(self.efficiency):
            return self.rollout
        return min(self.rollout, 1.0 - self.efficiency)

    def slots(self, layout: Layout) -> int:
        """Of one engine in these steps."""
        return layout.num_slots if math.isnan(self.num_slots) else round(self.num_slots)

    @property
    def queue_is_long(self) -> bool:
        """Whether requests that wait for KV memory are the main reason for idle slots."""
        queued = self.parts["queued"]
        return queued >= IDLE and queued == max(self.parts.values())

    def __str__(self) -> str:
        idle = f"idle: learner {self.learner:.0%}, engine slots {self.rollout:.0%}"
        known = not math.isnan(self.efficiency)
        return f"{idle}; engines at {self.efficiency:.0%} of their best rate" if known else idle


def _all_have(rows: Sequence[Row], name: str) -> bool:
    return all(not math.isnan(row.get(name, math.nan)) for row in rows)


def bottleneck(rows: Sequence[Row], layout: Layout) -> Finding | None:
    """What limits the speed in these steps; None if nothing was measured."""
    idle = Idle.over(rows)
    if idle is None:
        return None
    if layout.shared:
        return _turns(idle, rows)
    learner, rollout = idle.learner, idle.engines
    if max(learner, rollout) < IDLE:
        return Finding("nothing", f"learner and engines are both busy ({idle})")
    if learner < IDLE or learner < MUCH_LESS * rollout:
        return _learner_limits(idle, layout, rows)
    if rollout < IDLE or rollout < MUCH_LESS * learner:
        if idle.queue_is_long:
            return _memory_limits(idle, layout, rows)
        return _generation_limits(idle, layout, rows)
    largest = max(idle.parts, key=lambda name: idle.parts[name])
    if largest == "no_credit" and mean_of(rows, "group_staleness_max") < layout.max_staleness - 0.5:
        return _admission_limits(idle)
    if largest == "queued":
        return _memory_limits(idle, layout, rows)
    return _BOTH_WAIT[largest](idle, layout)


def _turns(idle: Idle, rows: Sequence[Row]) -> Finding:
    """On shared devices there is no split to be changed."""
    total_s = sum(row["step_s"] for row in rows)
    switches = sum(row.get("switch_s", 0.0) for row in rows) / total_s
    advice = ""
    if switches >= IDLE:
        advice = "a larger replay.groups_per_step makes switches rarer"
    return _finding(
        "turns",
        "learner and engines take turns: the engines have the devices "
        f"{1 - _asleep(rows):.0%} of the time, switches take {switches:.0%}",
        idle,
        advice,
    )


def _asleep(rows: Sequence[Row]) -> float:
    """The share of time in which the learner has the engines' devices."""
    total_s = sum(row["step_s"] for row in rows)
    return sum(row.get("slots.asleep", 0.0) * row["step_s"] for row in rows) / total_s


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
    engine_work = layout.engines * size * (1.0 - idle.engines)
    now = max(1.0 - idle.learner, 1.0 - idle.engines)
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


def advised_split(idle: Idle, layout: Layout, rows: Sequence[Row]) -> tuple[int, int, float] | None:
    """Learner devices, engines and gain of a better division of the GPUs; None without one.

    The planner finds it, and the idle shares limit the gain that it promises: engines that work
    most of the time can't do with fewer GPUs (benchmarks/advice.py). Rows without the rates that
    the planner needs: by the idle shares alone.
    """
    if not layout.on_gpus:
        return None
    # An engine whose requests queue for memory is busy: its slots are too many.
    busy = replace(idle, rollout=max(0.0, idle.rollout - idle.parts["queued"]))
    if layout.config is None or not any(map(has_rates, rows)):
        return better_split(busy, layout)
    planned = next_split(rows, layout.config)
    if planned is None:
        return None
    learner_work = layout.learner_devices * (1.0 - busy.learner) / planned.learner_gpus
    engine_work = layout.engines * (1.0 - busy.engines) / planned.engines
    now, then = max(1.0 - busy.learner, 1.0 - busy.engines), max(learner_work, engine_work)
    gain = min(planned.gain, now / then) if then > 0 else planned.gain
    return (planned.learner_gpus, planned.engines, gain) if gain >= LEAST_GAIN else None


def _split_advice(idle: Idle, layout: Layout, rows: Sequence[Row]) -> str:
    """A better division of the GPUs, or an empty text."""
    split = advised_split(idle, layout, rows)
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
    advice = "; ".join(filter(None, (advice, _fewer_slots(idle, layout))))
    return _finding("the learner", "the learner limits the speed", idle, advice)


def _fewer_slots(idle: Idle, layout: Layout) -> str:
    """A number of slots that costs no speed; empty if most slots are in use."""
    slots = idle.slots(layout)
    enough = math.ceil(slots * (1.0 - idle.rollout) - 1e-6)
    if layout.adapts_slots or enough > 0.8 * slots:
        return ""
    return f"rollout.num_slots={enough} instead of {slots}: same speed, fresher tokens"


def _generation_limits(idle: Idle, layout: Layout, rows: Sequence[Row]) -> Finding:
    advice = (
        _split_advice(idle, layout, rows) or "more engines (rollout.num_workers) make it faster"
    )
    acceptance = acceptance_of(rows)
    if acceptance < 1.0 - IDLE:
        advice = f"the filters accept {acceptance:.0%} of the groups; {advice}"
    if not math.isnan(idle.efficiency) and idle.parts["no_credit"] >= IDLE:
        more = layout.max_staleness + 1
        advice += (
            f"; {idle.parts['no_credit']:.0%} of the slots have no credit: "
            f"replay.max_staleness={more} lets engines run more sequences at once"
        )
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


def change_in(rows: Sequence[Row]) -> int:
    """The step at which the balance of the two sides changes in these steps.

    The difference of the idle shares is taken as constant before and after the change; the place
    with the smallest squared error counts.
    """
    balance = [row.get("idle.learner", 0.0) - row.get("slots.idle", 0.0) for row in rows]

    def error(part: Sequence[float]) -> float:
        middle = statistics.fmean(part)
        return sum((each - middle) ** 2 for each in part)

    place = min(range(1, len(rows)), key=lambda each: error(balance[:each]) + error(balance[each:]))
    return int(rows[place]["version"])


class BottleneckWatch:
    """Takes the rows of a run one by one."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._first: Row | None = None
        self._rows: list[Row] = []  # of the window that is being filled
        self._before: list[Row] = []  # of the window before it
        self._changes: dict[int, int] = {}  # first step of a window → where its regime began
        self._faults: dict[
            str, tuple[int, int, str]
        ] = {}  # kind → first and last step, newest line
        self._windows: list[tuple[int, int, Row, Finding]] = []  # steps, mean shares, bottleneck
        self._shown: set[str] = set()  # kinds that were returned and still hold

    def add(self, row: Row) -> Finding | None:
        """Returns at most one finding after each `WINDOW` steps: the most urgent new one."""
        row = {name: value for name, value in row.items() if isinstance(value, int | float)}
        self._layout = self._layout.with_engines(int(row.get("rollout_workers", 0)))
        self._first = self._first or row
        self._rows.append(row)
        if len(self._rows) < WINDOW:
            return None
        rows, self._rows = self._rows, []
        window = self._window(rows)
        if window and self._windows and window[0][3].kind != self._windows[-1][3].kind:
            self._changes[window[0][0]] = change_in([*self._before, *rows])
        self._windows += window
        self._before = rows
        wrong = list(faults(rows, first=self._first))
        for fault in wrong:
            first, _, _ = self._faults.get(fault.kind, (int(rows[0]["version"]), 0, ""))
            self._faults[fault.kind] = first, int(rows[-1]["version"]), fault.line
        found = [*wrong, *(each[3] for each in window)]
        self._shown &= {each.kind for each in found}
        for each in found:
            if each.is_event or each.kind not in self._shown:
                self._shown.add(each.kind)
                return each
        return None

    @property
    def newest(self) -> str | None:
        """The bottleneck of the newest window; None before the first one."""
        return self._windows[-1][3].line if self._windows else None

    @property
    def faults(self) -> list[str]:
        """What was wrong in the run, with the first and the last step of each fault."""
        return [f"steps {first}-{last}: {line}" for first, last, line in self._faults.values()]

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
        starts = [self._changes.get(members[0][0], members[0][0]) for _, members in regimes]
        ends = [start - 1 for start in starts[1:]] + [windows[-1][1]]
        spans = ", ".join(
            f"by {kind} in steps {start}-{end}"
            for (kind, _), start, end in zip(regimes, starts, ends, strict=True)
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
            "slots.asleep": _asleep(rows),
            "switch_s": sum(row.get("switch_s", 0.0) for row in rows),
            "slots_per_engine": idle.slots(self._layout),
            "efficiency.rollout": idle.efficiency,
            "group_staleness_max": mean_of(rows, "group_staleness_max"),
            "offered": sum(row.get("offered", 0.0) for row in rows),
            "acceptance": acceptance_of(rows),
            **added_rates(rows),
        }
        return [(int(rows[0]["version"]), int(rows[-1]["version"]), means, found)]
