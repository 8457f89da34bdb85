"""One row of `metrics.jsonl` per step.

It joins the learner's sums, the replay actor's counts, the engines' slot use and the state clocks
of all actors. The main loop calls it after each step.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from dapo_async.algorithm import summarise
from dapo_async.algorithm.guards import RunGuards
from dapo_async.model.peak import Peak
from dapo_async.rollout import SlotUse
from dapo_async.runtime.actors.reports import ReplayReport, WorkerReport
from dapo_async.runtime.handles.actors import SHORT_S
from dapo_async.runtime.system import System
from dapo_async.runtime.throughput import (
    NO_STATE,
    BestRate,
    Devices,
    EngineCount,
    EngineFlow,
    Flow,
    Sides,
    rollout_idle,
)
from dapo_async.tracking.disk_faults import DiskFaults, RowFile
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.timeline import Timeline, TraceFile
from dapo_async.types import StepMetrics
from dapo_async.utils.state_clock import StateClock
from dapo_async.weights.handshake import HandshakeOutcome

# Asleep: the engines have its devices.
LEARNER_BUSY = ("train", "fetch", "snapshot", "checkpoint", "switch", "asleep")


@dataclass(slots=True)
class Totals:
    """What the summary needs of the whole training."""

    steps: int = 0
    tokens: float = 0.0
    staleness_sum: float = 0.0
    staleness_tokens: float = 0.0
    staleness_max: int = 0
    train_s: float = 0.0  # of earlier incarnations of the run


class Tracker:
    """Collects reports once per step, writes `metrics.jsonl`, shows rows, keeps the timeline."""

    def __init__(
        self,
        system: System,
        run_dir: RunDir,
        clock: StateClock,
        *,
        show: Callable[[dict[str, Any]], None],
        totals: Totals,
        disk: DiskFaults | None = None,
        say: Callable[[str], None] = lambda _: None,
        guards: RunGuards | None = None,
        first_step: int = 0,
        sides: Sides = Sides(),  # noqa: B008 (frozen)
        devices: Devices | None = None,
    ) -> None:
        """`show` gets each row after it is written. `totals` are those of earlier incarnations.
        `disk` counts what could not be written. `say` prints a line for the user. `guards` judge
        the steps.

        Without `devices` no use of FLOPs and bandwidth is computed.
        """
        self.clock, self.totals = clock, totals
        self.timeline = Timeline(TraceFile(run_dir.timeline, start_s=clock.began_s))
        self._busy_before_s: float | None = None  # of all ranks, before the first admission
        self._system, self._show = system, show
        self._disk = disk or DiskFaults(lambda _: None)
        self.rows = RowFile(run_dir.metrics, self._disk)
        self._say, self.num_quarantined = say, 0
        self.guards = guards or RunGuards()
        self._num_unwritten: Counter[str] = Counter()  # of the newest report of the replay actor
        self._one_at_a_time = asyncio.Lock()
        self._pending: dict[
            int, tuple[StepMetrics, int, float]
        ] = {}  # steps whose row is not written yet, and when they ended
        self._next_row, self._row_written = first_step, asyncio.Event()
        self._slots: dict[
            str, SlotUse
        ] = {}  # by worker: the newest, at the start of training, at the end of the step before
        self._slots_at_start: dict[str, SlotUse] = {}
        self._slots_before: dict[str, SlotUse] = {}
        self._sides, self._devices, self._best_rate = sides, devices, BestRate()
        self._count = EngineCount()
        self._engines: dict[str, EngineFlow] = {}  # by worker, the newest
        # By worker: the sum of its lost processes, and how many they are.
        self._lost: dict[str, EngineFlow] = {}
        self._num_lost: Counter[str] = Counter()
        self._peaks: dict[str, Peak] = {}  # of a device, by actor
        self._versions: dict[str, int] = {}  # that each engine serves
        self.by_engine: dict[str, dict[str, float]] = {}  # see `_by_engine`
        self._flow = self._flow_at_start = self._flow_before = Flow.of(clock.now_s(), None, {})
        self._trained_flops = self._trainable_flops = 0.0  # of all rows; what the peak allowed
        self._step_end_s = clock.now_s()
        self.replay: ReplayReport | None = None  # the newest report
        self.longest_step_s = 0.0
        self.checkpoint_pause_s = 0.0  # how long a checkpoint held up the loop since the last row
        self.switch_s = 0.0  # of shared devices, since the last row

    async def collect(self, *, deadline_s: float = SHORT_S) -> None:
        """Takes the newest spans and counts of every actor.

        If an actor can't answer, its error is raised after all others have answered.
        """
        reports = await self._system.reports(deadline_s=deadline_s)
        self._retire()
        self.timeline.add(self.clock.actor, self.clock.take_spans())
        for actor, report in reports.items():
            if isinstance(report, BaseException):
                continue
            self.timeline.add(actor, report.spans)
            if isinstance(report, WorkerReport):
                self._take_flow(actor, report)
                self._versions[actor] = report.version
            if isinstance(report, ReplayReport):
                self.replay = report
                self._note_unwritten(report)
                self._name_quarantined(report)
            elif report.peak is not None:
                self._peaks[actor] = report.peak
        if self.replay is not None and self.replay is reports.get("replay"):
            self.timeline.flow(self.replay.flow)
        self._flow = Flow.of(self.clock.now_s(), self.replay, self._engines)
        self._count.add(self._flow.time_s, self._system.num_workers)
        self._best_rate.learn(self._flow)
        for report in reports.values():
            if isinstance(report, BaseException):
                raise report

    def _name_quarantined(self, report: ReplayReport) -> None:
        for line in report.quarantined[self.num_quarantined :]:
            self._say(line)
        self.num_quarantined = len(report.quarantined)

    def _note_unwritten(self, report: ReplayReport) -> None:
        """Files that the replay actor could not write since the report before."""
        for what, count in report.unwritten.items():
            if count > (known := self._num_unwritten[what]):
                consequence = "the run goes on without"
                self._disk.note(
                    what, report.disk_fault, consequence=consequence, count=count - known
                )
                self._num_unwritten[what] = count

    def _take_flow(self, worker: str, report: WorkerReport) -> None:
        """Adds the processes that this worker has had before."""
        if report.start < self._num_lost[worker]:
            return  # of a process that was lost meanwhile
        flow = EngineFlow.of(report)
        if worker in self._lost:
            flow = self._lost[worker] + flow
        self._engines[worker] = flow
        if flow.slots is not None:
            self._slots[worker] = flow.slots

    def _retire(self) -> None:
        """Closes the books of worker processes that are lost."""
        for worker, retired in self._system.supervisor.take_retired().items():
            if retired.last is not None:
                self.timeline.add(worker, retired.last.spans)
                self._take_flow(worker, retired.last)
            self._num_lost[worker] = retired.start
            flow = self._engines.get(worker, EngineFlow()).ended(retired.balance)
            self._lost[worker] = self._engines[worker] = flow

    async def start(self) -> None:
        """Marks the start of training. Generation and waiting before it do not count."""
        await self.collect()
        self._slots_at_start = self._slots_before = dict(self._slots)
        self._flow_at_start = self._flow_before = self._flow
        self._step_end_s = self.clock.now_s()

    def log(
        self, step: int, metrics: StepMetrics, *, num_evicted: int
    ) -> Coroutine[Any, Any, None]:
        """Counts one step at once. Await the result to write and show its row, beside the next step
        and after the row before."""
        self._add_up(metrics)
        self._guard(step, metrics)
        self._pending[step] = (metrics, num_evicted, self.clock.now_s())
        return self._log()

    def _guard(self, step: int, metrics: StepMetrics) -> None:
        """Judges a step by `train.guards`, with a line for each rule that it newly breaks."""
        mismatches = self._system.publisher.outcomes[HandshakeOutcome.MISMATCH]
        for line in self.guards.after_step(step, summarise(metrics), mismatches=mismatches):
            self._say(line)

    async def _log(self) -> None:
        async with self._one_at_a_time:
            if self._pending:
                await self.collect()
                self._write_pending()

    async def flush(self, *, deadline_s: float) -> None:
        """At the end of a run: writes the rows of all trained steps, with the newest reports there
        are. Raises the error of an actor that could not answer."""
        try:
            if self._pending:
                await self.collect(deadline_s=deadline_s)
        finally:
            self._write_pending()

    @contextmanager
    def switching(self, to: str) -> Iterator[None]:
        """In the body shared devices change hands."""
        began_s = self.clock.now_s()
        with self.clock.during("switch", to):
            yield
        self.switch_s += self.clock.now_s() - began_s

    async def written(self, version: int) -> None:
        """Returns when the rows of all steps that led to `version` are on disk."""
        while self._next_row < version:
            await self._row_written.wait()

    def _write_pending(self) -> None:
        if not self._pending:
            return
        # Steps that one report covers share its slot use and its rates.
        slots, self._slots_before = slot_shares(self._slots_before, self._slots), dict(self._slots)
        shared = {**slots, **self._between_reports()}
        self.by_engine = self._by_engine(self._flow_before, self._flow)
        self._flow_before = self._flow
        for step in sorted(self._pending):
            self._write(step, *self._pending.pop(step), shared=shared)
            self._next_row = step + 1
            self._row_written.set()
            self._row_written = asyncio.Event()

    def _write(
        self,
        step: int,
        metrics: StepMetrics,
        num_evicted: int,
        now_s: float,
        *,
        shared: Mapping[str, float],
    ) -> None:
        assert self.replay is not None
        if self._busy_before_s is None and self.replay.first_admission_s is not None:
            self._busy_before_s = self._busy_s(self.replay.first_admission_s)
        values = summarise(metrics)
        counts = self.replay.counts.flat()
        start_s, acceptance, publisher = (
            self._step_end_s,
            self.replay.acceptance.get(step),
            self._system.publisher,
        )
        row: dict[str, Any] = {
            "step": step,
            "version": step + 1,
            "time_s": self.totals.train_s + now_s - (self.replay.first_admission_s or now_s),
            "step_s": now_s - start_s,
            "tokens_per_s": values["tokens"] / (now_s - start_s),
            **values,
            **(
                {"acceptance": acceptance.rate, "offered": acceptance.offered} if acceptance else {}
            ),
            **(
                {"refill_waves": acceptance.refill_waves}
                if acceptance and acceptance.refill_waves is not None
                else {}
            ),
            **(
                {f"rejected.{reason.value}": count for reason, count in acceptance.rejected.items()}
                if acceptance
                else {}
            ),
            **(
                {f"verdicts.{reason}": count for reason, count in acceptance.verdicts.items()}
                if acceptance
                else {}
            ),
            **{f"groups.{name}": count for name, count in counts.items()},
            "buffered": self.replay.buffered,
            "credits_held": self.replay.credits_held,
            "idle.learner": self._learner_idle(self._busy_s(start_s), start_s, now_s),
            "mfu.learner": self._learner_mfu(values["train_flops"], start_s, now_s),
            "idle.rollout": math.nan,
            **shared,
            "evicted": num_evicted,
            "quarantined": self.num_quarantined,
            "guards": self.guards.counts.total(),
            "engine_restarts": self._system.supervisor.num_restarts,
            "publish_s": publisher.last_publish_s,
            "rollout_workers": self._system.num_workers,
            "publish_pause_s": publisher.last_pause_s,
            "checkpoint_pause_s": self.checkpoint_pause_s,
            "switch_s": self.switch_s,
            "probe_gap": max((result.probe_gap for result in publisher.last_results), default=0.0),
            **{f"handshake.{name}": count for name, count in publisher.outcomes.items()},
        }
        self.checkpoint_pause_s = self.switch_s = 0.0
        self.longest_step_s = max(self.longest_step_s, row["step_s"])
        self.rows.append(row)
        self._show(row)
        self._step_end_s = now_s
        self.timeline.forget(now_s)

    def _between_reports(self) -> dict[str, float]:
        """Rates and shares of time since the report before, and the counts of tokens so far."""
        before, after = self._flow_before, self._flow
        rates, shares = self._rates(before, after), after.engine_time(before)
        efficiency = self._best_rate.efficiency(before, after)
        return {
            **{f"idle.{name}": share for name, share in rollout_idle(shares).items()},
            **{f"engine_time.{state}": share for state, share in shares.items()},
            **({"efficiency.rollout": efficiency} if efficiency is not None else {}),
            **self._engine_use(before, after),
            **after.engine_state(before),
            **{f"{of}.{kind}": rate for of, each in rates.items() for kind, rate in each.items()},
            **{f"token_flow.{name}": count for name, count in self.token_flow.items()},
        }

    @property
    def token_flow(self) -> dict[str, int]:
        """What became of the tokens of this incarnation, up to the newest reports."""
        return self._flow.tokens.flat()

    @property
    def rates(self) -> dict[str, dict[str, float]]:
        """Tokens and groups per second from the start of training to the newest row."""
        return self._rates(self._flow_at_start, self._flow_before)

    def _rates(self, before: Flow, after: Flow) -> dict[str, dict[str, float]]:
        count = self._count.mean(before.time_s, after.time_s)
        return after.rates(before, self._sides.with_engines(count))

    def _add_up(self, metrics: StepMetrics) -> None:
        totals, (staleness, count) = self.totals, metrics.sums.get("staleness", (0.0, 0.0))
        totals.steps += 1
        totals.tokens += metrics.totals["tokens"]
        totals.staleness_sum += staleness
        totals.staleness_tokens += count
        totals.staleness_max = max(totals.staleness_max, int(metrics.maxima["group_staleness_max"]))

    @property
    def idle(self) -> dict[str, float]:
        """Idle shares from the first admission to the last learner step."""
        start_s = (self.replay.first_admission_s if self.replay else None) or self._step_end_s
        shares = self._flow_before.engine_time(self._flow_at_start)
        rollout = {"rollout": 0.0} | rollout_idle(shares)
        learner = self._learner_idle(self._busy_before_s or 0.0, start_s, self._step_end_s)
        return {"learner": learner, **rollout}

    @property
    def slots(self) -> dict[str, float]:
        """Shares of the slots from the start of training to the newest row."""
        return slot_shares(self._slots_at_start, self._slots_before)

    @property
    def engine_state(self) -> dict[str, float | None]:
        """KV memory, prefix cache and decode batch from the start of training to the newest row."""
        return {**NO_STATE, **self._flow_before.engine_state(self._flow_at_start)}

    @property
    def engines(self) -> dict[str, dict[str, Any]]:
        """By engine, of this incarnation: seconds and slot-seconds by state, generated tokens."""
        return {
            name: {
                "seconds": engine.seconds(),
                "slot_seconds": engine.slot_seconds(),
                "generated": engine.tokens.generated,
            }
            for name, engine in self._engines.items()
        }

    def _by_engine(self, before: Flow, after: Flow) -> dict[str, dict[str, float]]:
        """By engine between two reports: the version that it serves, generated tokens per second,
        the share of time in which sequences ran, and its mean number of occupied slots."""
        return {
            name: {"version": self._versions.get(name, 0), **engine.pace(before.engines.get(name))}
            for name, engine in after.engines.items()
            if not self._system.has_left(name)
        }

    @property
    def use(self) -> dict[str, float | None]:
        """MFU, MBU and efficiency from the start of training to the newest row."""
        before, after = self._flow_at_start, self._flow_before
        able = self._trainable_flops
        return {
            "mfu.learner": self._trained_flops / able if able else None,
            "mfu.rollout": None,
            "mbu.rollout": None,
            **self._engine_use(before, after),
            "efficiency.rollout": self._best_rate.efficiency(before, after),
        }

    def _engine_use(self, before: Flow, after: Flow) -> dict[str, float]:
        if self._devices is None or not self._peaks:
            return {}
        anyone = next(iter(self._peaks.values()))  # the learner's first rank measures on a CPU
        peaks = {name: self._peaks.get(name, anyone) for name in after.engines}
        return self._devices.engine_use(before, after, peaks)

    def _learner_mfu(self, flops: float, start_s: float, end_s: float) -> float:
        """Model FLOPs over what the ranks' devices can do in the time in which they train."""
        if not self._peaks:
            return math.nan
        anyone, able = next(iter(self._peaks.values())), 0.0
        for rank in self._system.learner.ranks:
            trained_s = self.timeline.seconds(rank.name, ("train",), until_s=end_s)
            trained_s -= self.timeline.seconds(rank.name, ("train",), until_s=start_s)
            able += trained_s * self._peaks.get(rank.name, anyone).flops_per_s
        self._trained_flops += flops
        self._trainable_flops += able
        return flops / able if able > 0 else math.nan

    def _learner_idle(self, busy_before_s: float, start_s: float, end_s: float) -> float:
        """Idle share of all ranks from `start_s`, before which they were busy, to `end_s`."""
        total_s = (end_s - start_s) * len(self._system.learner.ranks)
        return 1.0 - (self._busy_s(end_s) - busy_before_s) / total_s if total_s > 0 else 0.0

    def _busy_s(self, until_s: float) -> float:
        """Seconds in which the learner's ranks worked, summed over the ranks."""
        return sum(
            self.timeline.seconds(rank.name, LEARNER_BUSY, until_s=until_s)
            for rank in self._system.learner.ranks
        )

    @property
    def train_s(self) -> float:
        """Seconds from the first admission to the last logged step, over all incarnations."""
        first_s = self.replay.first_admission_s if self.replay else None
        return self.totals.train_s + (max(0.0, self._step_end_s - first_s) if first_s else 0.0)


def slot_shares(before: Mapping[str, SlotUse], after: Mapping[str, SlotUse]) -> dict[str, float]:
    """`slots.idle`, which is 1 - time-averaged occupied slots / slots over all engines, and its
    parts by state (time accounting); besides the share asleep, which is no part of it. Empty when
    no time has passed."""
    spent = {
        item.name: sum(
            getattr(new, item.name) - getattr(old, item.name)
            for old, new in ((before[worker], after[worker]) for worker in before)
        )
        for item in fields(SlotUse)
        if item.name not in ("slots", "elapsed_s")
    }
    total = sum(spent.values())
    if total <= 0:
        return {}
    parts = {f"slots.{name}": share / total for name, share in spent.items()}
    del parts["slots.occupied"]
    in_use = spent["occupied"] + spent["asleep"]
    return {"slots.idle": 1.0 - in_use / total, **parts}
