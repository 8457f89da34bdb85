"""`dapo-async status`: what it says of a run that goes on, has ended, hangs, or was killed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from paths import QUICKSTART
from tracking_world import run_dir_with, step_row

from dapo_async.cli.main import main
from dapo_async.config import load, to_yaml
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.run_status import RunState, lines, read_status

CONFIG = load(QUICKSTART, ["train.num_steps=10"])
LIMIT_S = CONFIG.deadlines.work_s


def going_on(root: Path) -> RunDir:
    """A run of ten steps, of which four are written."""
    run_dir = run_dir_with(root)
    run_dir.summary.unlink()
    run_dir.config.write_text(to_yaml(CONFIG))
    return run_dir


def age(run_dir: RunDir, seconds: float) -> None:
    """Makes all its files as old as that."""
    then = time.time() - seconds
    for path in run_dir.root.rglob("*"):
        os.utime(path, (then, then))


def test_running_run_has_its_step_pace_and_remaining_time(tmp_path: Path) -> None:
    run_dir = going_on(tmp_path / "run")
    run_dir.lock()
    status = read_status(run_dir.root)
    assert (status.state, status.step, status.num_steps) == (RunState.RUNNING, 4, 10)
    assert (status.pace_s, status.left_s) == (1.5, 9.0)
    screen = "\n".join(lines(status))
    assert "running, step 4/10   about 9 s left" in screen
    assert "idle       learner 25%   rollout 50%   engine slots 50%" in screen
    assert "rejected 16 all wrong" in screen
    assert "saved      no checkpoint yet" in screen


def test_run_that_writes_nothing_for_the_deadline_is_stuck(tmp_path: Path) -> None:
    run_dir = going_on(tmp_path / "run")
    run_dir.lock()
    age(run_dir, LIMIT_S - 60)
    assert read_status(run_dir.root).state is RunState.RUNNING
    age(run_dir, LIMIT_S + 60)
    assert read_status(run_dir.root).state is RunState.STUCK


def test_killed_run_is_told_with_the_command_that_continues_it(tmp_path: Path) -> None:
    run_dir = going_on(tmp_path / "run")
    status = read_status(run_dir.root)
    assert status.state is RunState.KILLED
    assert f"dapo-async train --resume {run_dir.root}" in "\n".join(lines(status))


@pytest.mark.parametrize(
    ("ended", "state"),
    [("done", "done"), ("solved", "done"), ("failed", "ended"), ("interrupted", "ended")],
)
def test_ended_run_has_its_status_and_reason(tmp_path: Path, ended: str, state: str) -> None:
    run_dir = going_on(tmp_path / "run")
    run_dir.write_summary({"status": ended, "reason": "so it was"})
    status = read_status(run_dir.root)
    assert (status.state, status.reason, status.left_s) == (state, "so it was", None)


def test_newest_checkpoint_and_evaluation_are_named(tmp_path: Path) -> None:
    run_dir = going_on(tmp_path / "run")
    run_dir.log_evaluation({"version": 3, "accuracy": 0.75}, accuracies={0: 0.75})
    (run_dir.checkpoints / "step_000003").mkdir()
    screen = "\n".join(lines(read_status(run_dir.root)))
    assert "held-out 0.750 after step 3" in screen
    assert "saved      checkpoints/step_000003" in screen


def test_bottleneck_is_that_of_the_rows(tmp_path: Path) -> None:
    run_dir = going_on(tmp_path / "run")
    (limit,) = [line for line in lines(read_status(run_dir.root)) if line.startswith("bottleneck")]
    assert "idle: learner 25%, engine slots 50%" in limit


def test_broken_files_are_notes(tmp_path: Path) -> None:
    run_dir = going_on(tmp_path / "run")
    run_dir.config.write_text("no_such_section: {}\n")
    with run_dir.metrics.open("a") as file:
        file.write('{"step": 4, "version": 5}\n{"step": 5, "ver')
    status = read_status(run_dir.root)
    assert (status.step, status.num_steps, status.bottleneck) == (5, None, None)
    assert any("no_such_section" in note for note in status.notes)
    assert list(lines(status))


def test_run_without_a_step_is_shown(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path / "run")
    run_dir.config.write_text(to_yaml(CONFIG))
    status = read_status(run_dir.root)
    assert (status.step, status.pace_s, status.state) == (0, None, RunState.KILLED)
    assert "killed, step 0/10" in "\n".join(lines(status))


def test_exit_code_tells_the_states_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = going_on(tmp_path / "run")
    assert main(["status", str(run_dir.root)]) == 1
    run_dir.write_summary({"status": "failed", "reason": "no batch"})
    assert main(["status", str(run_dir.root)]) == 1
    run_dir.write_summary({"status": "done"})
    assert main(["status", str(run_dir.root), "--follow"]) == 0
    run_dir.lock()
    assert main(["status", str(run_dir.root)]) == 3
    age(run_dir, LIMIT_S + 60)
    assert main(["status", str(run_dir.root)]) == 4
    capsys.readouterr()
    assert main(["status", str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err


def test_json_has_every_fact_and_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = going_on(tmp_path / "run")
    run_dir.log_step(step_row(4, entropy=float("nan")))
    assert main(["status", str(run_dir.root), "--json"]) == 1
    printed = capsys.readouterr().out
    assert "NaN" not in printed
    facts = json.loads(printed)
    assert (facts["state"], facts["step"], facts["num_steps"]) == ("killed", 5, 10)
    assert facts["row"]["staleness"] == 1.0
