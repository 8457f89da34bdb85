"""Simulated runs: closed forms, the guarantees of the replay buffer, determinism, directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from blocked_imports import run_without

from dapo_async.planner import EngineSpeed, LearnerSpeed, Lengths, Outage, Scenario, simulate
from dapo_async.planner.closed_forms import closed_forms
from dapo_async.planner.simulator import SimulatedRun

EQUAL = Lengths(tail=0.0, mean_tokens=1000, max_tokens=4000)
MIXED = Lengths(tail=0.8, mean_tokens=1000, max_tokens=4000)
TOKENS = 16 * 16 * 1000  # response tokens of a step
DECODE_S = 20.0  # of a response of 1,000 tokens


def scenario(*, train_s: float = 10.0, **values: Any) -> Scenario:
    """One engine whose slots hold exactly one step of 16 groups of 16."""
    settings = {
        "num_engines": 1,
        "engine": EngineSpeed.constant(DECODE_S / 1000, 256),
        "learner": LearnerSpeed(token_s=train_s / TOKENS),
        "lengths": EQUAL,
        "groups_per_step": 16,
        **values,
    }
    return Scenario(**settings)


# Closed forms.


def test_a_synchronous_step_is_the_sum_of_generation_training_and_publish() -> None:
    outcome = simulate(scenario(max_staleness=0, publish_s=3.0, pause_s=1.0))
    assert outcome.step_s == pytest.approx(DECODE_S + 10.0 + 3.0)
    assert outcome.staleness == outcome.group_staleness_max == 0
    assert outcome.engines["running"] == pytest.approx(DECODE_S / 33)
    assert outcome.engines["no_credit"] == pytest.approx(13 / 33)
    assert outcome.learner["train"] == pytest.approx(10 / 33)


@pytest.mark.parametrize("train_s", [5.0, 20.0, 35.0])
def test_one_step_off_takes_the_longer_of_generation_and_training(train_s: float) -> None:
    outcome = simulate(scenario(train_s=train_s, max_staleness=1, admission="eager"))
    assert outcome.step_s == pytest.approx(max(DECODE_S, train_s))


@pytest.mark.parametrize("max_staleness", [2, 3, 4])
def test_a_slow_learner_sets_the_rate(max_staleness: int) -> None:
    outcome = simulate(scenario(train_s=60.0, lengths=MIXED, max_staleness=max_staleness))
    train_s = TOKENS / outcome.trained_tokens_per_s  # of what the learner really got
    assert outcome.learner["train"] > 0.99
    assert outcome.step_s == pytest.approx(60.0, rel=0.05)
    assert train_s == pytest.approx(60.0, rel=0.01)


@pytest.mark.parametrize("acceptance", [1.0, 0.5])
def test_slow_engines_set_the_rate_and_rejected_groups_cost_their_share(acceptance: float) -> None:
    run = scenario(
        num_engines=2,
        engine=EngineSpeed.constant(DECODE_S / 1000, 32),
        lengths=MIXED,
        max_staleness=4,
        acceptance=(acceptance, acceptance),
        num_steps=80,
    )
    outcome = simulate(run)
    assert outcome.engines["running"] > 0.98
    assert outcome.generated_tokens_per_s == pytest.approx(64 / (DECODE_S / 1000), rel=0.02)
    share = outcome.trained_tokens_per_s / outcome.generated_tokens_per_s
    assert share == pytest.approx(acceptance, rel=0.06)
    assert outcome.acceptance == pytest.approx(acceptance, abs=0.04)


def test_colocated_engines_stand_still_while_the_learner_trains() -> None:
    separate = scenario(max_staleness=0)
    outcome = simulate(replace(separate, colocated=True, max_staleness=1, admission="eager"))
    assert outcome.step_s == pytest.approx(DECODE_S + 10.0)


def test_sides_that_share_cores_slow_each_other_while_both_work() -> None:
    """The learner trains for 10 s · 1.2 while the engines decode; they lose a third of that time:
    20 s + 12 s · (1 - 1 / 1.5)."""
    shared = {"engine_slowdown": 1.5, "learner_slowdown": 1.2}
    both = scenario(max_staleness=1, admission="eager", **shared)
    outcome = simulate(both)
    assert outcome.step_s == pytest.approx(24.0)
    assert outcome.learner["train"] == pytest.approx(0.5)
    assert outcome.generated_tokens_per_s == pytest.approx(TOKENS / 24.0)
    assert closed_forms(both).step_s == pytest.approx(24.0)
    in_turns = simulate(scenario(max_staleness=0, **shared))
    assert in_turns.step_s == pytest.approx(DECODE_S + 10.0)


def test_a_learner_is_slowed_by_the_engines_that_decode() -> None:
    """The engines have 10 s of work in a step of 40 s, without slowdown of their own."""
    engine = EngineSpeed.constant(DECODE_S / 2000, 256)
    shared = scenario(train_s=40.0, engine=engine, max_staleness=2, learner_slowdown=1.25)
    outcome = simulate(shared)
    assert outcome.step_s == pytest.approx(40.0 + 10.0 * (1 - 1 / 1.25))
    assert outcome.learner["train"] > 0.99
    assert closed_forms(shared).step_s == pytest.approx(outcome.step_s, rel=0.02)


def test_staleness_with_slow_engines_is_duration_over_step_plus_learner_share() -> None:
    """Groups start all the time; published closed form for rho < 1: C·M/B + rho."""
    run = scenario(
        num_engines=2,
        engine=EngineSpeed.constant(DECODE_S / 1000, 32),
        max_staleness=6,
        admission="eager",
        num_steps=80,
        lengths=replace(EQUAL, tail=0.05),
        group_size=4,
        groups_per_step=64,
    )
    outcome = simulate(run)
    rho = outcome.learner["train"]
    # The siblings of one group wait for a slot behind one more group: S + G are in flight.
    in_flight = 64 + 2 * 4
    expected = in_flight / 256 * run.lengths.longest_of(4) + rho
    assert outcome.group_staleness == pytest.approx(expected, rel=0.1)


# Guarantees.

HARD: dict[str, Callable[[], Scenario]] = {
    "long tail": lambda: scenario(lengths=replace(MIXED, tail=1.5), max_staleness=2),
    "minibatches": lambda: scenario(lengths=MIXED, num_minibatches=4, max_staleness=1),
    "rejects": lambda: scenario(lengths=MIXED, acceptance=(0.8, 0.2), max_staleness=3),
    "drain": lambda: scenario(
        lengths=MIXED, weight_update="drain", publish_s=2, pause_s=1, max_staleness=2
    ),
    "recompute": lambda: scenario(
        lengths=MIXED,
        engine=EngineSpeed(
            step_s=(0.02,) * 65, prefill_s=1e-4, kv_tokens=30_000, reserve_tokens=100
        ),
        prompt_tokens=100,
        publish_s=5,
        pause_s=5,
        max_staleness=2,
    ),
    "outages": lambda: scenario(
        lengths=MIXED,
        num_engines=4,
        engine=EngineSpeed.constant(0.02, 48),
        publish_s=4,
        pause_s=1,
        max_staleness=2,
        outages=tuple(Outage(k % 4, 50.0 + 61 * k, 80.0 + 61 * k) for k in range(8)),
    ),
    "outages while it drains": lambda: scenario(
        lengths=MIXED,
        num_engines=4,
        engine=EngineSpeed.constant(0.02, 48),
        publish_s=4,
        pause_s=1,
        weight_update="drain",
        max_staleness=1,
        outages=tuple(Outage(k % 4, 47.0 + 53 * k, 60.0 + 53 * k) for k in range(8)),
    ),
    "pauses": lambda: scenario(
        lengths=replace(MIXED, drift=2.0),
        checkpoint_s=7,
        checkpoint_every_steps=3,
        evaluation_s=11,
        evaluation_every_steps=5,
        max_staleness=1,
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_a_hard_run_keeps_the_staleness_bound_and_conservation(name: str) -> None:
    run = SimulatedRun(HARD[name]())
    outcome = run.run()
    assert outcome.group_staleness_max <= run.scenario.max_staleness
    counts = outcome.counts
    assert counts.trained == run.scenario.num_steps * 16
    assert counts.evicted == counts.failed == 0
    assert run.buffer.close().in_flight == 0
    for engine in run.engines:
        assert sum(engine.slot_s.values()) <= engine.num_slots * outcome.wall_s * (1 + 1e-9)
    assert sum(outcome.engines.values()) == pytest.approx(1.0)
    assert outcome.learner["train"] + outcome.learner["wait"] <= 1 + 1e-9


def test_equal_scenarios_give_equal_results_and_another_seed_does_not() -> None:
    first, second = simulate(HARD["recompute"]()), simulate(HARD["recompute"]())
    assert first == second
    other = HARD["recompute"]()
    lengths = replace(other.lengths, seed=1)
    assert simulate(replace(other, lengths=lengths)).step_s != first.step_s


# Directions.

SLOW_ENGINES = scenario(
    lengths=MIXED,
    num_engines=2,
    engine=EngineSpeed.constant(0.02, 48),
    max_staleness=2,
    num_steps=60,
)


@pytest.mark.parametrize(
    ("changes", "slower"),
    [
        ({"num_engines": 3}, False),
        ({"engine": EngineSpeed.constant(0.01, 48)}, False),
        ({"acceptance": (0.5, 0.5)}, True),
        ({"lengths": replace(MIXED, mean_tokens=2000)}, True),
        ({"max_staleness": 0}, True),
        ({"publish_s": 20.0, "pause_s": 20.0}, True),
        ({"publish_s": 5.0, "pause_s": 5.0, "weight_update": "drain"}, True),
        ({"evaluation_s": 30.0, "evaluation_every_steps": 1}, True),
        ({"outages": (Outage(0, 1000.0, 2000.0),)}, True),
    ],
    ids=lambda value: "/".join(value) if isinstance(value, dict) else str(value),
)
def test_a_change_moves_the_step_time_in_its_direction(
    changes: dict[str, Any], slower: bool
) -> None:
    before = simulate(SLOW_ENGINES).step_s
    after = simulate(replace(SLOW_ENGINES, **changes)).step_s
    assert after > 1.02 * before if slower else after < 0.98 * before


def test_a_higher_bound_helps_long_responses() -> None:
    low, high = (
        simulate(scenario(lengths=replace(MIXED, tail=1.2), max_staleness=bound))
        for bound in (1, 3)
    )
    assert high.step_s < 0.9 * low.step_s
    assert low.learner["deadline"] > 0.05


def test_a_smaller_cache_limits_the_concurrency() -> None:
    small = replace(
        SLOW_ENGINES, engine=replace(SLOW_ENGINES.engine, kv_tokens=12_000, reserve_tokens=64)
    )
    outcome = simulate(small)
    assert outcome.engines["queued"] > 0.2
    assert outcome.num_retracted > 0
    assert outcome.step_s > 1.2 * simulate(SLOW_ENGINES).step_s


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_engines": 0}, "num_engines \\(0\\) must be at least 1"),
        ({"num_minibatches": 3}, "must be a multiple of num_minibatches"),
        ({"acceptance": (1.0, 0.0)}, "acceptance .* must be above 0"),
        ({"lengths": replace(EQUAL, mean_tokens=5000)}, "the mean \\(5000\\) must be between"),
        ({"lengths": replace(EQUAL, tail=40.0)}, "tail \\(40\\) between 0 and 5"),
        ({"engine": EngineSpeed(step_s=(1.0, 1.0), kv_tokens=50)}, "KV cache of an engine holds"),
        ({"publish_s": 1.0, "pause_s": 2.0}, "pause_s \\(2\\) must be between"),
        ({"learner_slowdown": 0.5}, "learner_slowdown \\(0.5\\) must be at least 1"),
        ({"num_steps": 12}, "num_steps \\(12\\) must be at least"),
        ({"outages": (Outage(7, 0.0, 1.0),)}, "must name an engine from 0 to 0"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        scenario(**changes)


def test_the_planner_needs_neither_torch_nor_ray() -> None:
    ran = run_without(["torch", "ray", "transformers"], "import dapo_async.planner")
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(("max_staleness", "publish_s"), [(1, 0.0), (1, 2.0), (2, 2.0), (3, 0.0)])
def test_long_responses_bound_the_step_as_their_closed_form_says(
    max_staleness: int, publish_s: float
) -> None:
    """A mean response takes a step of the learner, the longest one up to six."""
    lengths = Lengths(tail=0.8, shared=0.3, mean_tokens=1000, max_tokens=6000)
    bound = scenario(
        engine=EngineSpeed.constant(0.01, 4096),
        lengths=lengths,
        max_staleness=max_staleness,
        publish_s=publish_s,
        num_steps=80,
        warm_up_steps=20,
    )
    outcome = simulate(bound)
    assert outcome.learner["deadline"] > 0.3
    assert closed_forms(bound).step_s == pytest.approx(outcome.step_s, rel=0.12)
