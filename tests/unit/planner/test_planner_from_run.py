"""A scenario from a run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from dapo_async import config as knobs
from dapo_async.cli.main import main
from dapo_async.planner.closed_forms import closed_forms
from dapo_async.planner.from_run import scenario_of_run
from dapo_async.planner.inputs import read_input
from dapo_async.planner.screens import measured_line
from dapo_async.planner.settings import read_scenario
from dapo_async.planner.simulator import simulate

GROUPS, SIZE, MEAN = 8, 4, 200
TOKENS = GROUPS * SIZE * MEAN
STEP_S, IDLE = 4.0, 0.25  # the engines are the bottleneck: the learner works for 3 s


def write_run(
    folder: Path,
    *,
    steps: int = 30,
    samples: bool = True,
    knobs_: tuple[str, ...] = (),
    **changes: Any,
) -> Path:
    """A run of two engines that generate twice what is trained, because half is rejected."""
    (folder / "rollouts").mkdir(parents=True)
    config = knobs.load(
        ROOT / "configs" / "quickstart.yaml",
        [
            f"replay.groups_per_step={GROUPS}",
            f"replay.group_size={SIZE}",
            "replay.max_staleness=4",
            "rollout.num_workers=2",
            "rollout.num_slots=16",
            f"rollout.max_response_tokens={2 * MEAN}",
            "learner.num_minibatches=1",
            *knobs_,
        ],
        files=False,
    )
    (folder / "config.yaml").write_text(knobs.to_yaml(config))
    row = {
        "step_s": STEP_S,
        "tokens": float(TOKENS),
        "response_tokens": float(MEAN),
        "staleness": 1.0,
        "idle.learner": IDLE,
        "slots.idle": 0.0,
        "offered": 2 * GROUPS,
        "acceptance": 0.5,
        "tokens_per_s.generated": 2 * TOKENS / STEP_S,
        "publish_pause_s": 0.0,
        **changes,
    }
    lines = [json.dumps({"step": step, **row}) for step in range(steps)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 99, "ste']))
    if samples:
        rollouts = "".join(
            json.dumps({"tokens": MEAN - 50 + 100 * (k % 2)}) + "\n" for k in range(8)
        )
        for step in range(steps):
            (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(rollouts)
    return folder


def test_a_run_is_simulated_as_it_was_measured(tmp_path: Path) -> None:
    values, measured = scenario_of_run(write_run(tmp_path))
    assert (measured.steps, measured.step_s, measured.idle_learner) == (15, STEP_S, IDLE)
    assert values["engine"]["step_s"] == pytest.approx(32 / (2 * TOKENS / STEP_S))
    assert values["learner"]["token_s"] == pytest.approx(3.0 / TOKENS)
    assert set(values["lengths"]["samples"]) == {150.0, 250.0}
    scenario, cluster = read_scenario(values)
    assert (cluster.gpus, cluster.rates.learner_gpus, scenario.acceptance) == ((3,), 1, (0.5, 0.5))
    outcome = simulate(scenario)
    assert outcome.step_s == pytest.approx(STEP_S, rel=0.1)
    assert outcome.learner["train"] == pytest.approx(1 - IDLE, abs=0.08)
    assert outcome.engines["running"] > 0.95


def test_a_wait_that_is_not_for_generation_is_the_control_plane(tmp_path: Path) -> None:
    """The learner works for 3 of 4 s, though a fifth of the slots suffice for what is generated."""
    few: dict[str, Any] = {"slots.idle": 0.8}
    scenario, _, measured = read_input(None, from_run=write_run(tmp_path, **few))
    assert measured is not None
    assert scenario.snapshot_s == pytest.approx(STEP_S - 3.0, abs=0.1)
    outcome = simulate(scenario)
    assert outcome.step_s == pytest.approx(STEP_S, rel=0.03)
    assert "s are the control plane" in measured_line(measured, scenario, outcome)


def test_a_wait_for_generation_is_no_control_plane(tmp_path: Path) -> None:
    scenario, _, _ = read_input(None, from_run=write_run(tmp_path))
    assert scenario.control_s == 0.0


SHARED = (
    "model.placement=shared",
    "model.device=cuda",
    "weights.transport=disk",
    "learner.data_parallel=2",
    "replay.max_staleness=1",
)
TURNS: dict[str, Any] = {"idle.learner": 0.5, "slots.idle": 0.05, "slots.asleep": 0.45}


def test_a_run_on_shared_gpus_is_played_in_turns_and_counted_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", knobs_=SHARED, **TURNS, switch_s=0.2)
    values, measured = scenario_of_run(folder)
    assert (values["plan"]["gpus"], values["engines"], values["colocated"]) == (2, 2, True)
    # A slot runs half of the time: its decode step is that of the engines while they are awake.
    assert values["engine"]["step_s"] == pytest.approx(0.5 * 32 / (2 * TOKENS / STEP_S))
    scenario, _ = read_scenario(values)
    outcome = simulate(scenario)
    assert outcome.step_s == pytest.approx(measured.step_s, rel=0.15)
    assert outcome.learner["train"] == pytest.approx(0.5, abs=0.08)
    assert closed_forms(scenario).step_s == pytest.approx(outcome.step_s, rel=0.15)


def test_the_split_for_a_run_on_shared_gpus_is_a_config_that_is_accepted(tmp_path: Path) -> None:
    folder, out = write_run(tmp_path / "run", knobs_=SHARED, **TURNS), tmp_path / "planned.yaml"
    assert main(["plan", "--from-run", str(folder), "--config", str(out)]) == 0
    planned = knobs.load(out, files=False)
    assert not planned.model.is_shared
    assert planned.rollout.num_workers + planned.learner.num_ranks == 2


def test_without_written_rollouts_the_mean_is_enough(tmp_path: Path) -> None:
    values, _ = scenario_of_run(write_run(tmp_path, samples=False))
    assert values["lengths"] == {"max": 2 * MEAN, "mean": pytest.approx(MEAN)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 9}, "has 9 steps with rates, 10 are needed"),
        ({"tokens_per_s.generated": None}, "no rate of generated tokens"),
        ({"slots.idle": None}, "has 0 steps with rates"),
    ],
)
def test_a_run_that_says_too_little_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path, **changes)
    with pytest.raises(ValueError, match=says):
        scenario_of_run(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run directory"):
        scenario_of_run(tmp_path)


def test_a_command_takes_a_file_or_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path)
    assert main(["simulate", "--from-run", str(folder)]) == 0
    assert "measured   4 s per step in the last 15, simulated" in capsys.readouterr().out
    assert main(["plan", "--from-run", str(folder)]) == 0
    assert "measured   4 s per step" in capsys.readouterr().out
    for arguments in (["plan"], ["plan", "file.yaml", "--from-run", str(folder)]):
        assert main(arguments) == 2
        assert "one of them" in capsys.readouterr().err
    assert read_input(None, from_run=folder)[2] is not None
