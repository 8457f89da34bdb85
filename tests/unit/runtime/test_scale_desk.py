"""`dapo-async scale` and the driver talk through the run directory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.cli.main import main
from dapo_async.config import Config, to_yaml
from dapo_async.runtime.resume import continued_config
from dapo_async.runtime.scale_desk import (
    Request,
    ScaleDesk,
    asked_for,
    asked_line,
    request_workers,
)
from dapo_async.tracking.run_dir import RunDir


def run_of(tmp_path: Path, *overrides: str) -> tuple[RunDir, Config]:
    """A run that goes on: this process holds its lock."""
    config = knobs.load(QUICKSTART, ["rollout.num_workers=2", *overrides])
    run_dir = RunDir.create(tmp_path / "run")
    run_dir.config.write_text(to_yaml(replace(config, run_dir="")))
    run_dir.lock()
    return run_dir, config


def answering(desk: ScaleDesk, answer: Callable[[Request], None]) -> threading.Thread:
    def serve() -> None:
        until_s = time.monotonic() + 10.0
        while time.monotonic() < until_s:
            if (request := desk.take()) is not None:
                answer(request)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def test_accepted_number_is_answered_and_kept_for_a_resume(tmp_path: Path) -> None:
    run_dir, config = run_of(tmp_path)
    desk = ScaleDesk(run_dir, config)
    serving = answering(desk, lambda request: desk.accept(request, f"now {request.rollout}"))
    assert request_workers(run_dir.root, 3, timeout_s=10.0) == "now 3"
    serving.join()
    assert desk.take() is None, "a request is taken once"
    assert knobs.load(run_dir.config).rollout.num_workers == 3
    # A start with train.resume=auto has the config file with the old number.
    assert asked_for(run_dir.root, config).rollout.num_workers == 3
    assert continued_config(run_dir.root, config, checkpoint=None).rollout.num_workers == 3
    chosen = replace(config, rollout=replace(config.rollout, num_workers=5))
    assert asked_for(run_dir.root, chosen) == chosen, "somebody has chosen 5 since"
    resumed = knobs.load(run_dir.config)
    assert asked_line(run_dir.root, resumed) == (
        "rollout.num_workers=3, as dapo-async scale has asked for last (it was 2)"
    )
    # The next driver knows the number of the config file still.
    later = ScaleDesk(run_dir, resumed)
    later.accept(Request("x", 4), "now 4")
    assert asked_for(run_dir.root, config).rollout.num_workers == 4
    ScaleDesk(run_dir, chosen)
    assert asked_line(run_dir.root, chosen) is None
    assert asked_for(run_dir.root, config) == config


def test_refusal_is_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, config = run_of(tmp_path)
    desk = ScaleDesk(run_dir, config)
    answering(desk, lambda request: desk.refuse(request, "the cluster has 4 CPUs; ask for fewer"))
    assert main(["scale", str(run_dir.root), "rollout=9"]) == 2
    assert capsys.readouterr().err == "dapo-async: the cluster has 4 CPUs; ask for fewer\n"
    assert knobs.load(run_dir.config).rollout.num_workers == 2
    assert not (run_dir.scale / "asked.json").exists()


@pytest.mark.parametrize(
    ("overrides", "change", "line"),
    [
        ((), "rollout=0", "rollout.num_workers (0) must be at least 1"),
        ((), "rollout=20000", "rollout.num_workers (20000) must be at most 10,000"),
        ((), "learner=2", "scale does not know learner=2; write rollout=N, such as rollout=4"),
        ((), "rollout=two", "scale does not know rollout=two; write rollout=N"),
        (
            ("rollout.num_workers=1", "replay.admission=lockstep", "replay.max_staleness=0"),
            "rollout=2",
            "replay.admission=lockstep needs replay.max_staleness=0 and rollout.num_workers=1",
        ),
        (
            ("rollout.engine=sglang", "rollout.servers='http://a:1,http://b:1'"),
            "rollout=3",
            "rollout.servers names the servers of this run, one per worker",
        ),
        (
            ("model.placement=shared", "rollout.num_workers=1"),
            "rollout=2",
            "learner and engines of this run take turns on the same devices",
        ),
    ],
)
def test_number_that_the_run_can_not_have_is_refused_at_once(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
    change: str,
    line: str,
) -> None:
    run_dir, _ = run_of(tmp_path, *overrides)
    assert main(["scale", str(run_dir.root), change]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dapo-async: {line}")
    assert error.count("\n") == 1
    assert not (run_dir.scale / "request.json").exists()


def test_folder_without_a_run_and_ended_run_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale", str(tmp_path), "rollout=3"]) == 2
    assert f"there is no run in {tmp_path}; give the folder" in capsys.readouterr().err
    config = knobs.load(QUICKSTART)
    run_dir = RunDir.create(tmp_path / "run")
    run_dir.config.write_text(to_yaml(config))
    run_dir.summary.write_text(json.dumps({"status": "done", "reason": "all steps trained"}))
    assert main(["scale", str(run_dir.root), "rollout=3"]) == 2
    error = capsys.readouterr().err
    assert "does not go on (done); continue it with dapo-async train --resume" in error
    assert "rollout.num_workers=3" in error


def test_request_that_nobody_answers_is_taken_back(tmp_path: Path) -> None:
    run_dir, _ = run_of(tmp_path)
    with pytest.raises(TimeoutError, match=r"has not answered within 0\.3 s, so nothing changes"):
        request_workers(run_dir.root, 3, timeout_s=0.3)
    assert not (run_dir.scale / "request.json").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"id": "x"}', '{"id": 3, "rollout": 2}', '{"id": "x", "rollout": "9"}']
)
def test_damaged_request_is_no_request(tmp_path: Path, text: str) -> None:
    run_dir, config = run_of(tmp_path)
    desk = ScaleDesk(run_dir, config)
    run_dir.scale.mkdir()
    (run_dir.scale / "request.json").write_text(text)
    assert desk.take() is None
