"""Rows of metrics when reports come late, together or not at all."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_async.replay import Counts, TokenCounts, TokenOutcome
from dapo_async.rollout import SlotUse, TimeUse
from dapo_async.runtime.actors.reports import LearnerReport, ReplayReport, WorkerReport
from dapo_async.runtime.step_metrics import Totals, Tracker
from dapo_async.runtime.supervisor import Retired
from dapo_async.runtime.throughput import Sides
from dapo_async.tracking.run_dir import RunDir
from dapo_async.types import RejectReason, StepMetrics
from dapo_async.utils.state_clock import Span, StateClock

METRICS = StepMetrics(
    sums={"staleness": (30.0, 20.0), "accuracy": (2.0, 4.0), "response_tokens": (20.0, 4.0)},
    maxima={"group_staleness_max": 2.0},
    totals={"tokens": 20.0, "train_flops": 3e9},
)


class Clock(StateClock):
    """The test sets its time."""

    time_s = 100.0

    def now_s(self) -> float:
        return self.time_s


class System:
    """Ten slots: half of them occupied until second 110, all from then on; a sequence runs 75 % of
    the time until then. The learner trains from second 105 on."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._told_s = clock, 100.0
        self.learner = SimpleNamespace(ranks=[SimpleNamespace(name="learner")])
        self.publisher = SimpleNamespace(
            last_pause_s=0.0, last_publish_s=0.0, last_results=(), outcomes=Counter(passed=1)
        )
        self.retired: dict[str, Retired] = {}
        self.supervisor = SimpleNamespace(
            num_restarts=0, take_retired=lambda: self.__dict__.pop("retired", {})
        )
        self.start, self.num_workers, self.left = 0, 1, ""
        self.silent = False
        self.generated_per_s = 0

    def has_left(self, worker: str) -> bool:
        return worker == self.left

    async def reports(self, *, deadline_s: float) -> dict[str, Any]:
        if self.silent:
            return {"rollout-0": TimeoutError(f"no report within {deadline_s:g} s")}
        now_s, since_s = self._clock.now_s(), self._told_s
        self._told_s = now_s
        busy_s = 0.5 * (min(now_s, 110.0) - 100.0) + max(0.0, now_s - 110.0)
        idle_s = now_s - 100.0 - busy_s
        use = SlotUse(
            slots=10,
            elapsed_s=now_s - 100.0,
            occupied=10 * busy_s,
            queued=0.0,
            no_credit=0.0,
            tail=10 * idle_s,
            sync=0.0,
        )
        still_s = 0.25 * (min(now_s, 110.0) - 100.0)
        time = TimeUse(now_s - 100.0, running=now_s - 100.0 - still_s, tail=still_s)
        cut_s = max(since_s, min(105.0, now_s))
        tokens = int(self.generated_per_s * (now_s - 100.0))
        engine = TokenCounts(generated=tokens, prefilled=tokens // 10)
        buffer = TokenCounts(
            accepted=tokens // 2,
            ended={RejectReason.ALL_WRONG: tokens // 2, TokenOutcome.TRAINED: tokens // 4},
        )
        groups = tokens // 50
        counts = Counts(groups, trained=groups // 4)
        replay = ReplayReport((), counts, {}, 100.0, 0, 0, 0, 0, {}, buffer, groups, groups // 2)
        return {
            "learner": LearnerReport((Span("wait", since_s, cut_s), Span("train", cut_s, now_s))),
            "rollout-0": WorkerReport((), use, 0, engine, time, start=self.start),
            "replay": replay,
        }


def tracked(
    tmp_path: Path,
    *,
    sides: Sides = Sides(),  # noqa: B008
) -> tuple[Tracker, System, Clock, list[dict[str, Any]]]:
    clock = Clock("driver")
    rows: list[dict[str, Any]] = []
    system: Any = System(clock)
    run_dir = RunDir(tmp_path)
    tracker = Tracker(system, run_dir, clock, show=rows.append, totals=Totals(), sides=sides)
    return tracker, system, clock, rows


def check_window(rows: list[dict[str, Any]], name: str, idle: float) -> None:
    """Time accounting: the shares of the steps, weighted by their seconds, give the whole share."""
    elapsed_s = sum(row["step_s"] for row in rows)
    share = sum(row[name] * row["step_s"] for row in rows) / elapsed_s
    assert abs(share - idle) < 1e-9, f"the steps say that {share:.3f} was idle, it was {idle:.3f}"


def test_steps_told_of_by_one_report_share_its_idle_slots(tmp_path: Path) -> None:
    async def run() -> None:
        await tracker.start()
        for step, time_s in ((0, 104.0), (1, 110.0)):
            clock.time_s = time_s
            late.append(tracker.log(step, METRICS, num_evicted=0))
        for log in late:
            await log
        clock.time_s = 120.0
        await tracker.log(2, METRICS, num_evicted=0)

    late: list[Any] = []
    tracker, _, clock, rows = tracked(tmp_path)
    asyncio.run(run())
    assert [row["slots.idle"] for row in rows] == [0.5, 0.5, 0.0]
    assert [row["slots.tail"] for row in rows] == [0.5, 0.5, 0.0]
    assert [row["idle.rollout"] for row in rows] == [0.25, 0.25, 0.0]
    assert [row["engine_time.tail"] for row in rows] == [0.25, 0.25, 0.0]
    assert [row["step_s"] for row in rows] == [4.0, 6.0, 10.0]
    assert [row["time_s"] for row in rows] == [4.0, 10.0, 20.0]
    assert [row["tokens_per_s"] for row in rows] == [5.0, 20.0 / 6.0, 2.0]
    assert [row["idle.learner"] for row in rows] == [1.0, pytest.approx(1.0 / 6.0), 0.0]
    check_window(rows, "slots.idle", tracker.slots["slots.idle"])
    check_window(rows, "idle.rollout", tracker.idle["rollout"])
    assert tracker.idle == {"learner": 0.25, "rollout": 0.125}
    idle = ("queued", "no_credit", "tail", "sync", "evaluation", "dead", "asleep")
    parts = {f"slots.{state}": 0.25 * (state == "tail") for state in idle}
    assert tracker.slots == {"slots.idle": 0.25, **parts}
    with pytest.raises(AssertionError, match="was idle, it was"):
        check_window([rows[0], {**rows[1], "slots.idle": 0.0}, rows[2]], "slots.idle", 0.25)


def test_rates_of_a_row_are_those_between_two_reports_and_add_up(tmp_path: Path) -> None:
    async def run() -> None:
        await tracker.start()
        clock.time_s = 110.0
        await tracker.log(0, METRICS, num_evicted=0)

    tracker, system, clock, rows = tracked(tmp_path, sides=Sides(2, 4, 5))
    system.num_workers = 2
    system.generated_per_s = 200
    asyncio.run(run())
    rates = {name: value for name, value in rows[0].items() if "_per_s." in name}
    tokens = {"prefilled": 20.0, "generated": 200.0, "accepted": 100.0, "trained": 50.0}
    groups = {"generated": 4.0, "accepted": 2.0, "trained": 1.0}
    expected = {
        f"{of}.{per}{kind}": rate / count
        for of, kinds in (("tokens_per_s", tokens), ("groups_per_s", groups))
        for per, count in (("", 1), ("per_engine.", 2), ("per_device.", 4))
        for kind, rate in kinds.items()
        if kind != "trained" or not per
    }
    expected |= {"tokens_per_s.per_device.trained": 10.0, "groups_per_s.per_device.trained": 0.2}
    assert rates == expected
    assert rows[0]["token_flow.generated"] == 2000
    assert rows[0]["token_flow.rejected"] == 1000
    assert rows[0]["token_flow.in_flight"] == 500
    assert tracker.rates["tokens_per_s"]["generated"] == 200.0


def test_idle_slots_of_a_step_that_nobody_could_tell_of_are_unknown_and_not_none(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        await tracker.start()
        clock.time_s, system.silent = 104.0, True
        tracker.log(0, METRICS, num_evicted=0).close()
        with pytest.raises(TimeoutError):
            await tracker.flush(deadline_s=1.0)

    tracker, system, clock, _ = tracked(tmp_path)
    asyncio.run(run())
    (row,) = RunDir(tmp_path).rows()
    assert row["idle.rollout"] is None
    assert tracker.idle["rollout"] == 0.0


def test_counts_of_a_lost_worker_process_stay_and_its_tokens_add_up(tmp_path: Path) -> None:
    """A process has reported 400 tokens and brought 300 of them; the next one counts from 0."""
    tracker, system, clock, _ = tracked(tmp_path)
    system.generated_per_s = 100

    async def run() -> None:
        clock.time_s = 104.0
        await tracker.start()
        system.retired, system.silent = {"rollout-0": Retired(1, 300)}, False
        clock.time_s = 106.0
        await tracker.collect()  # its last report comes too late

    asyncio.run(run())
    lost = tracker._engines["rollout-0"].tokens
    assert (lost.generated, lost.in_flight) == (400, 300), "what it brought is with the buffer"
    assert lost.ended == {TokenOutcome.REPEATED: 100}
    system.start = 1
    asyncio.run(tracker.collect())
    both = tracker._engines["rollout-0"]
    assert both.tokens.generated == 400 + 600
    assert both.time.elapsed_s == 4.0 + 6.0
    # A process that brings more than it had reported has generated it.
    ended = both.ended(1300).tokens
    assert (ended.generated, ended.in_flight) == (1400, 1300)
