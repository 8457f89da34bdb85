"""Figure 1 and Table 1 of the DAPO paper in a report, from the files of runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from paths import CONFIGS
from tracking_world import run_dir_with

from dapo_async.tracking.published import (
    CLIP_HIGHER,
    DYNAMIC_SAMPLING,
    FILTERING,
    GRPO,
    R1_ZERO,
    SOFT_OVERLONG,
    TOKEN_LOSS,
    curves,
    measured,
    rung,
)
from dapo_async.tracking.report import write_report
from dapo_async.tracking.report_reading import RunRecord, read_run
from dapo_async.tracking.run_dir import RunDir

LADDER = {
    "ladder/1_grpo": GRPO,
    "ladder/2_overlong_filtering": FILTERING,
    "ladder/3_clip_higher": CLIP_HIGHER,
    "ladder/4_soft_overlong": SOFT_OVERLONG,
    "ladder/5_token_level_loss": TOKEN_LOSS,
    "ladder/6_dynamic_sampling": DYNAMIC_SAMPLING,
    "dapo_qwen2.5_32b": DYNAMIC_SAMPLING,
}


def watched(root: Path, recipe: str, accuracies: dict[int, float], *, k: int = 32) -> RunDir:
    """A run with the config of a recipe, whose versions a watcher has measured."""
    run_dir = run_dir_with(root)
    run_dir.config.write_text((CONFIGS / f"{recipe}.yaml").read_text())
    run_dir.watched.root.mkdir()
    for version, accuracy in accuracies.items():
        mean = {"mean": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05}
        totals = {
            "problems": 30,
            **{f"{name}@{k}": mean for name in ("avg", "pass", "maj")},
            "mean_response_tokens": 9.0,
            "truncated": 0.0,
            "answered": 1.0,
        }
        settings = {"k": k, "temperature": 1.0, "top_p": 0.7}
        result = {"settings": settings, "totals": totals, "problems": []}
        run_dir.watched.result(version).write_text(json.dumps(result))
    return run_dir


def record(run_dir: RunDir) -> RunRecord:
    return read_run(run_dir.root, run_dir.root.name)


@pytest.mark.parametrize(("recipe", "expected"), LADDER.items())
def test_each_recipe_of_the_ladder_is_its_rung_with_the_published_value(
    tmp_path: Path, recipe: str, expected: tuple[str, float]
) -> None:
    text = (CONFIGS / f"{recipe}.yaml").read_text()
    config = record(watched(tmp_path / "run", recipe, {})).config
    assert rung(config) == expected
    published = re.search(r"avg@32 as published: (\d+)", text.replace("\n# ", " "))
    assert published is not None
    assert expected[1] == int(published[1]) / 100


def test_a_watched_run_gives_figure_1_with_the_published_lines(tmp_path: Path) -> None:
    run = record(watched(tmp_path / "run", "dapo_qwen2.5_32b", {0: 0.0, 5: 0.2, 10: 0.1}))
    curve, dapo, r1_zero = curves([run])
    assert (curve.label, curve.points.steps, curve.points.values) == (
        "avg@32", [0.0, 5.0, 10.0], [0.0, 0.2, 0.1],
    )  # fmt: skip
    assert curve.points.high == pytest.approx([0.05, 0.25, 0.15])
    assert (dapo.label, dapo.points.steps, dapo.points.values) == (
        "DAPO, published", [0.0, 10.0], [0.5, 0.5],
    )  # fmt: skip
    assert r1_zero.points.values == [R1_ZERO[1]] * 2
    found = measured(run)
    assert found is not None
    assert (found.best["version"], found.last["version"]) == (5, 10)


def test_the_page_of_two_rungs_has_the_rows_of_table_1(tmp_path: Path) -> None:
    first = watched(tmp_path / "grpo", "ladder/1_grpo", {0: 0.0, 600: 0.25})
    second = watched(tmp_path / "dapo", "ladder/6_dynamic_sampling", {0: 0.0, 600: 0.5})
    out = tmp_path / "report.html"
    assert write_report([first.root, second.root], out=out, steps=None) == []
    page = out.read_text()
    for line in (
        "Held-out accuracy and published values",
        "<td>GRPO</td><td>0.30</td><td>0.250 at step 600</td>",
        "<td>+ dynamic sampling (DAPO)</td><td>0.50</td><td>0.500 at step 600</td>",
        "avg@32, temperature 1, top-p 0.7, problems 30",
        "DeepSeek-R1-Zero-Qwen-32B, published",
    ):
        assert line in page


def test_other_problems_have_a_curve_and_no_published_value(tmp_path: Path) -> None:
    run_dir = watched(tmp_path / "run", "dapo_qwen2.5_32b", {0: 0.1, 5: 0.2})
    tree = yaml.safe_load(run_dir.config.read_text())
    tree["data"]["heldout"] = "hub:math500"
    run_dir.config.write_text(yaml.safe_dump(tree))
    assert [line.label for line in curves([record(run_dir)])] == ["avg@32"]
    out = tmp_path / "report.html"
    write_report([run_dir.root], out=out, steps=None)
    assert "<td>–</td><td>–</td><td>0.200 at step 5</td>" in out.read_text()


def test_the_runs_own_sampled_evaluations_are_drawn_too_and_greedy_ones_are_not(
    tmp_path: Path,
) -> None:
    run_dir = watched(tmp_path / "run", "dapo_qwen2.5_32b", {})
    run_dir.log_evaluation({"version": 0, "accuracy": 0.5, "k": 1}, accuracies={})
    assert curves([record(run_dir)]) == []
    for version in (5, 10):
        row = {"version": version, "accuracy": version / 100, "k": 16, "temperature": 1.0}
        run_dir.log_evaluation(row, accuracies={})
    curve, *_ = curves([record(run_dir)])
    assert (curve.label, curve.points.values) == ("avg@16", [0.05, 0.1])


def test_knobs_of_another_type_are_no_rung_above_grpo() -> None:
    assert rung({"algorithm.clip_high": "high", "algorithm.clip_low": None}) == GRPO
