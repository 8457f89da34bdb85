"""Results of `dapo-async bench` as rates of a scenario."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paths import ROOT

from dapo_async.bench.scenario import scenario_of_results
from dapo_async.cli.main import main
from dapo_async.planner.settings import read_scenario_file

RESULTS = ROOT / "benchmarks" / "results"
ENGINE, LEARNER = RESULTS / "bench_rollout_torch.json", RESULTS / "bench_learner.json"
SMALL = """
engines: 2
steps: 24
warm_up_steps: 8
engine: {slots: 8, gpus: 1, step_s: 9.0, prefill_s: 9.0, weight_update: keep_kv}
learner: {gpus: 1, token_s: 9.0, minibatches: 2}
lengths: {mean: 60, max: 200}
replay: {groups_per_step: 8, group_size: 4, max_staleness: 2}
plan: {gpus: 4, max_staleness: [2]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path / "small.yaml"


def test_measured_rates_replace_those_of_the_file_and_its_sizes_stay(file: Path) -> None:
    rows = json.loads(ENGINE.read_text())["rows"]
    decodes = [row["figures"] for row in rows if row["what"]["kind"] == "decode"]
    slowest = max(each["decode_step_s"]["median"] for each in decodes)
    scenario, cluster = read_scenario_file(file, measured=scenario_of_results([ENGINE, LEARNER]))
    assert scenario.engine.num_slots == 8
    assert 0 < scenario.engine.step_s[1] < slowest < 9.0
    assert 0 < scenario.engine.prefill_s < 9.0
    assert scenario.engine.kv_tokens == 16_384
    steps = [row["figures"] for row in json.loads(LEARNER.read_text())["rows"]]
    fastest = max(each["tokens_per_s"]["median"] for each in steps if "tokens_per_s" in each)
    assert scenario.learner.token_s == pytest.approx(1 / fastest, rel=1e-3)
    assert (scenario.num_minibatches, scenario.weight_update) == (2, "keep_kv")
    assert (cluster.rates.engine_gpus, cluster.rates.learner_gpus) == (1, 1)


def test_plan_and_simulate_take_results(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = ("--bench", str(ENGINE), str(LEARNER))
    assert main(["simulate", str(file), *bench]) == 0
    assert main(["plan", str(file), *bench]) == 0
    assert capsys.readouterr().err == ""


def test_what_is_no_result_is_refused_in_one_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none.json").write_text("{}")
    replay = json.loads((RESULTS / "bench_learner.json").read_text()) | {"rows": []}
    (tmp_path / "empty.json").write_text(json.dumps(replay))
    for words in (
        [str(file), "--bench", str(tmp_path / "none.json")],
        [str(file), "--bench", str(tmp_path / "empty.json")],
        ["--from-run", str(tmp_path), "--bench", str(LEARNER)],
    ):
        assert main(["simulate", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
