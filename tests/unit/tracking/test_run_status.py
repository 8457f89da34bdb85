"""`dapo-async status`: what it says of a run that goes on, has ended, hangs, or was killed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from paths import QUICKSTART
from tracking_world import run_dir_with, step_row

from dapo_async.cli.main import main
from dapo_async.config import load, to_yaml
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.run_status import (
    RunState,
    lines,
    newest_run,
    read_status,
    status_of_post,
)

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


def post(**more: Any) -> dict[str, Any]:
    """What the driver of a run has posted after step 4 of 10."""
    return {
        "root": "/far/away/run",
        "pid": 7,
        "host": "other",
        "work_s": LIMIT_S,
        "num_steps": 10,
        "state": "running",
        "reason": "",
        "time_s": time.time(),
        "row": step_row(3) | {"tokens_per_s.generated": 3600.0, "mfu.learner": 0.4, "loss": None},
        "recent": [{"step_s": 1.5, "tokens": 1500.0}] * 4,
        "engines": {
            "rollout-0": {"version": 4.0, "tokens_per_s": 1900.0, "slots": 31.5},
            "rollout-1": {"version": 3.0, "tokens_per_s": 1700.0, "slots": 30.0},
        },
        "evaluation": {"version": 4, "accuracy": 0.75},
        "checkpoint": "checkpoints/step_000004",
        "bottleneck": "generation limits the speed",
    } | more


def test_posted_state_of_a_run_is_shown_without_its_directory() -> None:
    status = status_of_post(post())
    assert (status.state, status.step, status.left_s) == (RunState.RUNNING, 4, 9.0)
    screen = "\n".join(lines(status))
    assert "3,600 generated tokens/s   1,000 trained tokens/s" in screen
    assert "MFU learner 40%" in screen
    assert (
        "by engine  rollout-0 version 4, tokens/s 1,900, busy slots 31.5   "
        "rollout-1 version 3, tokens/s 1,700, busy slots 30.0"
    ) in screen
    assert "held-out 0.750 after step 4" in screen
    assert "checkpoints/step_000004" in screen
    assert "as its driver on other (pid 7) has posted it" in screen
    json.dumps(status.to_json(), allow_nan=False)


def test_posted_state_that_is_too_old_is_stuck_and_an_ended_one_has_no_time_left() -> None:
    assert status_of_post(post(time_s=time.time() - LIMIT_S - 60)).state is RunState.STUCK
    ended = status_of_post(post(state="ended", reason="SIGTERM received"))
    assert (ended.state, ended.left_s, ended.engines) == (RunState.ENDED, None, {})


def test_many_engines_are_shown_by_their_versions_and_range() -> None:
    engines = {
        f"rollout-{each}": {"version": 4.0 - (each == 5), "tokens_per_s": 1000.0 + each}
        for each in range(9)
    }
    screen = "\n".join(lines(status_of_post(post(engines=engines))))
    assert "9 engines: version 4 on 8, version 3 on 1" in screen
    assert "tokens/s 1,000 (rollout-0) to 1,008, median 1,004" in screen


def test_run_on_another_machine_goes_on_although_its_lock_is_not_seen(tmp_path: Path) -> None:
    run_dir = going_on(tmp_path / "run")
    run_dir.write_status(json.dumps(post()))
    status = read_status(run_dir.root)
    assert (status.state, [*status.engines]) == (RunState.RUNNING, ["rollout-0", "rollout-1"])
    run_dir.write_status(json.dumps(post(host=os.uname().nodename)))
    assert read_status(run_dir.root).state is RunState.KILLED


def test_newest_run_is_the_one_that_wrote_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAPO_ASYNC_RUNS", str(tmp_path))
    assert main(["status"]) == 2
    assert f"dapo-async: {tmp_path} has no run directories; give" in capsys.readouterr().err
    old, new = going_on(tmp_path / "old"), going_on(tmp_path / "new")
    age(old, 60)
    assert newest_run(tmp_path) == new.root
    assert main(["status"]) == 1
    assert str(new.root) in capsys.readouterr().out
