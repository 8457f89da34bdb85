"""Just-in-time admission: the pacer alone, and runs in virtual time with the real buffer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.simulated_run import Shape, fleet, simulate

from dapo_async.planner import Lengths
from dapo_async.replay.pacing import WINDOW, Pacer

N, CREDITS, STEP_S = 8, 40, 1.0
LONG = CREDITS // N  # takes until a new limit shows, at most


class Learner:
    """Asks a pacer for batches, in steps of one second."""

    def __init__(self, pacer: Pacer) -> None:
        self.pacer, self.now_s, self.version = pacer, 0.0, 0
        self.steps(1, finished=N)  # teaches the pacer the duration of a step

    def steps(
        self, count: int, *, finished: int, waits_s: float = 0.0, engines_wait: bool = True
    ) -> None:
        for _ in range(count):
            self.pacer.asks(
                self.now_s, version=self.version, finished=finished, engines_wait=engines_wait
            )
            self.pacer.took(self.now_s + waits_s)
            self.now_s += waits_s + STEP_S
            self.version += 1

    def room(self, out: int) -> int:
        return self.pacer.room(self.now_s, out=out, served_version=self.version)


@pytest.fixture
def pacer() -> Pacer:
    return Pacer(groups_per_take=N, credits=CREDITS)


@pytest.fixture
def learner(pacer: Pacer) -> Learner:
    return Learner(pacer)


def test_without_a_surplus_every_credit_may_be_used(learner: Learner) -> None:
    assert learner.room(CREDITS - 1) >= 1
    learner.steps(50, finished=N + 1)  # one group is within the margin
    assert learner.pacer.limit == CREDITS
    assert learner.room(CREDITS) >= 1, "only credits are the bound"


def test_a_lasting_surplus_lowers_the_limit_but_never_below_a_batch(learner: Learner) -> None:
    learner.steps(WINDOW, finished=30)
    assert learner.pacer.limit == CREDITS - 11  # of 22 groups, one is the margin
    learner.steps(50 * WINDOW, finished=30)
    assert learner.pacer.limit == N
    assert [learner.room(out) for out in (0, N - 1, N, N + 1)] == [N, 1, 0, 0]


def test_a_surplus_is_kept_while_engines_seldom_wait(learner: Learner) -> None:
    for _ in range(10):
        learner.steps(1, finished=30)
        learner.steps(8, finished=30, engines_wait=False)
    assert learner.pacer.limit == CREDITS
    learner.steps(2 * WINDOW, finished=30)
    assert learner.pacer.limit < CREDITS


def test_one_step_without_a_surplus_keeps_the_limit_of_its_window(learner: Learner) -> None:
    for _ in range(5):
        learner.steps(WINDOW - 1, finished=30)
        learner.steps(1, finished=N)
    assert learner.pacer.limit == CREDITS


def test_waits_for_groups_raise_the_limit_by_the_missing_ones_then_by_more(
    learner: Learner,
) -> None:
    learner.steps(50 * WINDOW, finished=30)
    learner.steps(1, finished=N - 3, waits_s=0.5)
    assert learner.pacer.limit == N + 3
    learner.steps(2, finished=N - 3, waits_s=0.5)  # the new limit shows after two takes
    assert learner.pacer.limit == N + 3 + 7, "a quarter of the way to all credits"
    learner.steps(4 * LONG, finished=N - 3, waits_s=0.5)
    assert learner.pacer.limit == CREDITS, "the engines are too slow: all credits are needed"


def test_after_a_wait_the_limit_rests_until_the_wait_is_paid_off(learner: Learner) -> None:
    learner.steps(50 * WINDOW, finished=30)
    learner.steps(1, finished=N - 3, waits_s=0.2)  # 0.1 steps were saved, 0.1 are owed
    learner.steps(19, finished=30)  # at 0.005 per step
    assert learner.pacer.limit == N + 3
    learner.steps(2 * WINDOW, finished=30)
    assert learner.pacer.limit == N


def test_a_wait_for_a_deadline_does_not_raise_the_limit(learner: Learner) -> None:
    learner.steps(50 * WINDOW, finished=30)
    learner.steps(20, finished=N + 2, waits_s=0.5)  # enough groups are finished
    assert learner.pacer.limit == N


def test_no_group_starts_just_before_newer_weights_are_served(learner: Learner) -> None:
    pacer, now_s, version = learner.pacer, learner.now_s, learner.version
    pacer.asks(now_s, version=version, finished=N, engines_wait=True)
    old, new = version - 1, version
    assert pacer.room(now_s + 0.09, out=0, served_version=old) == 0
    assert pacer.next_start_s(now_s + 0.09, served_version=old) == pytest.approx(now_s + 0.1)
    assert pacer.room(now_s + 0.05, out=0, served_version=new) == CREDITS
    assert pacer.next_start_s(now_s + 0.05, served_version=new) is None
    assert pacer.room(now_s + 0.11, out=0, served_version=old) == CREDITS, "a slow publish"


# Runs of two engines. A mean response takes `response_steps` of a learner's step, the longest
# four times as long. `split`: production over consumption.
LEARNER_BOUND, BALANCED, ENGINE_BOUND = 2.0, 1.0, 0.5


def run_of(
    split: float,
    *,
    tail: float = 0.5,
    max_staleness: int = 2,
    response_steps: float = 0.2,
    num_steps: int = 60,
) -> Shape:
    return fleet(
        split=split,
        response_steps=response_steps,
        groups_per_step=16,
        group_size=4,
        max_staleness=max_staleness,
        lengths=Lengths(tail=tail, shared=0.0),
        num_steps=num_steps,
        warm_up=0.5,
        jitter=0.05,
    )


@pytest.mark.parametrize("tail", [0.0, 0.5, 1.2])
@pytest.mark.parametrize("split", [LEARNER_BOUND, BALANCED, ENGINE_BOUND])
def test_pacing_costs_no_speed_and_the_ideal_rate_is_reached(split: float, tail: float) -> None:
    paced = simulate(run_of(split, tail=tail))
    eager = simulate(replace(run_of(split, tail=tail), paced=False))
    assert paced.rate >= 0.98 * eager.rate
    assert paced.rate >= 0.95
    assert paced.staleness <= eager.staleness + 0.05


@pytest.mark.parametrize(
    ("response_steps", "tail", "max_staleness", "staleness"),
    [
        (0.1, 0.5, 2, 1.25),
        (0.1, 0.5, 8, 1.4),
        (0.2, 0.5, 2, 1.4),
        (0.2, 1.2, 2, 1.6),
        (0.4, 0.5, 4, 1.8),
    ],
)
def test_with_a_slow_learner_staleness_falls_nearly_to_one(
    response_steps: float, tail: float, max_staleness: int, staleness: float
) -> None:
    shape = run_of(
        LEARNER_BOUND,
        tail=tail,
        max_staleness=max_staleness,
        response_steps=response_steps,
        num_steps=90,
    )
    paced = simulate(shape)
    assert paced.rate >= 0.98
    assert 1.0 <= paced.staleness <= staleness


def test_with_four_minibatches_a_slow_learner_is_nearly_on_policy() -> None:
    shape = run_of(LEARNER_BOUND, response_steps=0.1, num_steps=90)
    paced = simulate(replace(shape, num_minibatches=4))
    assert paced.rate >= 0.98
    assert 0.25 <= paced.staleness < 0.5


@pytest.mark.parametrize("split", [LEARNER_BOUND, BALANCED, ENGINE_BOUND])
def test_pacing_minibatches_costs_no_speed(split: float) -> None:
    paced = replace(run_of(split), num_minibatches=4)
    assert simulate(paced).rate >= 0.98 * simulate(replace(paced, paced=False)).rate


def test_a_longest_response_of_two_steps_is_too_long_for_two_versions() -> None:
    shape = run_of(LEARNER_BOUND, tail=1.2, response_steps=0.5)  # the longest takes 2 steps
    paced, eager = simulate(shape), simulate(replace(shape, paced=False))
    assert eager.waits_for_deadlines >= 0.9 * eager.learner_waits > 0.05
    assert paced.rate >= 0.98 * eager.rate
