"""A model of everything around the replay buffer, for its tests.

`World` plays engines, a learner and a publisher without clocks. It keeps its own naive records and
compares the buffer with them: the version of every group, how it ended, and who holds a credit.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from dapo_async.replay import (
    BufferState,
    OfferOutcome,
    ReplayBuffer,
    dynamic_sampling,
    has_tokens,
)
from dapo_async.types import Completion, FinishReason, Group, Prompt, Rollout, TrainBatch

PROMPT = Prompt(row=0, text="1+1=", token_ids=np.zeros(4, np.int32), answer="2")
MIXED, RIGHT, WRONG = (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)


def make_group(
    group_id: int,
    *,
    accuracies: Sequence[float] = MIXED,
    version: int = 0,
    num_tokens: int = 3,
    incarnation: str = "life-1",
) -> Group:
    completion = Completion(
        token_ids=np.zeros(num_tokens, np.int32),
        behaviour_logprobs=np.zeros(num_tokens, np.float32),
        weight_versions=np.full(num_tokens, version, np.int32),
        prefill_version=version,
        finish_reason=FinishReason.STOP,
    )
    rollouts = tuple(Rollout(completion, "2", accuracy, accuracy, "2") for accuracy in accuracies)
    return Group(group_id, PROMPT, rollouts, incarnation, temperature=1.0)


def make_buffer(kind: type[ReplayBuffer] = ReplayBuffer, **overrides: Any) -> ReplayBuffer:
    """One group per step and no staleness unless overridden."""
    knobs = {
        "groups_per_step": 1,
        "max_staleness": 0,
        "num_steps": 4,
        "max_rejected_in_a_row": 10**9,
        "incarnation": "life-1",
    }
    return kind(filters=(has_tokens, dynamic_sampling), **{**knobs, **overrides})


class World:
    """Every method is one event; `World.check` holds between any two of them."""

    def __init__(
        self,
        buffer: ReplayBuffer,
        *,
        workers: Sequence[str] = ("worker-0", "worker-1"),
        healthy: bool = True,
    ) -> None:
        self.buffer = buffer
        self.healthy = healthy  # nothing may be evicted
        self.version = 0  # of the learner
        self.engine_versions = dict.fromkeys(workers, 0)
        self.generating: dict[int, tuple[str, int]] = {}  # group id → worker, version at its start
        self.oldest: dict[int, int] = {}  # of every offered group
        self.training: TrainBatch | None = None  # a minibatch
        self.in_step: tuple[int, ...] = ()  # trained groups of the step that is open
        # Groups of the last step, whose weights are not on all engines yet; None: all are.
        self.publishing: tuple[int, ...] | None = None
        self.missing = 0  # groups that steps have lacked because they were cut
        # Groups of lost engines → version at their start.
        self.partial_completions: dict[int, int] = {}
        self.endings: Counter[str] = Counter()
        self.offered_tokens = 0  # in this incarnation
        self.tokens: dict[int, int] = {}  # of every offered group that has not ended
        self.ended_tokens: Counter[str] = Counter()
        self.steps = 0
        buffer.serve(0)

    @property
    def done(self) -> bool:
        return self.steps == self.buffer.num_steps

    def admit(self, worker: str) -> None:
        group_id = self.buffer.admit(worker)
        started = self.engine_versions[worker]
        if group_id in self.partial_completions and self.buffer.continues(group_id):
            started = min(started, self.partial_completions[group_id])
        self.partial_completions.pop(group_id, None)
        self.generating[group_id] = (worker, started)

    def offer(
        self, group_id: int, *, accuracies: Sequence[float] = MIXED, newer: int = 0
    ) -> OfferOutcome:
        """Offers a group that its worker has generated.

        `newer`: by how many versions a recomputed prefill is newer than the group's start.
        """
        worker, started = self.generating.pop(group_id)
        self.oldest[group_id] = min(started + newer, max(started, self.engine_versions[worker]))
        group = make_group(
            group_id,
            accuracies=accuracies,
            version=self.oldest[group_id],
            num_tokens=1 + group_id % 5,
        )
        self.tokens[group_id] = group.num_response_tokens
        self.offered_tokens += group.num_response_tokens
        result = self.buffer.offer(group, payload=f"payload-{group_id}")
        if result.outcome in (OfferOutcome.REJECTED, OfferOutcome.EVICTED):
            self.endings[result.outcome.value] += 1
            self.end_tokens(result.outcome.value, [group_id])
        return result.outcome

    def end_tokens(self, outcome: str, group_ids: Iterable[int]) -> None:
        self.ended_tokens[outcome] += sum(self.tokens.pop(each, 0) for each in group_ids)

    def fail(self, group_id: int) -> None:
        del self.generating[group_id]
        assert self.buffer.fail(group_id, why="engine out of memory")
        self.endings["failed"] += 1

    def hand_back(self, group_id: int, *, with_partial_completions: bool) -> None:
        _, started = self.generating.pop(group_id)
        assert self.buffer.hand_back(
            group_id, oldest_version=started if with_partial_completions else None
        )
        self.partial_completions[group_id] = started

    def lose_worker(self, worker: str) -> None:
        mine = {group_id for group_id, (owner, _) in self.generating.items() if owner == worker}
        assert set(self.buffer.lose_worker(worker)) == mine
        for group_id in mine:
            del self.generating[group_id]
            self.partial_completions.pop(group_id, None)

    def take(self) -> bool:
        assert self.training is None
        assert not self.done
        for group_id in self.buffer.evict_doomed(self.version):
            self.generating.pop(group_id, None)
            self.endings["evicted"] += 1
            self.end_tokens("evicted", [group_id])
        expected = self.expected_batch()
        batch = self.buffer.take(self.version)
        if type(self.buffer) is ReplayBuffer:
            assert (batch and batch.group_ids) == expected
        if batch is None:
            return False
        for group_id, payload in zip(batch.group_ids, batch.references, strict=True):
            assert payload == f"payload-{group_id}"
            staleness = self.version - self.oldest[group_id]
            assert staleness <= self.buffer.max_staleness, f"trained at staleness {staleness}"
        assert len(batch.group_ids) == self.buffer.groups_per_take
        in_step = len(self.in_step) + len(batch.group_ids)
        assert batch.closes_step == (in_step == self.buffer.groups_per_step)
        self.training = batch
        return True

    def expected_batch(self) -> tuple[int, ...] | None:
        """What a take returns, by a look at each outstanding group and each deadline."""
        buffer = self.buffer
        size, per_step, taken = buffer.groups_per_take, buffer.groups_per_step, len(self.in_step)
        finished = sorted((group.deadline, number) for number, group in buffer._buffered.items())
        rest = [deadline for deadline, _ in finished[size:]]
        rest += [started.deadline for started in buffer._generating.values()]
        fits = all(
            sum(each <= deadline for each in rest)
            <= max(0, (deadline - self.version + 1) * per_step - taken - size)
            for deadline in rest
        )
        if len(finished) < size or not fits:
            return None
        return tuple(sorted(number for _, number in finished[:size]))

    def can_finish(self, *, finite: bool = True) -> bool:
        """Whether the learner can end its minibatch now: there is one publish at a time."""
        training = self.training
        return training is not None and (
            self.publishing is None or (finite and not training.closes_step)
        )

    def finish_minibatch(self, *, finite: bool = True) -> None:
        """The last minibatch makes the next version; its publish starts at once."""
        assert self.can_finish(finite=finite)
        assert self.training is not None
        batch, self.training = self.training, None
        (self.buffer.trained if finite else self.buffer.skipped)(batch.group_ids)
        self.endings["trained" if finite else "skipped"] += len(batch.group_ids)
        self.end_tokens("trained" if finite else "skipped", batch.group_ids)
        self.in_step += batch.group_ids
        if not (finite or batch.closes_step):
            self.cut()
        elif batch.closes_step:
            self.end_step()

    def cut(self) -> None:
        """The learner ends the step early. Groups whose deadline was this step are lost."""
        assert self.in_step
        returned = self.buffer.cut_step(self.version)
        assert set(returned) == set(self.training.group_ids if self.training else ())
        self.training = None
        self.missing += self.buffer.groups_per_step - len(self.in_step)
        self.healthy = False
        self.end_step()

    def end_step(self) -> None:
        self.publishing, self.in_step = self.in_step, ()
        self.version += 1
        self.steps += 1

    def update_engine(self, worker: str) -> None:
        """One engine has the new weights before the others."""
        assert self.publishing is not None
        self.engine_versions[worker] = self.version

    def finish_publish(self) -> None:
        assert self.publishing is not None
        for worker in self.engine_versions:
            self.update_engine(worker)
        self.buffer.serve(self.version)
        self.buffer.release(self.publishing)
        self.publishing = None

    def resume(self) -> None:
        """Kills the run and resumes it from a checkpoint of this instant, written as JSON.

        All engines then start with the newest weights. A step that is open is cut.
        """
        if self.in_step:
            self.cut()
        state = self.buffer.snapshot(self.version)
        written = json.loads(json.dumps(state.to_json()))
        read = BufferState.from_json(
            written, {group_id: group.payload for group_id, group in state.buffered.items()}
        )
        before = self.buffer
        self.buffer = type(before).from_snapshot(
            read,
            groups_per_step=before.groups_per_step,
            max_staleness=before.max_staleness,
            num_steps=before.num_steps,
            filters=(has_tokens, dynamic_sampling),
            max_rejected_in_a_row=10**9,
            incarnation=before.incarnation,
            num_minibatches=before.groups_per_step // before.groups_per_take,
            whole_steps=before._whole_steps,
        )
        self.generating.clear()
        self.offered_tokens = 0  # the resumed incarnation has a book of its own
        self.ended_tokens.clear()
        assert self.buffer.tokens.counts.resumed == sum(self.tokens.values())
        self.training = self.publishing = None
        self.engine_versions = dict.fromkeys(self.engine_versions, self.version)
        self.check()
        assert self.buffer.admissible() == 0  # no engine serves yet
        self.buffer.serve(self.version)

    def check(self) -> None:
        """The buffer's own checks, and its counts against the records of this world."""
        self.buffer.check()
        self.check_tokens()
        counts = self.buffer.counts
        assert not (self.healthy and counts.evicted), (
            f"evicted {counts.evicted} groups of a healthy run"
        )
        in_training = len(self.training.group_ids) if self.training else 0
        expected = {
            **dict.fromkeys(("trained", "skipped", "failed", "evicted", "rejected"), 0),
            **self.endings,
        }
        actual = {name: getattr(counts, name) for name in expected if name != "rejected"} | {
            "rejected": sum(counts.rejected.values())
        }
        assert actual == expected
        assert (
            counts.in_flight
            == len(self.generating)
            + self.buffer.num_buffered
            + self.buffer.num_to_reissue
            + in_training
        )
        assert self.buffer.num_generating == len(self.generating)
        buffer, deadlines = self.buffer, self.buffer._deadlines
        finished = Counter(group.deadline for group in buffer._buffered.values())
        running = Counter(started.deadline for started in buffer._generating.values())
        assert deadlines.finished == finished
        assert deadlines.outstanding == finished + running
        total = (self.buffer.max_staleness + 1) * self.buffer.groups_per_step
        unpublished = len(self.publishing or ()) + len(self.in_step)
        held = counts.in_flight + unpublished
        assert self.buffer.credits_held == held <= total, (
            f"{self.buffer.credits_held} credits are held by {held} groups"
        )
        remaining = (self.buffer.num_steps - self.steps) * self.buffer.groups_per_step
        # The places of a step that was cut are lost, not the groups that were meant for them.
        remaining += self.missing - in_training - len(self.in_step)
        outstanding = len(self.generating) + self.buffer.num_buffered + self.buffer.num_to_reissue
        assert outstanding <= remaining, (
            f"{outstanding} groups are outstanding for {remaining} places"
        )

    def check_tokens(self) -> None:
        """Every token of an offered group has ended as its group, or its group is finished."""
        flow = self.buffer.tokens.counts.flat()
        ended = {name: flow[name] for name in ("trained", "skipped", "evicted", "rejected")}
        assert ended == {**dict.fromkeys(ended, 0), **self.ended_tokens}
        assert self.offered_tokens + flow["in_flight"] == sum(self.tokens.values())

    def drain(self) -> None:
        """Finishes every group and every step until the run ends.

        Raises AssertionError with "deadlock" when no event is possible.
        """
        while not self.done:
            moved = False
            if self.publishing is not None:
                self.finish_publish()
                moved = True
            if self.training is not None:
                self.finish_minibatch()
                moved = True
            for group_id in tuple(self.generating):
                self.offer(group_id)
                moved = True
            if not self.done and self.training is None:
                moved |= self.take()
            for _ in range(self.buffer.admissible()):
                self.admit(next(iter(self.engine_versions)))
                moved = True
            self.check()
            assert moved, f"deadlock: {self.buffer.explain_wait(self.version)}"


def wander(world: World, rng: random.Random, *, num_events: int, resumes: bool = True) -> None:
    """Random events, each drawn from those that can happen now."""
    workers = tuple(world.engine_versions)
    for _ in range(num_events):
        events: list[tuple[float, Any]] = [
            (0.05, lambda: world.lose_worker(rng.choice(workers))),
            (0.1 * resumes, world.resume),
        ]
        if world.buffer.admissible():
            events.append((3, lambda: world.admit(rng.choice(workers))))
        if world.generating:
            group_id = rng.choice(tuple(world.generating))
            events.append(
                (
                    2,
                    lambda group_id=group_id: world.offer(
                        group_id,
                        accuracies=rng.choice((MIXED, MIXED, RIGHT, WRONG)),
                        newer=rng.randrange(3),
                    ),
                )
            )
            events.append((0.2, lambda group_id=group_id: world.fail(group_id)))
        if world.training is None and not world.done:
            events.append((1, world.take))
        finite = rng.random() > 0.1
        if world.can_finish(finite=finite):
            events.append((1, partial(world.finish_minibatch, finite=finite)))
        if world.publishing is not None:
            events.append((0.5, lambda: world.update_engine(rng.choice(workers))))
            events.append((1, world.finish_publish))
        weights, actions = zip(*events, strict=True)
        rng.choices(actions, weights)[0]()
        world.check()
