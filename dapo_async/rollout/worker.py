"""The rollout worker: admissions come in from replay, scored groups go back; an engine generates.

Each group has its own asyncio task, so a slow group delays no other. The rollout actor in
`runtime/` owns the worker, gives it a handle of the replay actor, and calls `hold`, `confirm`,
`quarantine`, `lose` and `restarted` when the engine or its weights change, and `drain` when the
worker leaves the run.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dapo_async.replay import TokenOutcome, num_tokens
from dapo_async.replay.group_io import pack_group
from dapo_async.replay.slot_demand import GroupInFlight, SlotDemand
from dapo_async.reward import VerifierFailed
from dapo_async.rollout.engine import (
    Aborted,
    Engine,
    EngineFault,
    GroupRequest,
    SamplingParams,
    SiblingsEnded,
    SiblingTimes,
)
from dapo_async.rollout.group_record import Update, group_record
from dapo_async.types import Admission, Completion, Group, GroupFacts


@dataclass(frozen=True, slots=True)
class Offer:
    """A scored group as it goes to the replay actor."""

    facts: GroupFacts
    data: NDArray[np.uint8]  # the whole group, packed
    record: str = ""  # of its generation, see `group_record`


class ReplayPort(Protocol):
    """The worker's side of the replay actor."""

    async def exchange(
        self, worker: str, offers: Sequence[Offer], *, num_free: int, num_open: int
    ) -> Sequence[Admission]:
        """Takes over scored groups, then waits for at most `num_free` admissions.

        `num_open`: groups of `worker` in hand. Without `num_free` the answer comes at once. A later
        exchange ends the wait and asks in its place. An answer without admissions asks the worker
        to ask again.
        """
        ...

    async def evictions(self, worker: str) -> Sequence[int]:
        """Waits for groups of `worker` that were evicted; none: the worker is to ask again."""
        ...

    async def fail(self, group_ids: Sequence[int], why: str, detail: str = "") -> None:
        """Returns the credits of groups that will not be offered. Ended groups are ignored.

        `why` is counted; `detail` is for a message.
        """
        ...

    async def hand_back(
        self, group_id: int, partial_completions: tuple[Completion | None, ...]
    ) -> None:
        """The next worker that asks generates this group and continues `partial_completions`.

        A group that has ended is ignored.
        """
        ...


class WorkerState(StrEnum):
    SERVING = "serving"  # the engine has proved weights
    HOLDING = "holding"  # swapped, not proved yet: finished groups wait, generation goes on
    QUARANTINED = "quarantined"  # wrong weights, or unproved after a restart: no generation
    LOST = "lost"  # the engine can't be used, or was restarted and has no weights


TRANSITIONS: Mapping[WorkerState, frozenset[WorkerState]] = {
    WorkerState.SERVING: frozenset(
        {WorkerState.HOLDING, WorkerState.QUARANTINED, WorkerState.LOST}
    ),
    WorkerState.HOLDING: frozenset(
        {WorkerState.SERVING, WorkerState.QUARANTINED, WorkerState.LOST}
    ),
    WorkerState.QUARANTINED: frozenset({WorkerState.SERVING, WorkerState.LOST}),
    WorkerState.LOST: frozenset({WorkerState.QUARANTINED}),
}
ABORT_S = 60.0  # an engine aborts groups within this time
EXCHANGES = 2  # in flight: one waits for credits, the next one ends its wait
KEPT_UPDATES = 64  # weight updates; no group lives through more of them
LOOK_S = 0.02  # between two looks at what a worker that leaves still has in hand
GENERATING = frozenset({WorkerState.SERVING, WorkerState.HOLDING})


@dataclass(frozen=True, slots=True)
class _Loss:
    why: str
    state: WorkerState  # the worker's state before


class RolloutWorker:
    """Keeps its engine full as long as there are credits.

    It asks for groups as soon as slots are free, whatever number of siblings of its groups still
    run: `SlotDemand` has the rule.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        *,
        replay: ReplayPort,
        score: Callable[[Admission, Sequence[Completion]], Awaitable[Group]],
        sampling: SamplingParams,
        group_size: int,
    ) -> None:
        self.name, self.engine = name, engine
        self.state = WorkerState.SERVING
        self._replay, self._score, self._sampling = replay, score, sampling
        # Counts the groups on the engine or about to be.
        self._demand = SlotDemand(num_slots=engine.num_slots, group_size=group_size)
        self._changed = asyncio.Event()  # there may be something to exchange
        self._state_changed = asyncio.Event()  # a new one after each change
        # Admitted groups that are to be offered; evicted ones and those of wrong weights are not.
        self._wanted: set[int] = set()
        self._offers: list[Offer] = []  # scored groups, for the next exchange
        self._leaving: set[int] = set()  # groups that go back with a call in flight
        self._num_sent = self._num_answered = 0  # exchanges
        self._num_asked = 0  # groups that the newest exchange asks for, while it is in flight
        self._num_asking = 0  # exchanges in flight that ask for groups
        # Evicted groups that were not in hand: their admissions may still be on their way.
        self._evicted: set[int] = set()
        self._given_up: set[int] = set()  # failed by a quarantine, while their tasks still run
        self._loss: _Loss | None = None  # None: the engine is not lost, or was restarted
        self._num_losses = 0
        self._leaves = False  # it starts no group any more
        self._num_rolling = 0  # groups between admission and offer, evicted ones included
        self._updates: deque[Update] = deque(maxlen=KEPT_UPDATES)

    async def run(self) -> None:
        """Generates groups until it is cancelled.

        Raises what a group, the engine or replay raised, in an ExceptionGroup.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_evictions(tasks), name="evictions")
            while True:
                while not self._may_exchange():
                    self._changed.clear()
                    await self._changed.wait()
                offers, self._offers = self._offers, []
                self._num_sent, self._num_asked = self._num_sent + 1, self._num_free
                exchange = self._exchange(tasks, offers, self._num_asked, number=self._num_sent)
                tasks.create_task(exchange, name=f"exchange {self._num_sent}")

    def _may_exchange(self) -> bool:
        """Whether there is something new to offer or to ask for.

        At most `EXCHANGES` are in flight; what comes up meanwhile goes together with the next one.
        """
        news = bool(self._offers) or self._num_free > self._num_asked
        news = news or (self._leaves and self._num_asked > 0)  # ends the wait for credits
        return news and self._num_sent - self._num_answered < EXCHANGES

    async def _exchange(
        self, tasks: asyncio.TaskGroup, offers: Sequence[Offer], num_free: int, *, number: int
    ) -> None:
        """Offers groups and starts those that are admitted; the engine counts idle slots meanwhile
        as without credit."""
        self._count_asking(num_free > 0)
        offered = [each.facts.group_id for each in offers]
        try:
            with self._going_back(offered):
                admissions = await self._replay.exchange(
                    self.name, offers, num_free=num_free, num_open=len(self._wanted)
                )
        finally:
            self._count_asking(-(num_free > 0))
            self._num_answered += 1
            if number == self._num_sent:
                self._num_asked = 0
            self._changed.set()
        for admission in admissions:
            if admission.group_id in self._evicted:
                self._evicted.discard(admission.group_id)
                self._end_tokens(admission.group_id, num_tokens(admission.partial_completions))
                continue
            self._wanted.add(admission.group_id)
            rolling = self._counted(self._roll(admission, self._demand.start()))
            tasks.create_task(rolling, name=f"group {admission.group_id}")

    def _count_asking(self, change: int) -> None:
        before, self._num_asking = self._num_asking, self._num_asking + change
        if (before > 0) != (self._num_asking > 0):
            self.engine.starving(self._num_asking > 0)

    async def _watch_evictions(self, tasks: asyncio.TaskGroup) -> None:
        """Aborts evicted groups at once, also while all slots are full.

        Each abort has a task of its own, so that a slow one delays neither the next nor admission.
        """
        while True:
            evicted = await self._replay.evictions(self.name)
            if evicted:
                self._evicted.update(set(evicted) - self._wanted)
                self._wanted.difference_update(evicted)
                tasks.create_task(self._abort(evicted), name="abort")

    async def _abort(self, evicted: Sequence[int]) -> None:
        try:
            async with asyncio.timeout(ABORT_S) as limit:
                await self.engine.abort(evicted)
        except TimeoutError as error:
            if not limit.expired():
                raise  # the engine's own deadline, which has its own message
            groups = ", ".join(map(str, evicted))
            raise TimeoutError(
                f"{self.name} waited {ABORT_S:g} s for its engine to abort evicted groups {groups}"
            ) from error

    @property
    def open_groups(self) -> list[int]:
        """Groups that were admitted and that the replay actor has not got back."""
        waiting = {each.facts.group_id for each in self._offers}
        return sorted(self._wanted | self._leaving | waiting)

    @contextmanager
    def _going_back(self, group_ids: Sequence[int]) -> Iterator[None]:
        """The body gives these groups back to the replay actor."""
        self._leaving.update(group_ids)
        try:
            yield
        finally:
            self._leaving.difference_update(group_ids)

    @property
    def _num_free(self) -> int:
        """Groups that could start now."""
        self._demand.resize(self.engine.num_slots)
        may_start = self.state in GENERATING and not self._leaves
        return self._demand.num_groups if may_start else 0

    async def _counted(self, rolling: Coroutine[None, None, None]) -> None:
        self._num_rolling += 1
        try:
            await rolling
        finally:
            self._num_rolling -= 1

    async def _roll(self, admission: Admission, in_flight: GroupInFlight) -> None:
        """One group from its admission to its offer."""

        def siblings_ended(count: int) -> None:
            in_flight.end_siblings(count)
            self._changed.set()

        admitted_s, times = time.monotonic(), SiblingTimes.of(admission.group_size)
        try:
            may_start = await self._wait_to_start(admission)
            num_losses = self._num_losses
            completions = (
                await self._generate(admission, siblings_ended, times) if may_start else None
            )
            proved = self._is_proved
        finally:
            in_flight.stop()
            self._changed.set()
        if completions is None:
            return
        group_id, count = admission.group_id, num_tokens(completions)
        if group_id not in self._wanted:
            self._end_tokens(group_id, count)
            return
        try:
            group = await self._score(admission, completions)
        except VerifierFailed as failure:
            if self._claim(group_id):
                self.engine.tokens.end(TokenOutcome.FAILED, count)
                with self._going_back([group_id]):
                    await self._replay.fail([group_id], str(failure), failure.detail)
            else:
                self._end_tokens(group_id, count)
            return
        scored_s = time.monotonic()
        while self.state is WorkerState.HOLDING:
            await self._state_changed.wait()
        if not proved and num_losses != self._num_losses:
            # The engine was lost before its weights were proved: they never will be.
            partial_completions = admission.partial_completions
            self.engine.tokens.end(TokenOutcome.REPEATED, count - num_tokens(partial_completions))
            await self._hand_back(group_id, partial_completions)
        elif self._claim(group_id):
            if group.num_failed:  # responses without a verdict, which are left out
                self.engine.tokens.end(TokenOutcome.FAILED, count - group.num_response_tokens)
            record = group_record(
                completions, times, self._updates, admitted_s=admitted_s, scored_s=scored_s
            )
            self._offers.append(Offer(GroupFacts.of(group), pack_group(group), record))
            self._changed.set()
        else:
            self._end_tokens(group_id, count)

    async def _wait_to_start(self, admission: Admission) -> bool:
        """Waits for the end of a quarantine that began after the request for this group.

        False when the group was evicted, given up or handed back meanwhile.
        """
        while self.state is WorkerState.QUARANTINED and not self._leaves:
            await self._state_changed.wait()
        if self.state is WorkerState.LOST or self._leaves:
            await self._hand_back(admission.group_id, admission.partial_completions)
            return False
        if admission.group_id in self._wanted:
            return True
        self._end_tokens(admission.group_id, num_tokens(admission.partial_completions))
        return False

    async def _generate(
        self, admission: Admission, siblings_ended: SiblingsEnded, times: SiblingTimes
    ) -> tuple[Completion, ...] | None:
        """One completion per sibling; None when the group was aborted or handed back."""
        group_id = admission.group_id
        request = GroupRequest(
            group_id,
            admission.prompt.token_ids,
            admission.group_size,
            self._sampling,
            admission.partial_completions,
            times,
        )
        try:
            return await self.engine.generate(request, siblings_ended)
        except EngineFault as fault:
            self.lose(str(fault))
            received = fault.partial_completions
            await self._pass_on(admission, received, num_tokens(received))
        except Aborted as aborted:
            count = num_tokens(admission.partial_completions) + aborted.num_tokens
            if group_id not in self._wanted:
                self._end_tokens(group_id, count)
            elif self._leaves:
                await self._pass_on(admission, aborted.partial_completions, count)
            else:
                raise  # this worker did not abort it: its credit would never return
        return None

    async def _pass_on(
        self, admission: Admission, received: tuple[Completion | None, ...], count: int
    ) -> None:
        """Another engine continues what was `received`; `count`: tokens of it that are not booked.

        The newest tokens may come from weights that were never proved: these are not passed on.
        """
        known = received if self._is_proved else admission.partial_completions
        self.engine.tokens.end(TokenOutcome.REPEATED, count - num_tokens(known))
        await self._hand_back(admission.group_id, known)

    @property
    def _is_proved(self) -> bool:
        """Whether the engine's weights are proved, or were when it was lost."""
        state = self.state if self._loss is None else self._loss.state
        return state is WorkerState.SERVING

    def _claim(self, group_id: int) -> bool:
        """Ends the worker's interest in a group; False when it had ended already."""
        wanted = group_id in self._wanted
        self._wanted.discard(group_id)
        return wanted

    async def _hand_back(
        self, group_id: int, partial_completions: tuple[Completion | None, ...]
    ) -> None:
        if self._claim(group_id):
            with self._going_back([group_id]):
                await self._replay.hand_back(group_id, partial_completions)
        else:
            self._end_tokens(group_id, num_tokens(partial_completions))

    def _end_tokens(self, group_id: int, count: int) -> None:
        """Books the tokens of a group that is not wanted any more."""
        failed = group_id in self._given_up
        self._given_up.discard(group_id)
        outcome = TokenOutcome.FAILED if failed else TokenOutcome.EVICTED
        self.engine.tokens.end(outcome, count)

    # What happens to the engine. Each call moves the state as its docstring says, or not at all.

    def hold(self) -> None:
        """Before a weight swap: serving → holding; lost → quarantined for a restarted engine."""
        if self.state is WorkerState.SERVING:
            self._enter(WorkerState.HOLDING)
        elif self.state is WorkerState.LOST and self._loss is None:
            self._enter(WorkerState.QUARANTINED)

    def updated(self, version: int, *, began_s: float) -> None:
        """The engine has served `version` from now on; `began_s`: since when it was updated."""
        self._updates.append(Update(version, began_s, time.monotonic()))

    def confirm(self) -> None:
        """The handshake proved the weights: holding or quarantined → serving."""
        if self.state in (WorkerState.HOLDING, WorkerState.QUARANTINED):
            self._enter(WorkerState.SERVING)

    async def quarantine(self) -> None:
        """The weights are wrong: serving or holding → quarantined.

        Which weights sampled the groups in flight is unknown (staleness bound, handshake). They are
        aborted and failed, which returns their credits; this is done when the call returns.
        """
        if self.state in GENERATING:
            self._enter(WorkerState.QUARANTINED)
        given_up = sorted(self._wanted)
        self._given_up.update(given_up)
        self._wanted.clear()
        if given_up:
            with self._going_back(given_up):
                await self.engine.abort(given_up)
                await self._replay.fail(given_up, f"quarantine of {self.name}")

    async def drain(self) -> None:
        """Leaves the run: starts no group any more. Finished groups are offered, the others are
        handed back with what they have. Returns when the replay actor has got all of them.

        The caller ends `run`. Weights on their way are awaited first: tokens of weights that were
        never proved are not handed on.
        """
        self._leaves = True
        self._notify()
        while self.state is WorkerState.HOLDING:
            await self._state_changed.wait()
        await self.engine.abort(sorted(self._wanted))
        while self._num_rolling or self.open_groups or self._num_sent > self._num_answered:
            await asyncio.sleep(LOOK_S)

    def lose(self, why: str) -> None:
        """The engine can't be used: any state → lost. Groups that fail with it are handed back."""
        if self._loss is not None:
            return
        self._loss = _Loss(why, self.state)
        self._num_losses += 1
        if self.state is WorkerState.LOST:
            self._notify()  # lost again before it had weights
        else:
            self._enter(WorkerState.LOST)

    def restarted(self) -> None:
        """A lost engine runs again, without weights: `lost` waits for the next loss."""
        assert self.state is WorkerState.LOST, f"{self.name} restarted while {self.state.value}"
        self._loss = None

    @property
    def is_lost(self) -> bool:
        """Whether the engine can't be used, and was not restarted."""
        return self._loss is not None

    async def lost(self) -> str:
        """Waits until the engine is lost; returns why."""
        while self._loss is None:
            await self._state_changed.wait()
        return self._loss.why

    async def back(self) -> None:
        """Waits until the engine may generate."""
        while self.state not in GENERATING:
            await self._state_changed.wait()

    def _enter(self, state: WorkerState) -> None:
        assert state in TRANSITIONS[self.state], (
            f"{self.name} can't go from {self.state.value} to {state.value}"
        )
        self.state = state
        self.engine.dead(state not in GENERATING)
        self._notify()

    def _notify(self) -> None:
        """Wakes every wait for a change of state."""
        self._changed.set()
        self._state_changed.set()
        self._state_changed = asyncio.Event()
