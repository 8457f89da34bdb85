"""Scenario files, the sweep, and what the commands print."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import ROOT

from dapo_async import config as knobs
from dapo_async.cli.main import main
from dapo_async.planner.closed_forms import balanced_share, closed_forms
from dapo_async.planner.engine import EngineSpeed
from dapo_async.planner.rates import between_points
from dapo_async.planner.recipe import planned_config
from dapo_async.planner.screens import closed_form_lines, overrides
from dapo_async.planner.settings import read_scenario, read_scenario_file, step_table
from dapo_async.planner.shapes import Shape, Shapes, scenario_of_shape, smaller
from dapo_async.planner.simulator import simulate
from dapo_async.planner.sweep import Plan, find_plan, ranked

EXAMPLE = ROOT / "docs" / "examples" / "plan_7b_64gpus.yaml"


def values(**changes: Any) -> dict[str, Any]:
    """The content of a small scenario file, with changes by dotted name (`__` for the dot)."""
    content: dict[str, Any] = {
        "engines": 4,
        "steps": 24,
        "warm_up_steps": 8,
        "engine": {"slots": 32, "step_s": 0.02},
        "learner": {"token_s": 1e-4, "gpus": 4, "scaling": 1.0},
        "lengths": {"mean": 300, "max": 1000, "tail": 0.5},
        "replay": {"groups_per_step": 32, "group_size": 4, "max_staleness": 2},
        "plan": {"gpus": 8, "max_staleness": [2], "gpu_hour": 2.0},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            content[section] = {**content[section], key: value}
        else:
            content[section] = value
    return content


def plan_of(**changes: Any) -> Plan:
    return find_plan(*read_scenario(values(**changes)))


@cache
def usual_plan() -> Plan:
    return plan_of()


def test_the_example_file_is_read_and_no_key_lacks_its_line_in_the_docs() -> None:
    from dapo_async.planner.settings import KEYS, MODEL_KEYS, PLAN_KEYS, TOP

    scenario, cluster = read_scenario_file(EXAMPLE)
    assert (scenario.num_engines, cluster.gpus) == (48, (64,))
    page = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
    _, page = page.split("## Keys of a scenario")
    lines = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    described = {
        (line[1].strip(), name.strip(" `")) for line in lines for name in line[2].split(",")
    }
    names = {("", name) for name in TOP if name not in ("plan", "model")} | {
        ("plan", key) for key in PLAN_KEYS
    }
    names |= {("model", key) for key in MODEL_KEYS}
    names |= {(section, key) for section, keys in KEYS.items() for key in keys}
    assert names == described - {("section", "key")}


def test_step_times_are_linear_between_the_measured_points() -> None:
    assert step_table({1: 0.010, 3: 0.014}, 4) == pytest.approx((0.008, 0.010, 0.012, 0.014, 0.016))
    assert step_table({8: 0.02}, 2) == (0.02, 0.02, 0.02)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engnes": 3}, "unknown key engnes; did you mean engine"),
        ({"learner__tokens_s": 3}, "unknown key learner.tokens_s; did you mean learner.token_s"),
        ({"engine": {"slots": 4}}, "engine.step_s is missing"),
        ({"engine__slots": 0}, "engine.slots \\(0\\) must be a whole number of at least 1"),
        ({"learner__token_s": -1}, "learner.token_s \\(-1\\) must be a number of at least 0"),
        ({"engine__step_s": {1: 0.5, 2: 0.1}}, "falls to -"),
        ({"lengths__mean": 5000}, "the mean \\(5000\\) must be between 1 and"),
        ({"lengths__mixture": [[0, 1, 1]]}, "positive weight"),
        ({"lengths__samples": []}, "lengths above 0"),
        ({"replay__acceptance": 0}, "acceptance .* must be above 0"),
        ({"replay__admission": "fifo"}, "must be one of paced, eager"),
        ({"engines": 0}, "engines \\(0\\) must be a whole number of at least 1"),
        ({"engine__kv_tokens": 500}, "the KV cache of an engine holds 500 tokens"),
        ({"learner": 5}, "learner \\(5\\) must be a section of keys"),
        ({"learner__tensor_parallel": 3}, "learner.gpus \\(4\\) must be a multiple of learner"),
        ({"learner__scaling": 1.5}, "learner.scaling \\(1.5\\) must be from 0 to 1"),
        ({"learner__token_s": {}}, "must give positive seconds per token by GPUs"),
        ({"learner__token_s": {4: 0}}, "must give positive seconds per token by GPUs"),
        ({"control": {"fetch_s": -1}}, "control.fetch_s \\(-1\\) must be a number of at least 0"),
        ({"plan__weight_update": ["pause"]}, "plan.weight_update \\('pause'\\) must be one of rec"),
        ({"plan__slots": []}, "plan.slots is empty"),
        ({"plan__gpus": [8, 0]}, "plan.gpus \\(0\\) must be a whole number of at least 1"),
    ],
)
def test_a_wrong_scenario_is_refused_in_one_line(changes: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        read_scenario(values(**changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"plan": None}, "has no section plan"),
        ({"plan": {"gpus": 1}}, "leaves no GPU for one side"),
        ({"engine__gpus": 8}, "leaves no GPU for one side: an engine takes 8"),
        ({"plan__engine_gpus": [2]}, "rates hold for engines of 1 GPUs, not of 2; add the section"),
        ({"plan__tensor_parallel": [2]}, "rates hold for a learner of 1 tensor-parallel ranks"),
    ],
)
def test_a_cluster_that_cannot_be_split_is_refused(changes: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan_of(**changes)


def test_the_plan_finds_the_split_at_which_both_sides_are_equally_fast() -> None:
    plan = plan_of(
        learner__token_s=2e-4,
        engine__slots=16,
        lengths={"mean": 300, "max": 600, "tail": 0.3},
        plan={"gpus": 16, "max_staleness": [6]},
    )
    steps = {
        gpus: max(
            32 * 4 * 300 * 0.02 / 16 / (16 - gpus),  # tokens · step / slots / engines
            32 * 4 * 300 * 2e-4 * 4 / gpus,
        )
        for gpus in range(1, 16)
    }
    fastest = min(steps, key=lambda gpus: steps[gpus])
    assert abs(plan.best.learner_gpus - fastest) <= 1
    assert plan.best.step_s == pytest.approx(steps[fastest], rel=0.1)
    assert plan.pays


def test_512_gpus_are_split_to_the_gpu_without_a_look_at_every_split() -> None:
    scenario, cluster = read_scenario(
        values(
            engines=256,
            engine={"slots": 1, "step_s": 0.02},
            replay={"groups_per_step": 64, "group_size": 4, "max_staleness": 2},
            learner={"token_s": 5e-5, "gpus": 64, "scaling": 0.9},
            plan={"gpus": 512, "max_staleness": [2]},
        )
    )
    shapes = Shapes(scenario, cluster, 2)
    found = min(shapes.made, key=lambda each: shapes.step_s[each])

    def step_s(learner: int) -> float:
        shape = replace(found, learner_gpus=learner)
        return closed_forms(scenario_of_shape(scenario, cluster, shape, 2)).step_s

    assert found.learner_gpus == min(range(1, 512), key=step_s)
    assert len(shapes.made) < 100
    plan = find_plan(scenario, cluster)
    splits = sorted({each.learner_gpus for each in plan.tried})
    assert found.learner_gpus in splits
    assert all(b - a >= 0.02 * 512 for a, b in itertools.pairwise(splits))


def test_what_if_doubles_the_lengths_and_their_limit_or_says_why_that_cannot_run() -> None:
    (name, *_) = names = list(usual_plan().sensitivity)
    assert name == "responses and their limit twice as long (2000 tokens)"
    best = usual_plan().best.scenario
    lengths = replace(best.lengths, mean_tokens=600, max_tokens=2000)
    twice = [2 * each for each in best.lengths.of_group(7, 4)]
    assert lengths.of_group(7, 4) == pytest.approx(twice, abs=2)
    played = simulate(smaller(replace(best, lengths=lengths))).step_s
    ratio = usual_plan().sensitivity[name]
    assert ratio == pytest.approx(played / simulate(smaller(best)).step_s)
    assert "half of the KV cache" not in names  # no limit is known
    tight = plan_of(engine={"slots": 32, "step_s": 0.02, "kv_tokens": 1500}).sensitivity
    for what, longest in ((name, 2000), ("half of the KV cache", 1000)):
        assert f"the longest sequence has {longest}" in str(tight[what])


def test_asynchrony_does_not_pay_when_training_takes_no_time() -> None:
    plan = plan_of(
        engine__slots=16, learner__token_s=1e-9, lengths={"mean": 300, "max": 1000, "tail": 0.0}
    )
    assert not plan.pays


def test_a_synchronous_run_generates_the_rejected_groups_at_once() -> None:
    lengths = {"mean": 300, "max": 300, "tail": 0.0}
    plan = plan_of(
        lengths=lengths, replay={"groups_per_step": 8, "group_size": 4, "acceptance": 0.5}
    )
    scenario = plan.synchronous.scenario
    assert (scenario.groups_per_step, scenario.acceptance) == (16, (1.0, 1.0))
    assert scenario.train_s == pytest.approx(8 * 4 * 300 * 1e-4 * 4 / plan.synchronous.learner_gpus)
    assert plan.synchronous.step_s == pytest.approx(300 * 0.02 + scenario.train_s)


def test_a_smaller_fleet_has_about_the_same_step_time() -> None:
    scenario, cluster = read_scenario(
        values(engines=24, replay={"groups_per_step": 192, "group_size": 4, "max_staleness": 2})
    )
    small = smaller(scenario)
    assert small.num_engines < 8
    assert simulate(small).step_s == pytest.approx(simulate(scenario).step_s, rel=0.1)
    assert closed_forms(small).step_s == pytest.approx(closed_forms(scenario).step_s, rel=0.05)
    assert (cluster.gpus, cluster.engine_gpus, cluster.tensor_parallel) == ((8,), (1,), (1,))
    assert (cluster.max_staleness, cluster.slots, cluster.gpu_hour) == ((2,), (32,), 2.0)
    assert cluster.weight_update == ("recompute",)


def test_a_split_moves_gpus_from_one_side_to_the_other() -> None:
    scenario, cluster = read_scenario(values())
    shape = Shape(gpus=8, learner_gpus=2, tensor_parallel=1, engine_gpus=1, slots=64)
    other = scenario_of_shape(scenario, cluster, shape, 1)
    assert (other.num_engines, other.max_staleness, other.engine.num_slots) == (6, 1, 64)
    assert other.train_s == pytest.approx(2 * scenario.train_s)


def test_measured_points_say_how_the_learner_scales() -> None:
    scenario, cluster = read_scenario(values(learner__token_s={2: 4e-4, 8: 1.6e-4}))
    falls, stays = 6.4e-4, 0.8e-4  # 2 and 8 GPUs: 3.2e-4 + 0.8e-4, 0.8e-4 + 0.8e-4
    assert scenario.learner.token_s == pytest.approx(falls / 4 + stays)
    assert cluster.rates.learner_at(gpus=8, tensor_parallel=1).token_s == pytest.approx(1.6e-4)
    assert cluster.rates.learner_at(gpus=32, tensor_parallel=1).token_s == pytest.approx(
        falls / 32 + stays
    )


def test_more_than_proportional_points_are_read_as_a_power_of_the_gpus() -> None:
    assert between_points({2: 8.0, 4: 2.0}, 8) == pytest.approx(0.5)
    assert between_points({2: 8.0, 4: 2.0}, 2) == pytest.approx(8.0)


def test_without_points_the_time_of_a_token_falls_with_a_power_of_the_gpus() -> None:
    _, cluster = read_scenario(values(learner__scaling=0.75))
    assert cluster.rates.learner_at(gpus=16, tensor_parallel=1).token_s == pytest.approx(
        1e-4 / 4**0.75
    )


def test_a_longer_fetch_lengthens_a_step_that_the_learner_limits() -> None:
    learner = {"token_s": 4e-4, "minibatches": 2}
    quick, _ = read_scenario(values(learner=learner))
    slow, _ = read_scenario(
        values(learner=learner, control={"fetch_s": 0.4, "snapshot_s": 0.3}),
    )
    before, after = simulate(quick), simulate(slow)
    assert before.learner["train"] > 0.99
    assert after.step_s == pytest.approx(before.step_s + 2 * 0.4 + 0.3, rel=0.01)
    assert closed_forms(slow).step_s == pytest.approx(after.step_s, rel=0.02)
    assert after.learner["other"] == pytest.approx(1.1 / after.step_s, rel=0.02)


def test_a_plan_sweeps_update_modes_and_numbers_of_gpus() -> None:
    plan = plan_of(
        engine={"slots": 32, "step_s": 0.02, "prefill_s": 5e-4},
        plan={"gpus": [6, 8], "max_staleness": [2], "weight_update": ["recompute", "keep_kv"]},
    )
    assert {each.shape.gpus for each in plan.tried} == {6, 8}
    assert plan.best.scenario.weight_update == "keep_kv", "recomputing takes time here"
    assert plan.best.shape.gpus == 8
    cheapest = plan.cheapest
    assert cheapest.gpu_s_per_token == min(each.gpu_s_per_token for each in plan.candidates)


def test_a_model_lets_a_plan_choose_both_tensor_parallel_sizes(tmp_path: Path) -> None:
    model = {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32_768,
        "rope_theta": 1e6,
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27_648,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(model))
    content = {
        **values(),
        "model": {"path": "config.json", "gpu": "H100"},
        "engine": {"slots": 64, "gpus": 4},
        "learner": {"gpus": 16},
        "lengths": {"mean": 2000, "max": 24_000},
        "plan": {
            "gpus": 32,
            "max_staleness": [2],
            "engine_gpus": [1, 4],
            "tensor_parallel": [1, 8],
        },
    }
    plan = find_plan(*read_scenario(content, folder=tmp_path))
    assert plan.left_out["the memory of an engine"] > 0, "one GPU holds no whole response"
    assert plan.left_out["the memory of the learner"] > 0
    assert plan.best.shape.engine_gpus == 4
    loaded = knobs.load(ROOT / "configs" / "quickstart.yaml", overrides(plan), files=False)
    assert loaded.learner.tensor_parallel == plan.best.shape.tensor_parallel


def test_a_plan_for_long_responses_chooses_context_parallel_ranks(tmp_path: Path) -> None:
    model = {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(model))
    content = {
        **values(),
        "model": {
            "path": "config.json",
            "gpu": "H100",
            "recompute": "none",
            "zero_stage": 3,
            "microbatch_tokens": 22_528,
        },
        "engine": {"slots": 64},
        "learner": {"gpus": 8, "context_parallel": 8},
        "lengths": {"mean": 5000, "max": 20_480},
        "plan": {
            "gpus": 16,
            "max_staleness": [2],
            "tensor_parallel": [1, 4],
            "context_parallel": [1, 8],
        },
    }
    plan = find_plan(*read_scenario(content, folder=tmp_path))
    assert plan.left_out["the memory of the learner"] > 0
    assert (plan.best.shape.context_parallel, plan.best.shape.tensor_parallel) == (8, 1)
    loaded = knobs.load(ROOT / "configs" / "quickstart.yaml", overrides(plan), files=False)
    assert loaded.learner.context_parallel == 8
    assert loaded.learner.num_ranks == plan.best.learner_gpus


def test_of_equally_fast_candidates_the_fresher_one_is_first() -> None:
    plan = usual_plan()
    best = plan.best
    staler = replace(best, outcome=replace(best.outcome, staleness=5.0, step_s=best.step_s * 0.99))
    slower = replace(best, outcome=replace(best.outcome, step_s=best.step_s * 1.5))
    assert ranked([slower, staler, best]) == [best, staler, slower]


def test_train_accepts_the_overrides_of_a_plan(tmp_path: Path) -> None:
    plan = usual_plan()
    loaded = knobs.load(ROOT / "configs" / "quickstart.yaml", overrides(plan), files=False)
    assert loaded.rollout.num_workers == plan.best.scenario.num_engines
    assert loaded.learner.data_parallel == plan.best.learner_gpus


def test_the_commands_print_and_write_their_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "scenario.yaml", tmp_path / "out.json"
    file.write_text(yaml.safe_dump(values()))
    assert main(["simulate", str(file), "--json", str(out)]) == 0
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert f"step       {written['step_s']:.4g} s; closed form" in printed
    assert len(written["steps"]) == 24
    assert main(["simulate", str(EXAMPLE)]) == 0
    capsys.readouterr()
    page, config = tmp_path / "plan.html", tmp_path / "planned.yaml"
    quickstart = ROOT / "configs" / "quickstart.yaml"
    arguments = ["plan", str(file), "--json", str(out), "--html", str(page)]
    arguments += ["--config", str(config), "--recipe", str(quickstart)]
    assert main([*arguments, "--cost-per-gpu-hour", "4"]) == 0
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert printed.startswith("split      ")
    assert "per million tokens" in printed
    assert f"learner.data_parallel={written['candidates'][0]['learner_gpus']}" in printed
    planned, recipe = knobs.load(config), knobs.load(quickstart)
    assert planned.rollout.num_workers == written["candidates"][0]["num_engines"]
    assert (planned.data, planned.algorithm) == (recipe.data, recipe.algorithm)
    check_plan_page(page.read_text())


def check_plan_page(content: str) -> None:
    """It has its pictures and tables, and fetches nothing."""
    assert content.count('<svg class="plot"') == 3
    for part in ("Frontier", "Staleness", "Both sides over time", "Overrides for dapo-async train"):
        assert part in content
    assert "http://" not in content.replace("http://www.w3.org", "")
    assert "<img" not in content


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--html", "plan.pdf"], "--html plan.pdf must end with .html"),
        (["--config", "out.yaml"], "--config needs --recipe CONFIG"),
        (["--recipe", "configs/quickstart.yaml"], "--recipe is for --config OUT"),
        (["--config", "out.yaml", "--recipe", "none.yaml"], "none.yaml"),
        (["--cost-per-gpu-hour", "-1"], "--cost-per-gpu-hour (-1) must be above 0"),
    ],
)
def test_wrong_options_of_plan_are_refused_before_anything_is_simulated(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(EXAMPLE), *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_a_config_that_does_not_accept_the_split_is_named() -> None:
    with pytest.raises(ValueError, match=r"quickstart\.yaml does not accept the split: "):
        planned_config(ROOT / "configs" / "quickstart.yaml", ["rollout.tensor_parallel=4"])


def test_closed_forms_stand_beside_the_simulation_and_differences_are_explained() -> None:
    free, _ = read_scenario(values(learner__token_s=1e-6))
    tight, _ = read_scenario(values(learner__token_s=1e-6, engine__kv_tokens=1500))
    for scenario in (free, tight):
        outcome, forms = simulate(scenario), closed_forms(scenario)
        lines = list(closed_form_lines(scenario, outcome))
        assert f"step {forms.step_s:.4g} s ({outcome.step_s:.4g})" in lines[0]
        is_close = abs(outcome.step_s / forms.step_s - 1) <= 0.1
        explained = any("staleness" not in line for line in lines[1:])
        assert explained == (not is_close)
    assert closed_forms(tight).step_s > 2 * closed_forms(free).step_s, "the forms know the KV cache"


def test_the_balance_point_is_where_both_sides_take_equally_long() -> None:
    scenario, cluster = read_scenario(values(engine__slots=16))
    share = balanced_share(scenario, engine_gpus=4, learner_gpus=4)
    forms = closed_forms(scenario)
    trains, generates = forms.train_s * 4 / (8 * share), forms.generate_s * 4 / (8 * (1 - share))
    assert trains == pytest.approx(generates)
    assert cluster.gpus == (8,)


def test_a_scenario_file_that_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml can't be read" in capsys.readouterr().err


def test_context_and_batch_lower_the_rate_of_an_engine() -> None:
    speed = EngineSpeed(step_s=(0.01, 0.01, 0.02), context_s=1e-5)
    assert speed.tokens_per_s(1, 0) == pytest.approx(100)
    assert speed.tokens_per_s(2, 0) == pytest.approx(100)
    assert speed.tokens_per_s(2, 500) == pytest.approx(2 / 0.03)
