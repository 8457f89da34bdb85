"""What a result tells the planner."""

from __future__ import annotations

import pytest
import yaml

from dapo_async.bench.figures import BenchRow, Spread
from dapo_async.bench.scenario import scenario_line, scenario_of
from dapo_async.planner import EngineSpeed
from dapo_async.planner.settings import read_scenario

RUN = {"engines": 1, "lengths": {"mean": 10, "max": 20}, "replay": {"groups_per_step": 4}}


def row(figures: dict[str, float], **what: str | int) -> BenchRow:
    return BenchRow(what, {name: Spread((value,)) for name, value in figures.items()})


def decode_rows(step_s: dict[int, float], context_s: float) -> list[BenchRow]:
    return [
        row(
            {"decode_step_s": seconds + context_s * running * context, "tokens_per_s": 1.0},
            kind="decode",
            running=running,
            context=context,
        )
        for context in (128, 1024, 4096)
        for running, seconds in step_s.items()
    ]


def test_speed_of_an_engine_is_found_again_from_its_steps() -> None:
    step_s = {1: 0.009, 64: 0.011, 128: 0.014}
    rows = decode_rows(step_s, 1.6e-8)
    rows += [
        row({"prefill_tokens_per_s": 40_000.0}, kind="prefill", context=1024),
        row({"kv_capacity_tokens": 900_000.0, "kv_bytes": 1.0}, kind="capacity"),
    ]
    engine = scenario_of(rows, slots=128)["engine"]
    assert engine["step_s"] == pytest.approx(step_s, rel=1e-3)
    assert engine["context_s"] == pytest.approx(1.6e-8, rel=1e-3)
    assert (engine["slots"], engine["kv_tokens"], engine["prefill_s"]) == (128, 900_000, 2.5e-5)
    assert scenario_line({"engine": engine}) == (
        "engine: {slots: 128, step_s: {1: 0.009, 64: 0.011, 128: 0.014}, context_s: 1.6e-08, "
        "prefill_s: 2.5e-05, kv_tokens: 900000}"
    )
    settings = yaml.safe_load(scenario_line({"engine": engine}))
    scenario, _ = read_scenario({**RUN, **settings, "learner": {"token_s": 1e-5}})
    assert scenario.engine.step_s[64] == 0.011
    speed = EngineSpeed(step_s=(engine["step_s"][64],) * 65, context_s=engine["context_s"])
    assert speed.tokens_per_s(64, 1024) == pytest.approx(64 / (0.011 + 1.6e-8 * 64 * 1024))


def test_noise_makes_no_part_of_a_step_negative() -> None:
    falling = scenario_of(decode_rows({1: 0.1, 8: 0.2}, -1e-7), slots=8)["engine"]
    assert falling["context_s"] == 0.0
    steep = scenario_of(decode_rows({1: -1e-9, 8: 1e-9}, 1e-5), slots=8)["engine"]
    assert min(steep["step_s"].values()) > 0


def test_speed_of_a_learner_is_that_of_its_best_microbatch() -> None:
    rows = [
        row({"step_s": 1.0, "tokens_per_s": rate}, kind="step", **{"microbatch tokens": size})
        for size, rate in ((1024, 20_000.0), (4096, 50_000.0))
    ]
    assert scenario_of(rows, slots=4) == {"learner": {"token_s": 2e-5}}


def test_rows_that_failed_or_are_of_another_subject_tell_nothing() -> None:
    failed = BenchRow({"kind": "decode", "running": 4, "context": 64}, {}, "out of memory")
    assert scenario_of([failed], slots=4) == {}


def test_a_publish_and_the_control_plane_become_sections() -> None:
    rows = [
        row({"publish_s": 1.0, "standstill_s": 1.5}, kind="publish"),
        row({"publish_s": 9.0, "standstill_s": 3.0}, kind="publish"),
        row({"step_s": 0.07}, kind="replay"),
    ]
    sections = scenario_of(rows, slots=4)
    assert sections == {
        "publish": {"seconds": 1.0, "pause_s": 1.0},
        "control": {"fetch_s": 0.07},
    }
    whole = {**RUN, "engine": {"slots": 4, "step_s": 0.01}, "learner": {"token_s": 1e-5}}
    scenario, _ = read_scenario({**whole, **sections})
    assert (scenario.publish_s, scenario.fetch_s) == (1.0, 0.07)


def test_what_a_step_takes_beyond_a_learner_that_sleeps_is_the_control_plane() -> None:
    slept = row({"step_s": 1.05}, kind="replay", workers=1, **{"learner step s": 1})
    assert scenario_of([slept], slots=4) == {"control": {"fetch_s": 0.05}}


def sides(**both: float) -> list[BenchRow]:
    """The rows of end-to-end: a decode step of 10 ms, a token trained in 0.1 ms."""
    publish = {"publish_s": 0.3, "standstill_s": 0.1}
    engines = {"decode_step_s": 0.01, "decoding": 0.9, "idle_learner": 1.0, **publish}
    learner = {"train_token_s": 1e-4, "idle_learner": 0.0, **publish}
    together = {**engines, **learner, **publish, "publish_s": 0.4, **both}
    return [
        row(figures, kind="end-to-end", replaced=replaced)
        for replaced, figures in (("learner", engines), ("rollout", learner), ("nothing", together))
    ]


def test_sides_that_share_cores_slow_each_other_while_both_work() -> None:
    # Work goes on at 1/1.25 of the speed in 75 % of the time, at 1/1.5 of it in half of the time.
    rows = sides(decode_step_s=0.01 / 0.85, idle_learner=0.25, train_token_s=1.2e-4, decoding=0.5)
    sections = scenario_of(rows, slots=32)
    assert sections == {
        "engine": {"slots": 32, "step_s": 0.01},
        "learner": {"token_s": 1e-4},
        "publish": {"seconds": 0.4, "pause_s": 0.1},
        "shared": {"engine": 1.25, "learner": 1.5},
    }
    scenario, _ = read_scenario({**RUN, **sections})
    assert (scenario.engine_slowdown, scenario.learner_slowdown) == (1.25, 1.5)


def test_no_side_becomes_faster_by_noise_and_one_side_alone_tells_its_own_rate() -> None:
    rows = sides(decode_step_s=0.009, idle_learner=0.25, train_token_s=0.9e-4, decoding=0.5)
    assert scenario_of(rows, slots=32)["shared"] == {"engine": 1.0, "learner": 1.0}
    assert scenario_of(rows[:1], slots=32).keys() == {"publish", "engine"}
