"""What a simulated run came to: figures of its middle, and one row per step.

The simulator reports events to `Measuring`, which returns an `Outcome`. The measured window begins
after the warm-up and ends before admissions end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dapo_async.planner.engine import OpenGroup, SimulatedEngine, SlotSeconds
from dapo_async.planner.scenario import Scenario
from dapo_async.replay import Counts
from dapo_async.types import TrainBatch


@dataclass(slots=True)
class StepRow:
    """One step of the learner."""

    step: int
    begin_s: float  # of its first minibatch
    end_s: float = 0.0
    waited_s: float = 0.0  # for groups
    train_s: float = 0.0
    groups: int = 0
    tokens: int = 0  # response tokens
    versions_behind: float = 0.0  # sum of the staleness over tokens
    group_staleness_max: int = 0
    occupied: float = 0.0  # running sequences over slots at its end

    @property
    def staleness(self) -> float:
        """Mean over tokens."""
        return self.versions_behind / max(1, self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Rates and shares of the measured window; times in seconds."""

    step_s: float
    groups_per_s: float  # trained
    trained_tokens_per_s: float  # response tokens
    generated_tokens_per_s: float  # of all groups, rejected ones too
    staleness: float  # mean over trained tokens
    group_staleness: float  # mean over groups, of their oldest token
    group_staleness_max: int
    histogram: Mapping[int, int]  # trained groups by staleness
    acceptance: float
    learner: Mapping[str, float]  # shares of time: train, wait, other; deadline is a part of wait
    engines: Mapping[str, float]  # shares of slots × time
    num_retracted: int
    most_in_flight: int  # sequences on one engine
    wall_s: float  # of the whole run
    counts: Counts
    rows: Sequence[StepRow]
    publishes: Sequence[tuple[float, float]]  # begin and end

    @property
    def occupancy(self) -> float:
        return self.engines["running"]


@dataclass(slots=True)
class _Window:
    since_s: float
    slot_s: tuple[float, ...]
    generated: float
    retracted: int
    groups: int = 0
    tokens: int = 0
    versions_behind: float = 0.0
    waited_s: float = 0.0
    train_s: float = 0.0
    deadline_s: float = 0.0
    offered: int = 0
    accepted: int = 0
    histogram: Counter[int] = field(default_factory=Counter)


class Measuring:
    """Collects what the simulator reports."""

    def __init__(self, scenario: Scenario, engines: Sequence[SimulatedEngine]) -> None:
        self.rows: list[StepRow] = []
        self.publishes: list[tuple[float, float]] = []
        self._scenario, self._engines = scenario, engines
        self._row: StepRow | None = None
        self._window: _Window | None = None
        self._closed: _Window | None = None
        self._elapsed_s = 0.0
        self._slot_s: tuple[float, ...] = ()
        self._waits_since: float | None = None  # enough groups are finished, the learner waits
        self._published_s = 0.0

    def offered(self, *, accepted: bool) -> None:
        if self._window is not None:
            self._window.offered += 1
            self._window.accepted += accepted

    def minibatch(
        self,
        now_s: float,
        batch: TrainBatch,
        groups: Sequence[OpenGroup],
        *,
        waited_s: float,
        train_s: float,
    ) -> None:
        """A minibatch begins, after the learner waited for it."""
        step = batch.learner_version
        if self._row is None:
            self._row = StepRow(step, now_s)
        row, tokens = self._row, sum(group.tokens for group in groups)
        behind = sum(step * group.tokens - group.versions for group in groups)
        oldest = [step - version for version in batch.oldest_versions]
        row.waited_s += waited_s
        row.train_s += train_s
        row.groups += len(groups)
        row.tokens += tokens
        row.versions_behind += behind
        row.group_staleness_max = max(row.group_staleness_max, *oldest)
        self._measure(now_s, batch, tokens, behind, oldest, waited_s=waited_s, train_s=train_s)

    def slowed(self, seconds: float) -> None:
        """The minibatch that ends took so much longer, because the engines use the same cores."""
        if self._row is not None:
            self._row.train_s += seconds
        if self._window is not None:
            self._window.train_s += seconds

    def _measure(
        self,
        now_s: float,
        batch: TrainBatch,
        tokens: int,
        behind: float,
        oldest: Sequence[int],
        *,
        waited_s: float,
        train_s: float,
    ) -> None:
        """Counts from the first take after the warm-up to the last take of the window."""
        step, window = batch.learner_version, self._window
        bound = min(self._scenario.max_staleness, self._scenario.num_steps // 5)
        last = max(self._scenario.warm_up_steps + 1, self._scenario.num_steps - bound - 3)
        if window is None:
            if step == self._scenario.warm_up_steps and self._closed is None:
                self._window = _Window(now_s, *self._engine_sums(now_s), train_s=train_s)
            return
        window.groups += len(oldest)
        window.tokens += tokens
        window.versions_behind += behind
        window.waited_s += waited_s
        window.histogram.update(oldest)
        if step == last and batch.closes_step:
            self._elapsed_s = now_s - window.since_s
            self._slot_s, generated, retracted = self._engine_sums(now_s)
            window.generated = generated - window.generated
            window.retracted = retracted - window.retracted
            self._window, self._closed = None, window
        else:
            window.train_s += train_s

    def _engine_sums(self, now_s: float) -> tuple[tuple[float, ...], float, int]:
        """Slot seconds by state, generated tokens and retractions, over all engines."""
        for engine in self._engines:
            engine.advance(now_s)
        values = [engine.slot_s.values() for engine in self._engines]
        return (
            tuple(map(sum, zip(*values, strict=True))),
            sum(engine.generated for engine in self._engines),
            sum(engine.num_retracted for engine in self._engines),
        )

    def step_ended(self, now_s: float) -> None:
        """The last minibatch of the open step is trained."""
        assert self._row is not None
        running = sum(engine.running for engine in self._engines)
        self._row.end_s, self._row.occupied = now_s, running / self._scenario.num_slots
        self.rows.append(self._row)
        self._row = None

    def publish_started(self, now_s: float) -> None:
        self._published_s = now_s

    def publish_ended(self, now_s: float) -> None:
        self.publishes.append((self._published_s, now_s))

    def waits(self, now_s: float, *, for_deadline: bool) -> None:
        """The learner waits although enough groups are finished: a deadline would be lost."""
        if self._waits_since is not None and self._window is not None:
            self._window.deadline_s += now_s - max(self._waits_since, self._window.since_s)
        self._waits_since = now_s if for_deadline else None

    def outcome(self, *, wall_s: float, counts: Counts, most_in_flight: int) -> Outcome:
        """The figures of the window. Call it after the last step."""
        window, elapsed_s = self._closed, self._elapsed_s
        assert window is not None, "the run has no measured steps"
        slots = elapsed_s * self._scenario.num_slots
        spent = [
            (after - before) / slots
            for before, after in zip(window.slot_s, self._slot_s, strict=True)
        ]
        train, wait = window.train_s / elapsed_s, window.waited_s / elapsed_s
        groups = window.histogram.total()
        behind = sum(staleness * count for staleness, count in window.histogram.items())
        return Outcome(
            step_s=elapsed_s * self._scenario.groups_per_step / window.groups,
            groups_per_s=window.groups / elapsed_s,
            trained_tokens_per_s=window.tokens / elapsed_s,
            generated_tokens_per_s=window.generated / elapsed_s,
            staleness=window.versions_behind / max(1, window.tokens),
            group_staleness=behind / groups,
            group_staleness_max=max(window.histogram),
            histogram=dict(sorted(window.histogram.items())),
            acceptance=window.accepted / window.offered if window.offered else 1.0,
            learner={
                "train": train,
                "wait": wait,
                "deadline": window.deadline_s / elapsed_s,
                "other": max(0.0, 1 - train - wait),
            },
            engines=dict(zip(SlotSeconds.__slots__, spent, strict=True)),
            num_retracted=window.retracted,
            most_in_flight=most_in_flight,
            wall_s=wall_s,
            counts=counts,
            rows=self.rows,
            publishes=self.publishes,
        )
