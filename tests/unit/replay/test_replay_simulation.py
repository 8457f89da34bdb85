"""The replay buffer under heavy-tailed generation times, in simulated seconds.

A healthy run evicts nothing, trains every accepted group, and is faster than first-in first-out.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from replay_breakers import TakesInOrderOfCompletion, TakesWithoutWaitingForStragglers
from replay_world import MIXED, RIGHT, WRONG, make_buffer, make_group

from dapo_async.replay import OfferOutcome, ReplayBuffer

STEP_S, PUBLISH_S = 1.0, 0.3
LONG_S = 5.0  # about one group in ten takes longer
REJECT_SHARE = 0.3


@dataclass
class Outcome:
    wall_s: float = 0.0
    staleness: list[int] = field(default_factory=list)
    trained: Counter[str] = field(default_factory=Counter)  # by length of the generation
    accepted: Counter[str] = field(default_factory=Counter)
    evicted: int = 0


def simulate(
    kind: type[ReplayBuffer],
    *,
    seed: int,
    max_staleness: int,
    groups_per_step: int = 8,
    num_steps: int = 40,
) -> Outcome:
    """One run with `kind`.

    How long a group takes and whether the filters keep it depend only on seed and group id, so
    all buffers get the same load.
    """
    buffer = make_buffer(
        kind, groups_per_step=groups_per_step, max_staleness=max_staleness, num_steps=num_steps
    )
    buffer.serve(0)
    outcome, now_s, version = Outcome(), 0.0, 0
    events: list[tuple[float, int, str, int]] = []
    started: dict[int, int] = {}
    lengths: dict[int, str] = {}
    training, waiting_publish, publishing = None, None, None

    def after(delay_s: float, name: str, group_id: int = -1) -> None:
        heapq.heappush(events, (now_s + delay_s, len(started), name, group_id))

    while True:
        while buffer.admissible():
            group_id = buffer.admit("worker-0")
            duration_s = random.Random(f"{seed}/{group_id}").paretovariate(1.4)
            started[group_id], lengths[group_id] = (
                buffer.served_version or 0,
                "long" if duration_s > LONG_S else "short",
            )
            after(duration_s, "finish", group_id)
        if waiting_publish is not None and publishing is None:
            publishing, waiting_publish = waiting_publish, None
            after(PUBLISH_S, "serve")
        if training is None and waiting_publish is None and buffer.steps_left:
            training = buffer.take(version)
            if training is not None:
                outcome.staleness += [version - oldest for oldest in training.oldest_versions]
                outcome.trained.update(lengths[group_id] for group_id in training.group_ids)
                after(STEP_S, "step")
        if not events:
            break
        now_s, _, name, group_id = heapq.heappop(events)
        if name == "finish":
            rejected = random.Random(-seed * 10_000 - group_id).random() < REJECT_SHARE
            result = buffer.offer(
                make_group(
                    group_id,
                    accuracies=(RIGHT, WRONG)[group_id % 2] if rejected else MIXED,
                    version=started[group_id],
                ),
                group_id,
            )
            outcome.accepted[lengths[group_id]] += result.outcome is not OfferOutcome.REJECTED
        elif name == "step":
            assert training is not None
            buffer.trained(training.group_ids)
            training, waiting_publish, version = None, training, version + 1
        else:
            assert publishing is not None
            buffer.serve(version if waiting_publish is None else version - 1)
            buffer.release(publishing.group_ids)
            publishing = None
        buffer.check()
    assert buffer.steps_left == 0, buffer.explain_wait(version)
    outcome.wall_s, outcome.evicted = now_s, buffer.counts.evicted
    assert buffer.close().unused == 0
    return outcome


class StrictFirstInFirstOut(ReplayBuffer):
    """Waits for the groups that were admitted first; the slowest of them delays every step."""

    def _pick(self) -> list[int]:
        return sorted([*self._generating, *self._buffered])[: self.groups_per_step]

    def _overload_after_take(self, learner_version: int) -> int | None:
        if not self._buffered.keys() >= set(self._pick()):
            return -1
        return super()._overload_after_take(learner_version)


SEEDS = range(25)


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_heavy_tailed_generation_evicts_nothing_and_keeps_the_bound(max_staleness: int) -> None:
    for seed in SEEDS:
        outcome = simulate(ReplayBuffer, seed=seed, max_staleness=max_staleness)
        assert outcome.evicted == 0
        assert max(outcome.staleness) <= max_staleness


def test_every_accepted_group_is_trained_whether_long_or_short() -> None:
    for seed in SEEDS:
        outcome = simulate(ReplayBuffer, seed=seed, max_staleness=2)
        assert outcome.accepted["long"] > 10
        assert outcome.trained == outcome.accepted
        assert outcome.trained.total() == 40 * 8


def test_taking_by_deadline_is_faster_than_first_in_first_out() -> None:
    rules = (ReplayBuffer, StrictFirstInFirstOut)
    by_deadline_s, in_order_s = (
        sum(simulate(rule, seed=seed, max_staleness=4).wall_s for seed in SEEDS) for rule in rules
    )
    assert by_deadline_s < 0.97 * in_order_s


def test_taking_in_order_of_completion_breaks_the_bound() -> None:
    with pytest.raises(AssertionError, match="staleness bound broken"):
        simulate(TakesInOrderOfCompletion, seed=0, max_staleness=2)


def test_taking_without_waiting_for_stragglers_evicts_long_groups() -> None:
    outcomes = [
        simulate(TakesWithoutWaitingForStragglers, seed=seed, max_staleness=2) for seed in SEEDS
    ]
    assert sum(outcome.evicted for outcome in outcomes) > 25
