"""One engine of the simulator: it decodes in effect token by token, without an event per token.

All running sequences get one token per decode step. So the engine has one counter of decode steps,
and a sequence ends when the counter has grown by its length. Between two events n sequences run,
and their context grows by n tokens per step: the time of d steps is a quadratic function of d,
which is solved exactly. An event is needed only when a sequence ends, when the KV cache is full, or
when something comes from outside.

The simulator calls the engine; the engine calls nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

from dapo_async.replay.slot_demand import GroupInFlight, SlotDemand

NEVER = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpeed:
    """What one engine can do.

    A decode step with n running sequences and a context of K tokens in all takes
    `step_s[n] + context_s · K` seconds.
    """

    step_s: tuple[float, ...]  # by number of running sequences, 0 … slots
    context_s: float = 0.0
    prefill_s: float = 0.0  # per token that is prefilled; decoding waits meanwhile
    kv_tokens: float = math.inf  # what the KV cache holds
    # Tokens per running sequence that stay free when a sequence starts; SGLang's estimate.
    reserve_tokens: float = 256.0

    @property
    def num_slots(self) -> int:
        return len(self.step_s) - 1

    @classmethod
    def constant(cls, token_s: float, num_slots: int) -> EngineSpeed:
        """Every sequence needs `token_s` per token, whatever else runs."""
        return cls(step_s=(token_s,) * (num_slots + 1))

    def tokens_per_s(self, running: float, context: float) -> float:
        """Generated tokens per second with `running` sequences of `context` tokens each."""
        below = min(int(running), self.num_slots - 1)
        share = running - below
        step_s = (1 - share) * self.step_s[below] + share * self.step_s[below + 1]
        return running / (step_s + self.context_s * running * context)


@dataclass(slots=True)
class OpenGroup:
    """A group that was admitted and is not trained."""

    group_id: int
    lengths: list[int]
    luck: float  # the filters keep the group if their acceptance is larger
    demand: GroupInFlight
    left: int  # siblings that have not ended
    oldest_version: int = 2**31  # of its tokens so far
    prefilled: int = -1  # version with which its engine computed the prompt last
    tokens: int = 0  # of the siblings that have ended
    versions: float = 0.0  # sum over generated tokens
    # Siblings of a lost engine: tokens still to be generated, and those there are.
    parts: list[tuple[float, float]] = field(default_factory=list)


class Sequence:
    """One sibling on an engine."""

    __slots__ = ("done", "group", "left", "start", "versions")

    def __init__(self, group: OpenGroup, left: float, done: float = 0.0) -> None:
        self.group = group
        self.left = left  # tokens to be generated when it starts
        self.done = done  # tokens that it had before it started
        self.start = 0.0  # decode step
        self.versions = 0.0  # the engine's sum of versions at the start


@dataclass(slots=True)
class SlotSeconds:
    """Slots of an engine times seconds, by what they did. They add up to slots × elapsed time."""

    running: float = 0.0
    queued: float = 0.0  # a sequence waits, because the KV cache is full
    no_credit: float = 0.0
    tail: float = 0.0  # running sequences must end before new weights are loaded
    sync: float = 0.0  # new weights are loaded
    dead: float = 0.0

    def values(self) -> tuple[float, ...]:
        return (self.running, self.queued, self.no_credit, self.tail, self.sync, self.dead)


class SimulatedEngine:
    """Slots, the siblings that run in them, and those that wait in the order of their groups."""

    def __init__(
        self, number: int, speed: EngineSpeed, *, prompt_tokens: int, demand: SlotDemand
    ) -> None:
        self.number, self.name, self.speed = number, f"rollout-{number}", speed
        self.prompt_tokens, self.demand = prompt_tokens, demand
        self.num_slots = speed.num_slots
        self.alive, self.draining, self.stamp = True, False, 0
        self.version = 0
        self.slowdown = 1.0  # a decode step takes so many times as long, for a while
        self.waiting: deque[Sequence] = deque()
        # The running sequences, the next one to end last, and minus the decode steps of their ends.
        self.sequences: list[Sequence] = []
        self._ends: list[float] = []
        self.slot_s = SlotSeconds()
        self.generated = 0.0  # tokens
        self.num_retracted = 0
        self.prefilled_tokens = 0.0
        self._at_s = 0.0  # the time of all values
        self._resume_s = 0.0  # until then it prefills or loads weights, and decodes nothing
        self._steps = 0.0  # decode steps so far
        self._context = 0.0  # tokens of the running sequences
        self._target = 0.0  # decode step of the next event
        self._versions, self._versions_since = 0.0, 0.0  # sum of versions until a decode step

    @property
    def running(self) -> int:
        return len(self.sequences)

    def advance(self, now_s: float) -> None:
        """Decodes until `now_s`; nothing ends before it."""
        begin_s = self._resume_s if self._resume_s > self._at_s else self._at_s
        if now_s > begin_s and self.sequences:
            n = len(self.sequences)
            at_once, growth = self._step_time(n)
            elapsed_s = now_s - begin_s
            root = math.sqrt(at_once * at_once + 4 * growth * elapsed_s)
            self._decode(2 * elapsed_s / (at_once + root), n)
        self._account(now_s)

    def arrive(self, now_s: float) -> None:
        """As `advance`, to the event that `next_event_s` predicted."""
        if n := len(self.sequences):
            grown = n * (self._target - self._steps)
            self._steps = self._target
            self._context += grown
            self.generated += grown
        self._account(now_s)

    def next_event_s(self) -> float:
        """When the next sequence ends or the KV cache is full, if nothing else happens."""
        ends, speed = self._ends, self.speed
        if not ends:
            return NEVER
        n, context = len(ends), self._context
        steps = -ends[-1] - self._steps
        if speed.kv_tokens - context < steps * n:
            steps = max(0.0, speed.kv_tokens - context) / n
        self._target = self._steps + steps
        begin_s = self._resume_s if self._resume_s > self._at_s else self._at_s
        # `_step_time`, written out: this is the most frequent call of a simulation.
        mean_context = context + 0.5 * n * steps
        step_s = speed.step_s[n] + speed.context_s * mean_context
        return begin_s + self.slowdown * steps * step_s

    def finish(self) -> list[OpenGroup]:
        """Takes the sequences off that have ended; returns the groups whose last one it was."""
        ended, ends, steps = [], self._ends, -self._steps - 1e-6
        versions = self._version_sum()
        while ends and ends[-1] >= steps:
            ends.pop()
            sequence = self.sequences.pop()
            group = sequence.group
            total = sequence.left + sequence.done
            self._context -= self.prompt_tokens + total
            group.versions += versions - sequence.versions
            group.tokens += int(total + 0.5)
            group.left -= 1
            group.demand.end_siblings(1)
            if not group.left:
                group.demand.stop()
                ended.append(group)
        if not ends:
            self._context = 0.0  # without the error of many sums
        return ended

    @property
    def is_full(self) -> bool:
        """No running sequence can get another token."""
        return self._context >= self.speed.kv_tokens - 1e-6

    def retract(self) -> None:
        """The KV cache is full: sends the shortest responses back to the queue."""
        speed = self.speed
        while len(self.sequences) > 1:
            needed = self._context + speed.reserve_tokens * len(self.sequences)
            if needed < speed.kv_tokens:
                break
            grown = [sequence.start - sequence.done for sequence in self.sequences]
            place = grown.index(max(grown))
            del self._ends[place]
            sequence = self.sequences.pop(place)
            self._interrupt(sequence)
            self.waiting.appendleft(sequence)
            self.num_retracted += 1

    def fill(self) -> None:
        """Starts waiting sequences in free slots, as far as the KV cache has room."""
        speed, waiting, running = self.speed, self.waiting, self.sequences
        while waiting and len(running) < self.num_slots and not self.draining:
            sequence = waiting[0]
            context = self.prompt_tokens + sequence.done
            reserve = speed.reserve_tokens * (len(running) + 1)
            if running and self._context + context + reserve > speed.kv_tokens:
                return
            waiting.popleft()
            self._start(sequence, context)

    def pause(self, seconds: float) -> None:
        """The engine decodes nothing for so long, because it loads weights or evaluates."""
        self._resume_s = max(self._resume_s, self._at_s) + seconds
        lost = len(self.sequences) * seconds
        self.slot_s.running -= lost
        self.slot_s.sync += lost

    def switch(self, version: int, *, recompute: bool) -> None:
        """New weights: tokens have `version` from now on. `recompute`: of all KV entries."""
        self._versions = self._version_sum()
        self._versions_since = self._steps
        self.version = version
        if recompute:
            self._prefill(self._context)

    def fail(self) -> list[OpenGroup]:
        """The engine is lost; returns its groups, with what is left of them in `parts`."""
        groups: dict[int, OpenGroup] = {}
        for sequence in self.sequences:
            self._interrupt(sequence)
        for sequence in [*self.sequences, *self.waiting]:
            group = groups.setdefault(sequence.group.group_id, sequence.group)
            group.parts.append((sequence.left, sequence.done))
        self.sequences, self._ends, self.waiting = [], [], deque()
        self.alive = self.draining = False
        for group in groups.values():
            group.demand.stop()
        return list(groups.values())

    def _start(self, sequence: Sequence, context: float) -> None:
        group = sequence.group
        prompt = 0 if group.prefilled == self.version else self.prompt_tokens
        group.prefilled = self.version
        if self.version < group.oldest_version:
            group.oldest_version = self.version
        if prompt or sequence.done:
            self._prefill(prompt + sequence.done)
        sequence.start, sequence.versions = self._steps, self._version_sum()
        self._context += context
        end = -self._steps - sequence.left
        place = bisect_left(self._ends, end)
        self._ends.insert(place, end)
        self.sequences.insert(place, sequence)

    def _interrupt(self, sequence: Sequence) -> None:
        """The sequence leaves its slot; it keeps its tokens."""
        grown = self._steps - sequence.start
        sequence.group.versions += self._version_sum() - sequence.versions
        self._context -= self.prompt_tokens + sequence.done + grown
        sequence.left, sequence.done = sequence.left - grown, sequence.done + grown

    def _prefill(self, tokens: float) -> None:
        self.prefilled_tokens += tokens
        seconds = tokens * self.speed.prefill_s * self.slowdown
        self._resume_s = max(self._resume_s, self._at_s) + seconds

    def _step_time(self, n: int) -> tuple[float, float]:
        """The time of d decode steps is d · (first + second · d)."""
        speed, slowdown = self.speed, self.slowdown
        return (
            slowdown * (speed.step_s[n] + speed.context_s * self._context),
            slowdown * 0.5 * speed.context_s * n,
        )

    def _decode(self, steps: float, n: int) -> None:
        self._steps += steps
        self._context += n * steps
        self.generated += n * steps

    def _version_sum(self) -> float:
        """Sum of the versions of the tokens that one sequence would have sampled until now."""
        return self._versions + self.version * (self._steps - self._versions_since)

    def _account(self, now_s: float) -> None:
        elapsed_s, self._at_s = now_s - self._at_s, now_s
        slot_s, n = self.slot_s, len(self.sequences)
        slot_s.running += n * elapsed_s
        if n == self.num_slots:
            return
        free_s = (self.num_slots - n) * elapsed_s
        if not self.alive:
            slot_s.dead += free_s
        elif self.draining:
            slot_s.tail += free_s
        elif self.waiting:
            slot_s.queued += free_s
        else:
            slot_s.no_credit += free_s
