"""Runs with a known bottleneck or a known fault, each named rightly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from paths import CONFIGS

from dapo_async.config import load
from dapo_async.tracking.bottleneck import (
    BottleneckWatch,
    Idle,
    Layout,
    better_split,
    bottleneck,
    change_in,
)
from dapo_async.tracking.faults import WINDOW, faults

LAYOUT = Layout(
    learner_devices=8,
    learner_unit=2,
    engines=8,
    engine_devices=1,
    num_slots=64,
    max_staleness=2,
    on_gpus=True,
)


def rows(count: int = WINDOW, /, *, first: int = 0, **values: Any) -> list[dict[str, float]]:
    """Steps of a healthy run; `values` replace some of its numbers, `__` stands for `.`."""
    named = {name.replace("__", "."): value for name, value in values.items()}
    base = {
        "step_s": 10.0,
        "idle.learner": 0.05,
        "slots.idle": 0.05,
        "behaviour_ess": 0.95,
        "clip_low_fraction": 0.01,
        "clip_high_fraction": 0.01,
        "truncated": 0.02,
        "entropy": 0.6,
        "accuracy": 0.5,
        "group_staleness_max": 2.0,
        "offered": 40.0,
        "acceptance": 0.8,
        "verdicts.correct": 300.0,
        "verdicts.wrong": 300.0,
        "engine_restarts": 0.0,
    }
    return [{**base, **named, "version": 1.0 + first + each} for each in range(count)]


def idle(learner: float, rollout: float, part: str = "no_credit") -> dict[str, Any]:
    return {
        "idle__learner": learner,
        "slots__idle": rollout,
        f"slots__{part}": rollout,
    }


@pytest.mark.parametrize(
    ("shares", "kind", "said"),
    [
        (idle(0.04, 0.06), "nothing", "learner and engines are both busy"),
        (
            idle(0.02, 0.6),
            "the learner",
            "10 instead of 8 GPUs for the learner and rollout.num_workers=6 instead of 8 should be "
            "about 1.25 times as fast",
        ),
        (idle(0.12, 0.8), "the learner", "the learner limits the speed"),
        (
            idle(0.6, 0.02),
            "generation",
            "6 instead of 8 GPUs for the learner and rollout.num_workers=10 instead of 8 should be "
            "about 1.25 times as fast",
        ),
        (idle(0.8, 0.15), "generation", "the filters accept 80% of the groups"),
        (
            idle(0.4, 0.5),
            "the staleness bound",
            "replay.max_staleness=3 instead of 2 gives the engines more to do: at most 1.67 times",
        ),
        (
            {**idle(0.4, 0.5), "group_staleness_max": 1.2},
            "admission",
            "50% of the slots wait for a group, though groups are fresher than "
            "replay.max_staleness allows: replay.admission=eager starts them sooner",
        ),
        (
            idle(0.31, 0.66, "queued"),
            "KV memory",
            "engines run 22 of 64 slots because the KV cache is full; more slots do not help, "
            "lower rollout.num_slots (same speed, fresher tokens; auto finds it) or give the "
            "servers more memory (rollout.server_flags)",
        ),
        (
            idle(0.04, 0.66, "queued"),
            "the learner",
            "engines run 22 of 64 slots because the KV cache is full; more engines do not help, "
            "lower rollout.num_slots",
        ),
        (idle(0.5, 0.4, "tail"), "long responses", "rollout.weight_update=recompute"),
        (
            idle(0.4, 0.5, "sync"),
            "weight updates",
            "for 50% of the time: a larger replay.groups_per_step updates less often, at most 2.00",
        ),
    ],
)
def test_bottleneck_is_named_with_its_evidence_and_the_next_change(
    shares: dict[str, Any], kind: str, said: str
) -> None:
    found = bottleneck(rows(**shares), LAYOUT)
    assert found is not None
    assert found.kind == kind
    assert said in found.line
    evidence = f"learner {shares['idle__learner']:.0%}, engine slots {shares['slots__idle']:.0%}"
    assert evidence in found.line


def test_full_memory_is_named_with_the_slots_that_engines_had() -> None:
    window = rows(**idle(0.31, 0.5, "queued"), slots_per_engine=40.0)
    adaptive = replace(LAYOUT, adapts_slots=True)
    found = bottleneck(window, adaptive)
    assert found is not None
    assert "engines run 20 of 40 slots because the KV cache is full" in found.line
    assert "more slots do not help, give the servers more memory" in found.line
    assert "num_slots" not in found.line, "it adapts"
    assert "7 instead of 8" not in found.line
    free = bottleneck(
        rows(**idle(0.04, 0.5), slots_per_engine=40.0), replace(adaptive, on_gpus=False)
    )
    assert free is not None
    assert "num_slots" not in free.line


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"non_finite": 1.0}, "not finite", "10 of 10 steps had a loss or gradient"),
        ({"verdicts__failed": 60.0}, "verifier failures", "failed on 9% of the responses"),
        (
            {"acceptance": 0.2, "rejected__all_wrong": 30.0, "rejected__all_correct": 2.0},
            "groups without gradient",
            "only 20% of the groups have a gradient, most others are all wrong: easier prompts",
        ),
        ({"behaviour_ess": 0.4}, "stale tokens", "effective samples 40%"),
        ({"clip_high_fraction": 0.4}, "clipping", "41% of the tokens are clipped"),
        ({"truncated": 0.35}, "truncation", "35% of the responses are cut"),
        ({"entropy": 0.02}, "entropy", "the entropy fell from 0.60 to 0.020"),
    ],
)
def test_fault_is_named_before_any_bottleneck(change: dict[str, Any], kind: str, said: str) -> None:
    window = rows(first=WINDOW, **change, **idle(0.02, 0.6))
    (found,) = faults(window, first=rows(1)[0])
    assert (found.kind, said in found.line) == (kind, True), found.line
    watch = BottleneckWatch(LAYOUT)
    shown = [watch.add(row) for row in [*rows(), *window]]
    assert shown[-1] is not None
    assert shown[-1].kind == kind


def test_healthy_run_has_no_fault() -> None:
    assert list(faults(rows(), first=rows(1)[0])) == []
    solved = rows(entropy=0.02, accuracy=0.98)
    assert list(faults(solved, first=rows(1)[0])) == []


def test_lost_engines_and_a_slow_step_are_events_that_are_shown_each_time() -> None:
    watch = BottleneckWatch(LAYOUT)
    shown = []
    for window in range(3):
        for place, row in enumerate(rows(first=window * WINDOW)):
            if window:
                row["engine_restarts"] = window - 1.0 + (place > 4)
            shown.append(watch.add(row))
    kinds = [found.kind for found in shown if found is not None]
    assert kinds == ["nothing", "engines lost", "engines lost"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"step_s": 80.0, "checkpoint_pause_s": 66.0},
            "step 7 took 80.0 s, the median is 10.0 s; 66.0 s of it were a checkpoint",
        ),
        (
            {"publish_pause_s": 18.0},
            "in step 7 a publish took 18.0 s, the median is 0.5 s (a step takes 10.0 s)",
        ),
        (
            {"step_s": 14.0, "idle.learner": 0.8},
            "in step 7 the learner's wait for a batch took 11.2 s, the median is 0.5 s "
            "(a step takes 10.0 s)",
        ),
    ],
)
def test_phase_that_takes_six_times_its_median_is_named(
    change: dict[str, float], line: str
) -> None:
    slow = rows(publish_pause_s=0.5)
    slow[6] |= change
    (found,) = faults(slow, first=slow[0])
    assert (found.kind, found.is_event, found.line) == ("slow phase", True, line)


def test_longer_phase_that_costs_little_is_no_fault() -> None:
    quick = rows(publish_pause_s=0.01)
    quick[6] |= {"publish_pause_s": 0.3}
    assert list(faults(quick, first=quick[0])) == []


@pytest.mark.parametrize(("accuracy", "kinds"), [(0.0, ["equal rewards"]), (1.0, [])])
def test_equal_rewards_are_a_fault_unless_the_task_is_solved(
    accuracy: float, kinds: list[str]
) -> None:
    found = list(faults(rows(accuracy=accuracy), first=rows(1)[0]))
    assert [each.kind for each in found] == kinds


def test_state_is_shown_when_it_begins_and_not_again() -> None:
    watch = BottleneckWatch(LAYOUT)
    shown = []
    for window, shares in enumerate([idle(0.02, 0.6)] * 3 + [idle(0.6, 0.02)] * 2):
        shown += [watch.add(row) for row in rows(first=window * WINDOW, **shares)]
    assert [place for place, found in enumerate(shown) if found is not None] == [9, 39]


@pytest.mark.parametrize("num_slots", [16, 64, 512, 1536])
def test_verdict_does_not_change_with_the_number_of_slots_alone(num_slots: int) -> None:
    """The engine has 16 sequences at its best rate, whatever number of slots it has."""
    idle_slots = 1.0 - 16 / num_slots
    layout = replace(LAYOUT, num_slots=num_slots, on_gpus=False)
    window = rows(**idle(0.6, idle_slots), efficiency__rollout=0.97)
    found = bottleneck(window, layout)
    assert found is not None
    assert found.kind == "generation"
    assert "engines at 97% of their best rate" in found.line
    assert ("have no credit: replay.max_staleness=3" in found.line) == (num_slots > 16)
    free = bottleneck(rows(**idle(0.02, idle_slots), efficiency__rollout=0.5), layout)
    assert free is not None
    assert free.kind == ("the learner" if num_slots > 16 else "nothing")
    said = f"rollout.num_slots=16 instead of {num_slots}: same speed, fresher tokens"
    assert (said in free.line) == (num_slots > 16)


def test_busy_engine_that_is_below_its_best_rate_does_not_wait() -> None:
    """All slots are busy, with longer responses than at its best."""
    found = bottleneck(rows(**idle(0.4, 0.02), efficiency__rollout=0.6), LAYOUT)
    assert found is not None
    assert found.kind == "generation"


def test_full_memory_limits_engines_that_run_at_their_best_rate() -> None:
    """The learner waits, and a third of the slots is all that the KV memory has room for."""
    window = rows(**idle(0.31, 0.66, "queued"), efficiency__rollout=1.0)
    found = bottleneck(window, LAYOUT)
    assert found is not None
    assert found.kind == "KV memory"
    assert "engines run 22 of 64 slots because the KV cache is full" in found.line
    assert "GPUs for the learner and rollout.num_workers=" in found.line


@pytest.mark.parametrize("change", [11, 15, 20, 21, 22])
def test_regime_begins_at_its_own_step_and_not_at_that_of_a_window(change: int) -> None:
    watch = BottleneckWatch(LAYOUT)
    for step in range(1, 31):
        shares = idle(0.6, 0.02) if step >= change else idle(0.02, 0.6)
        watch.add(rows(1, first=step - 1, **shares)[0])
    said = str(watch.summary())
    if change > 11 and (change - 1) % WINDOW == 0:
        assert f"by the learner in steps 1-{change - 1}, by generation in steps {change}-30" in said
    assert said.startswith("limited by the learner in steps 1-")
    window = [*rows(change - 1, **idle(0.02, 0.6)), *rows(9, first=change - 1, **idle(0.6, 0.02))]
    assert change_in(window) == change


def test_faults_of_the_whole_run_are_kept_with_their_steps() -> None:
    watch = BottleneckWatch(LAYOUT)
    for window in range(4):
        share = 0.4 if window in (1, 2) else 0.02
        for row in rows(first=window * WINDOW, truncated=share):
            watch.add(row)
    assert watch.faults == [
        "steps 11-30: 40% of the responses are cut: raise rollout.max_response_tokens"
    ]


def test_summary_tells_the_regimes_of_a_run_apart() -> None:
    watch = BottleneckWatch(LAYOUT)
    assert watch.summary() is None
    for window, shares in enumerate([idle(0.02, 0.6)] * 2 + [idle(0.6, 0.02)]):
        for row in rows(first=window * WINDOW, **shares):
            watch.add(row)
    said = watch.summary()
    assert said is not None
    assert said.startswith(
        "limited by the learner in steps 1-20, by generation in steps 21-30; at the end: "
        "generation limits the speed (idle: learner 60%, engine slots 2%)"
    )


def test_short_run_is_judged_by_all_its_steps() -> None:
    watch = BottleneckWatch(LAYOUT)
    for row in rows(3, **idle(0.02, 0.6)):
        assert watch.add(row) is None
    assert str(watch.summary()).startswith("the learner limits the speed")


def test_steps_without_measured_slots_have_no_bottleneck() -> None:
    unknown = rows(slots__idle=float("nan"))
    assert bottleneck(unknown, LAYOUT) is None
    watch = BottleneckWatch(LAYOUT)
    assert [watch.add(row) for row in unknown] == [None] * WINDOW
    assert watch.summary() is None


def test_split_keeps_tensor_parallel_groups_whole_and_gives_each_side_a_device() -> None:
    split = better_split(Idle(0.0, 0.6, {}), LAYOUT)
    assert split is not None
    devices, engines, gain = split  # 12 and 4 devices: steps of max(8 / 12, 3.2 / 4)
    assert devices % LAYOUT.learner_unit == 0
    assert devices + engines == 16
    assert gain == pytest.approx(1.25)
    assert better_split(Idle(0.03, 0.05, {}), LAYOUT) is None
    one_each = Layout(1, 1, 1, 1, 64, 2, on_gpus=True)
    assert better_split(Idle(0.0, 0.9, {}), one_each) is None


@pytest.mark.parametrize("shares", [idle(0.02, 0.6), idle(0.6, 0.02)])
def test_no_split_is_advised_where_both_sides_share_the_cores(shares: dict[str, Any]) -> None:
    cpu = Layout(8, 2, 8, 1, 64, 2, on_gpus=False)
    found = bottleneck(rows(**shares), cpu)
    assert found is not None
    assert "GPUs" not in found.line


def test_fewer_slots_are_named_where_they_cost_nothing() -> None:
    alone = Layout(1, 1, 1, 1, 64, 2, on_gpus=True)
    found = bottleneck(rows(**idle(0.02, 0.6)), alone)
    assert found is not None
    assert "rollout.num_slots=26 instead of 64: same speed, fresher tokens" in found.line


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_layout_of_every_recipe_is_known(file: Any) -> None:
    config = load(str(file))
    layout = Layout.of(config)
    assert layout.learner_devices % layout.learner_unit == 0
    assert layout.engines >= 1


def test_on_shared_devices_no_split_is_advised_and_frequent_switches_are() -> None:
    shared = replace(LAYOUT, shared=True)
    turns = rows(slots__asleep=0.4, switch_s=0.5)
    found = bottleneck(turns, shared)
    assert found is not None
    assert found.line.startswith(
        "learner and engines take turns: the engines have the devices 60% of the time, switches "
        "take 5% (idle: learner 5%, engine slots 5%"
    )
    assert "num_workers" not in found.line
    often = bottleneck(rows(slots__asleep=0.4, switch_s=2.0), shared)
    assert often is not None
    assert often.line.endswith("; a larger replay.groups_per_step makes switches rarer")
    watch = BottleneckWatch(shared)
    for row in turns:
        watch.add(row)
    assert "60% of the time, switches take 5%" in (watch.summary() or "")
