"""Just-in-time admission: the pacer alone, and with the real buffer in simulated seconds."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from statistics import mean

import pytest
from replay_world import MIXED, make_buffer, make_group

from dapo_async.replay.pacing import FIRST_PAUSE, WINDOW, Pacer

N, CREDITS, STEP_S = 8, 40, 1.0


def trained(pacer: Pacer, steps: int, *, finished: int, waited_s: float = 0.0) -> None:
    """Steps of one second with `finished` groups in the buffer at their end."""
    start_s = pacer._took_s or 0.0
    for step in range(steps):
        asked_s = start_s + (step + 1) * STEP_S
        pacer.asks(asked_s, finished=finished)
        pacer.took(asked_s + waited_s)


def test_without_a_surplus_every_credit_may_be_used() -> None:
    pacer = Pacer(groups_per_step=N, credits=CREDITS)
    assert pacer.room(0.0, out=CREDITS - 1) >= 1
    trained(pacer, 50, finished=N + 1)  # one group is within the margin
    assert pacer.limit == CREDITS


def test_a_lasting_surplus_lowers_the_limit_but_never_below_a_batch() -> None:
    pacer = Pacer(groups_per_step=N, credits=CREDITS)
    trained(pacer, 1 + 2 * WINDOW, finished=30)
    assert N < pacer.limit < CREDITS - 10
    trained(pacer, 50 * WINDOW, finished=30)
    assert pacer.limit == N


def test_one_step_without_a_surplus_keeps_the_limit_of_its_window() -> None:
    pacer = Pacer(groups_per_step=N, credits=CREDITS)
    trained(pacer, 1, finished=30)
    for _ in range(5):
        trained(pacer, WINDOW - 1, finished=30)
        trained(pacer, 1, finished=N)
    assert pacer.limit == CREDITS


def test_a_wait_raises_the_limit_and_pauses_longer_each_time() -> None:
    pacer = Pacer(groups_per_step=N, credits=CREDITS)
    trained(pacer, 1 + 20 * WINDOW, finished=30)
    low = pacer.limit
    trained(pacer, 1, finished=N - 2, waited_s=0.5)
    raised = pacer.limit
    assert raised >= (low + CREDITS) / 2
    trained(pacer, FIRST_PAUSE - 1, finished=30)
    assert pacer.limit == raised, "the limit fell during the pause"
    trained(pacer, 2 * WINDOW, finished=30)
    assert pacer.limit < raised
    trained(pacer, 1, finished=N - 2, waited_s=0.5)
    raised = pacer.limit
    trained(pacer, 2 * FIRST_PAUSE - 1, finished=30)
    assert pacer.limit == raised, "the second pause is not longer"


def test_a_batch_in_training_counts_as_consumed_group_by_group() -> None:
    pacer = Pacer(groups_per_step=N, credits=CREDITS)
    trained(pacer, 1 + 50 * WINDOW, finished=30)
    assert pacer.limit == N
    start_s = pacer._took_s
    assert start_s is not None
    assert pacer.room(start_s, out=0) == 0
    assert pacer.room(start_s + 0.5, out=0) == N // 2
    assert pacer.room(start_s + 0.5, out=N // 2) == 0
    assert pacer.next_start_s(start_s + 0.5, out=N // 2) == pytest.approx(start_s + 5 / 8)
    assert pacer.room(start_s + 5 / 8, out=N // 2) == 1
    assert pacer.next_start_s(start_s + 0.5, out=N) is None, "only an event makes room"
    assert pacer.room(start_s + 99.0, out=0) == N


def test_a_learner_that_waits_always_finds_room_below_a_batch() -> None:
    pacer = Pacer(groups_per_step=N, credits=CREDITS)
    trained(pacer, 1 + 50 * WINDOW, finished=30)
    pacer.asks(1e3, finished=0)
    assert pacer.room(1e3, out=N - 1) == 1


@dataclass
class Outcome:
    wall_s: float = 0.0
    staleness: list[float] = field(default_factory=list)
    limit: float = 0.0


def simulate(
    *, paced: bool, generation_s: float, spread: float, seed: int, max_staleness: int = 4
) -> Outcome:
    """250 steps of one second; engines without a limit of slots."""
    buffer = make_buffer(groups_per_step=N, max_staleness=max_staleness, num_steps=250)
    buffer.serve(0)
    pacer = Pacer(groups_per_step=N, credits=(max_staleness + 1) * N)
    outcome, now_s, version, asked = Outcome(), 0.0, 0, False
    training = None
    started: dict[int, int] = {}
    random_numbers = random.Random(seed)
    events: list[tuple[float, int, str, int]] = []

    def at(time_s: float, name: str, group_id: int = -1) -> None:
        heapq.heappush(events, (time_s, len(started), name, group_id))

    def out() -> int:
        return buffer.num_generating + buffer.num_buffered

    while True:
        while buffer.admissible() and (not paced or pacer.room(now_s, out=out())):
            group_id = buffer.admit("worker-0")
            started[group_id] = buffer.served_version or 0
            duration_s = generation_s * random_numbers.lognormvariate(0, spread)
            at(now_s + duration_s, "finish", group_id)
        if paced and buffer.admissible() and (next_s := pacer.next_start_s(now_s, out=out())):
            at(next_s, "wake")
        if training is None and buffer.steps_left:
            if not asked:
                pacer.asks(now_s, finished=buffer.num_buffered)
                asked = True
            training = buffer.take(version)
            if training is not None:
                pacer.took(now_s)
                asked = False
                outcome.staleness += [version - oldest for oldest in training.oldest_versions]
                at(now_s + STEP_S * random_numbers.uniform(0.9, 1.1), "step")
        if not events:
            break
        now_s, _, name, group_id = heapq.heappop(events)
        if name == "finish":
            group = make_group(group_id, accuracies=MIXED, version=started[group_id])
            buffer.offer(group, group_id)
        elif name == "step":
            assert training is not None
            version += 1
            buffer.trained(training.group_ids)
            buffer.serve(version)
            buffer.release(training.group_ids)
            training = None
    assert buffer.steps_left == 0, buffer.explain_wait(version)
    outcome.wall_s, outcome.limit = now_s, pacer.limit
    return outcome


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("generation_s", [0.1, 0.5])
def test_with_a_slow_learner_groups_are_fresher_at_the_same_speed(
    generation_s: float, spread: float
) -> None:
    eager = simulate(paced=False, generation_s=generation_s, spread=spread, seed=1)
    paced = simulate(paced=True, generation_s=generation_s, spread=spread, seed=1)
    assert paced.wall_s <= 1.02 * eager.wall_s
    assert mean(paced.staleness) <= 0.6 * mean(eager.staleness)
    assert mean(paced.staleness[-N * 50 :]) < 2.3 < 3.0 < mean(eager.staleness[-N * 50 :])


@pytest.mark.parametrize("generation_s", [4.0, 12.0])
def test_slow_engines_keep_every_credit(generation_s: float) -> None:
    eager = simulate(paced=False, generation_s=generation_s, spread=0.5, seed=1)
    paced = simulate(paced=True, generation_s=generation_s, spread=0.5, seed=1)
    assert paced.wall_s <= 1.02 * eager.wall_s
