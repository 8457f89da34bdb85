"""A run in virtual time: the real buffer, pacer and slot demand; engines and learner are models.

    engines ──groups──▶ replay buffer ──minibatches──▶ learner ──version──▶ publish ──▶ engines
                             ▲                                                 │
                             └───────────────── credits ───────────────────────┘

The replay state machines are those of a real run (`dapo_async.replay`): credits, deadlines,
filters, ledger, pacer, and the rule by which a worker asks for groups. The control plane takes the
time that the scenario gives it. Two calls with equal scenarios give equal results.

`simulate` is called by the commands, the sweep and the benchmarks.
"""

from __future__ import annotations

import gc
import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dapo_async.planner.engine import NEVER, OpenGroup, Sequence, SimulatedEngine
from dapo_async.planner.lengths import Draws
from dapo_async.planner.outcome import Measuring, Outcome
from dapo_async.planner.scenario import Outage, Scenario
from dapo_async.replay import OfferOutcome, Pacer, ReplayBuffer, dynamic_sampling
from dapo_async.replay.grants import share_grants
from dapo_async.replay.slot_demand import SlotDemand
from dapo_async.types import GroupFacts, TrainBatch

INCARNATION = "simulation"
NO_ENGINE = -1  # the stamp of an event that stays valid
MIXED, EQUAL = (1.0, 0.0), (0.0, 0.0)  # accuracies of a group that filters keep, and reject


@dataclass(slots=True)
class Publish:
    """A version on its way to the engines."""

    version: int
    group_ids: tuple[int, ...]  # whose credits it returns
    waits_for: set[int]  # engines that do not have it
    arrived: bool = False  # the engines can load it
    done_s: float = 0.0  # when the last engine that has it decodes again


@dataclass(slots=True)
class Training:
    """A minibatch in the learner."""

    batch: TrainBatch
    left_s: float  # of its work at full speed
    since_s: float  # `left_s` holds for this time
    slowdown: float = 1.0
    lost_s: float = 0.0  # because the engines use the same cores
    stamp: int = 0  # of its planned end


class SimulatedRun:
    """One run of a scenario; `run` plays it to its end."""

    def __init__(self, scenario: Scenario, *, demand: Callable[..., Any] = SlotDemand) -> None:
        """`demand`: the rule by which a worker asks for groups."""
        self.scenario, self.now_s, self.version = scenario, 0.0, 0
        self.buffer = ReplayBuffer(
            groups_per_step=scenario.groups_per_step,
            max_staleness=scenario.max_staleness,
            num_steps=scenario.num_steps,
            filters=(dynamic_sampling,),
            max_rejected_in_a_row=10**9,
            incarnation=INCARNATION,
            num_minibatches=scenario.num_minibatches,
        )
        self.buffer.serve(0)
        credits = (scenario.max_staleness + 1) * scenario.groups_per_step
        self.pacer = Pacer(groups_per_take=self.buffer.groups_per_take, credits=credits)
        self.engines = [
            SimulatedEngine(
                number,
                scenario.engine,
                prompt_tokens=scenario.prompt_tokens,
                demand=demand(num_slots=scenario.engine.num_slots, group_size=scenario.group_size),
            )
            for number in range(scenario.num_engines)
        ]
        # Engines that ask for groups, the longest wait first.
        self.waiting = dict.fromkeys(range(scenario.num_engines))
        self.draws = Draws(scenario.lengths, group_size=scenario.group_size)
        self.open: dict[int, OpenGroup] = {}
        self.handed_back: dict[int, OpenGroup] = {}
        self.measuring = Measuring(scenario, self.engines)
        self.most_in_flight = 0  # sequences on one engine
        # Time, order, what happens and to what; a planned event of an engine has its stamp.
        self._events: list[tuple[float, int, Callable[[Any], None], Any, int]] = []
        self._num_events = 0
        self._dirty = True  # the buffer or a demand changed: something may have become possible
        self._wakes_at_s = 0.0  # the last time that the pacer named
        self._served = 0  # the version that all engines serve
        self._asked_s: float | None = None  # when the learner asked for a batch
        self._ahead = 0  # the version whose minibatch is taken next
        self._next_batch: TrainBatch | None = None  # taken; the learner has not got it
        self._training: Training | None = None
        self._busy_until_s = 0.0  # the learner copies its weights or saves a checkpoint
        self._of_step: tuple[int, ...] = ()  # trained groups of the open step
        self._trained: deque[Publish] = deque()  # waits for the end of the publish before
        self._publish: Publish | None = None
        self._jitter = random.Random(scenario.lengths.seed)

    def run(self) -> Outcome:
        """From the first admission to the last step."""
        for outage in self.scenario.outages:
            self._at(outage.at_s, self._lose, outage)
        events, buffer = self._events, self.buffer
        shares_cores = self.scenario.learner_slowdown > 1
        while True:
            if self._dirty:
                self._dirty = False
                self._start_publish()
                self._train()
                self._admit()
            if shares_cores and self._training is not None:
                self._slow_learner(self._training)
            if not events or self._is_over:
                break
            self.now_s, _, happens, argument, stamp = heapq.heappop(events)
            if stamp == NO_ENGINE or stamp == argument.stamp:
                happens(argument)
        assert buffer.steps_left == 0, buffer.explain_wait(self.version)
        buffer.check()
        return self.measuring.outcome(
            wall_s=self.now_s, counts=buffer.counts, most_in_flight=self.most_in_flight
        )

    @property
    def _is_over(self) -> bool:
        """The last step is trained and published."""
        return (
            self.version == self.scenario.num_steps and self._publish is None and not self._trained
        )

    def _at(self, time_s: float, happens: Callable[[Any], None], argument: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_s, self._num_events, happens, argument, NO_ENGINE))

    # Engines.

    def _schedule(self, engine: SimulatedEngine) -> None:
        """Plans the engine's next event, in place of the one planned before."""
        engine.stamp += 1
        time_s = engine.next_event_s()
        if time_s != NEVER:
            self._num_events += 1
            heapq.heappush(
                self._events,
                (time_s, self._num_events, self._engine_event, engine, engine.stamp),
            )

    def _engine_event(self, engine: SimulatedEngine) -> None:
        engine.arrive(self.now_s)
        for group in engine.finish():
            self._offer(group)
        if engine.is_full:
            engine.retract()
        if engine.waiting:
            engine.fill()
        if engine.draining and not engine.sequences:
            self._switch(engine)
        else:
            self._schedule(engine)
        if engine.number not in self.waiting and engine.demand.num_groups:
            self.waiting[engine.number] = None
            self._dirty = True

    def _offer(self, group: OpenGroup) -> None:
        kept = group.luck < self._acceptance
        facts = GroupFacts(
            group_id=group.group_id,
            incarnation=INCARNATION,
            oldest_version=group.oldest_version,
            num_versions=1,
            prompt_tokens=self.scenario.prompt_tokens,
            response_tokens=tuple(group.lengths),
            rewards=(),
            accuracies=MIXED if kept else EQUAL,
            reasons=(),
        )
        result = self.buffer.offer(facts, None)
        self.measuring.offered(accepted=result.outcome is OfferOutcome.ACCEPTED)
        if result.outcome is not OfferOutcome.ACCEPTED:
            del self.open[group.group_id]
        self._dirty = True

    @property
    def _acceptance(self) -> float:
        first, last = self.scenario.acceptance
        return first + (last - first) * self.version / max(1, self.scenario.num_steps - 1)

    # Admission.

    @property
    def num_out(self) -> int:
        """Groups that generate or are finished, and that the learner has not got."""
        return self.buffer.num_generating + self.num_finished

    @property
    def num_finished(self) -> int:
        ahead = len(self._next_batch.group_ids) if self._next_batch is not None else 0
        return self.buffer.num_buffered + ahead

    def _admit(self) -> None:
        """Each engine that asks gets what it asks for, as far as there are credits."""
        if not self.waiting:
            return
        admissible = self._num_admissible()
        if admissible <= 0:
            return
        engines = self.engines
        wanted = {number: engines[number].demand.num_groups for number in self.waiting}
        for number, count in share_grants(wanted, admissible).items():
            engine = engines[number]
            del self.waiting[number]
            self._start(engine, count)
            if engine.demand.num_groups:
                self.waiting[number] = None

    def _num_admissible(self) -> int:
        scenario, admissible = self.scenario, self.buffer.admissible()
        if scenario.credit_steps is not None:
            credits = round(scenario.credit_steps * scenario.groups_per_step)
            admissible = max(0, min(admissible, credits - self.buffer.credits_held))
        if scenario.admission == "eager" or not admissible:
            return admissible
        room = self.pacer.room(self.now_s, out=self.num_out, served_version=self._served)
        start_s = self.pacer.next_start_s(self.now_s, served_version=self._served)
        if start_s is not None and start_s != self._wakes_at_s:
            self._wakes_at_s = start_s
            self._at(start_s, self._wake, None)
        return min(admissible, room)

    def _wake(self, _: None) -> None:
        self._dirty = True

    def _start(self, engine: SimulatedEngine, count: int) -> None:
        """Admits `count` groups to the engine."""
        has_free_slot = engine.running < engine.num_slots
        if has_free_slot:
            engine.advance(self.now_s)
        for _ in range(count):
            group_id = self.buffer.admit(engine.name)
            returned = self.handed_back.pop(group_id, None)
            demand = engine.demand.start()
            if returned is not None and self.buffer.continues(group_id):
                group, parts = returned, returned.parts
                demand.end_siblings(len(group.lengths) - group.left)
                group.demand, group.parts, group.prefilled = demand, [], -1
            else:
                group, parts = self._new_group(group_id, demand), []
                engine.waiting.extend([Sequence(group, tokens) for tokens in group.lengths])
            self.open[group_id] = group
            engine.waiting.extend([Sequence(group, left, done) for left, done in parts])
        self.most_in_flight = max(self.most_in_flight, engine.running + len(engine.waiting))
        if has_free_slot:
            engine.fill()
            self._schedule(engine)

    def _new_group(self, group_id: int, demand: Any) -> OpenGroup:
        scale = 1.0
        if self.scenario.lengths.drift != 1.0:
            progress = self.version / max(1, self.scenario.num_steps - 1)
            scale += (self.scenario.lengths.drift - 1.0) * progress
        lengths = self.draws.lengths(group_id, scale=scale)
        return OpenGroup(group_id, lengths, self.draws.luck(group_id), demand, len(lengths))

    # The learner.

    def _train(self) -> None:
        is_idle = self._training is None and not self._trained and self.now_s >= self._busy_until_s
        has_more = self._next_batch is not None or self.buffer.steps_left > 0
        if is_idle and has_more and self._asked_s is None:
            self.pacer.asks(
                self.now_s,
                version=self.version,
                finished=self.num_finished,
                engines_wait=bool(self.waiting),
            )
            self._asked_s = self.now_s
        self._take_ahead()
        if self._asked_s is not None and self._next_batch is not None:
            self._begin_minibatch(self._next_batch, self.now_s - self._asked_s)
            self._take_ahead()
        enough = self.buffer.num_buffered >= self.buffer.groups_per_take
        self.measuring.waits(self.now_s, for_deadline=self._asked_s is not None and enough)

    def _take_ahead(self) -> None:
        """As the replay actor: the next batch is taken as soon as it is complete."""
        buffer = self.buffer
        if (
            self._next_batch is None
            and buffer.steps_left
            and buffer.num_buffered >= buffer.groups_per_take
            and buffer.can_take(self._ahead)
        ):
            self._next_batch = buffer.take(self._ahead)

    def _begin_minibatch(self, batch: TrainBatch, waited_s: float) -> None:
        self._next_batch, self._asked_s = None, None
        self._ahead = batch.learner_version + batch.closes_step
        self.pacer.took(self.now_s)
        groups = [self.open.pop(group_id) for group_id in batch.group_ids]
        speed = self.scenario.learner
        prompt = self.scenario.prompt_tokens
        tokens = sum(group.tokens + len(group.lengths) * prompt for group in groups)
        seconds = speed.minibatch_s(tokens=tokens, groups=len(groups))
        if speed.jitter:
            seconds *= 1 + speed.jitter * self._jitter.uniform(-1, 1)
        self.measuring.minibatch(self.now_s, batch, groups, waited_s=waited_s, train_s=seconds)
        if self.scenario.colocated:
            self._pause_all(seconds)
        self._training = Training(batch, self.scenario.fetch_s + seconds, self.now_s)
        self._plan_end(self._training)
        self._slow_engines(self.scenario.engine_slowdown)

    def _plan_end(self, training: Training) -> None:
        self._num_events += 1
        end_s = training.since_s + training.slowdown * training.left_s
        event = (end_s, self._num_events, self._end_minibatch, training, training.stamp)
        heapq.heappush(self._events, event)

    def _end_minibatch(self, training: Training) -> None:
        batch, self._training = training.batch, None
        lost_s = training.lost_s + (1 - 1 / training.slowdown) * (self.now_s - training.since_s)
        self.measuring.slowed(lost_s)
        self._slow_engines(1.0)
        self.buffer.trained(batch.group_ids)
        self._of_step += batch.group_ids
        if batch.closes_step:
            self.version += 1
            self._trained.append(Publish(self.version, self._of_step, set()))
            self._of_step = ()
            self.measuring.step_ended(self.now_s)
            self._stop_after_step()
        self._dirty = True

    def _stop_after_step(self) -> None:
        """The learner copies its weights, and saves a checkpoint if one is due."""
        scenario = self.scenario
        busy_s, every = scenario.snapshot_s, scenario.checkpoint_every_steps
        if every and self.version % every == 0:
            busy_s += scenario.checkpoint_s
        if busy_s:
            self._busy_until_s = self.now_s + busy_s
            self._at(self._busy_until_s, self._wake, None)

    # Both sides on the same cores.

    def _slow_engines(self, slowdown: float) -> None:
        """The learner begins to work or stops."""
        if self.scenario.engine_slowdown == 1:
            return
        for engine in self.engines:
            engine.advance(self.now_s)
            engine.slowdown = slowdown
            self._schedule(engine)

    def _slow_learner(self, training: Training) -> None:
        """By the share of the engines that decode."""
        busy = sum(bool(engine.sequences) for engine in self.engines) / len(self.engines)
        slowdown = 1 + (self.scenario.learner_slowdown - 1) * busy
        if slowdown == training.slowdown:
            return
        elapsed_s = self.now_s - training.since_s
        training.lost_s += (1 - 1 / training.slowdown) * elapsed_s
        training.left_s = max(0.0, training.left_s - elapsed_s / training.slowdown)
        training.since_s, training.slowdown = self.now_s, slowdown
        training.stamp += 1
        self._plan_end(training)

    # Publishing.

    def _start_publish(self) -> None:
        """One publish at a time: the learner waits with its snapshot for the end of the last."""
        if self._trained and self._publish is None:
            self._publish = self._trained.popleft()
            self._publish.waits_for = {engine.number for engine in self.engines if engine.alive}
            self.measuring.publish_started(self.now_s)
            scenario = self.scenario
            self._at(
                self.now_s + scenario.publish_s - scenario.pause_s, self._update, self._publish
            )

    def _update(self, publish: Publish) -> None:
        """The new weights are there: each engine loads them, at once or when it is empty."""
        publish.arrived = True
        for engine in self.engines:
            if engine.number not in publish.waits_for:
                continue
            engine.advance(self.now_s)
            if self.scenario.weight_update == "drain" and engine.sequences:
                engine.draining = True
            else:
                self._switch(engine)
        self._end_publish_if_done()

    def _switch(self, engine: SimulatedEngine) -> None:
        publish, scenario = self._publish, self.scenario
        assert publish is not None
        engine.draining = False
        engine.pause(scenario.pause_s)
        engine.switch(publish.version, recompute=scenario.weight_update == "recompute")
        if (every := scenario.evaluation_every_steps) and publish.version % every == 0:
            engine.pause(scenario.evaluation_s)
        engine.fill()
        self._schedule(engine)
        publish.waits_for.discard(engine.number)
        publish.done_s = self.now_s + scenario.pause_s
        self._end_publish_if_done()

    def _end_publish_if_done(self) -> None:
        publish = self._publish
        if publish is None or not publish.arrived:
            return
        if not publish.waits_for and publish.done_s != NEVER:
            self._at(max(self.now_s, publish.done_s), self._serve, publish)
            publish.done_s = NEVER

    def _serve(self, publish: Publish) -> None:
        self._publish, self._served = None, publish.version
        self.buffer.serve(publish.version)
        self.buffer.release(publish.group_ids)
        self.measuring.publish_ended(self.now_s)
        self._dirty = True

    def _pause_all(self, seconds: float) -> None:
        for engine in self.engines:
            engine.advance(self.now_s)
            engine.pause(seconds)
            self._schedule(engine)

    # Outages.

    def _lose(self, outage: Outage) -> None:
        engine = self.engines[outage.engine]
        if engine.alive:
            engine.advance(self.now_s)
            for group in engine.fail():
                has_tokens = any(done for _, done in group.parts) or group.tokens > 0
                self.buffer.hand_back(
                    group.group_id, oldest_version=group.oldest_version if has_tokens else None
                )
                self.handed_back[group.group_id] = self.open.pop(group.group_id)
            self._schedule(engine)
            self.waiting.pop(engine.number, None)
            if self._publish is not None:
                self._publish.waits_for.discard(engine.number)
                self._end_publish_if_done()
            self._at(outage.back_s, self._return, engine)
        self._dirty = True

    def _return(self, engine: SimulatedEngine) -> None:
        """The engine loads the newest weights that all others serve."""
        engine.advance(self.now_s)
        engine.alive = True
        engine.switch(self._served, recompute=False)
        if self._publish is not None:
            if self._publish.arrived:
                engine.switch(self._publish.version, recompute=False)
            else:
                self._publish.waits_for.add(engine.number)
        self.waiting[engine.number] = None
        self._dirty = True


def simulate(scenario: Scenario) -> Outcome:
    """Plays a run of `scenario`."""
    # The objects of a run have no cycles: the collector would only count a million sequences again
    # and again.
    collects = gc.isenabled()
    gc.disable()
    try:
        return SimulatedRun(scenario).run()
    finally:
        if collects:
            gc.enable()
