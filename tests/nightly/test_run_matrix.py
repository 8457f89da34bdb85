"""Whole runs that take too long for every change: controls that must not learn, rare deaths.

`.ci/full` runs them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from learning_checks import check_learning
from paths import QUICKSTART, ROOT
from rank_layouts import RANKS
from run_support import (
    COMMAND,
    TINY,
    Finished,
    check_conservation,
    command,
    environment,
    finished,
    running,
)
from snippets import snippets, write_file

REWARDS = ROOT / "docs" / "rewards.md"
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_nothing_is_learned_from_verdicts_that_ignore_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (control,) = (each for each in snippets(REWARDS) if each.file == "control.py")
    write_file(control, tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    overrides = ("seed=0", "reward.verifier=control:judge", "train.num_steps=20")
    run = finished(tmp_path / "run", *overrides, timeout_s=400.0)
    assert run.exit_code == 0, run.output
    assert run.summary["final_accuracy"] < 0.4
    with pytest.raises(AssertionError):
        check_learning(run.summary)
    # The verifier of the config measures the true accuracy.
    result = tmp_path / "result.json"
    options = ("--checkpoint", str(run.checkpoint), "--k", "4", "--json", str(result))
    measured = command("eval", str(QUICKSTART), "--max-problems", "128", *options)
    assert measured.returncode == 0, measured.stderr
    assert json.loads(result.read_text())["totals"]["avg@4"]["mean"] < 0.4


def test_a_reader_that_has_seen_enough_takes_the_lines_with_it_and_not_the_run(
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    train = f"{COMMAND} train {QUICKSTART} {' '.join(TINY)} run_dir={root}"
    shell = f"{train} | head -n 4; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(
        ["bash", "-c", shell],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (ran.returncode, ran.stdout.count("\n"), ran.stderr) == (0, 4, "")
    summary = Finished(root, ran.returncode, ran.stdout).summary
    assert (summary["status"], summary["steps"], summary["caught"]) == ("done", 6, {"display": 1})


def test_evaluator_runs_at_the_lowest_priority(tmp_path: Path) -> None:
    often = ("train.num_steps=5000", "train.checkpoint_every_steps=2", "evaluation.every_steps=2")
    with running(tmp_path / "run", *TINY, *often) as live:
        live.wait_for(r"^evaluation of version \d+: ")
        engine = [
            thread.id
            for thread in psutil.Process(live.pid("evaluator")).threads()
            if os.getpriority(os.PRIO_PROCESS, thread.id) == 19
        ]
        assert engine, "no thread of the evaluator is of the lowest priority"
        os.kill(live.driver, signal.SIGINT)
        run = live.finish(timeout_s=60.0)
        live.seconds_until_nothing_is_left(timeout_s=30.0)
    check_conservation(run.summary["groups"])
    assert not (run.root / "evaluated").exists()


def test_rank_that_hangs_ends_the_run_in_its_name(tmp_path: Path) -> None:
    with running(
        tmp_path / "run",
        *TINY,
        *RANKS,
        "learner.data_parallel=2",
        "train.num_steps=5000",
        *(f"deadlines.{wait}=5" for wait in ("work_s", "answer_s")),
    ) as live:
        live.wait_for(r"^step +3/")
        os.kill(live.pid("learner-1"), signal.SIGSTOP)
        run = live.finish(timeout_s=60.0)
        live.seconds_until_nothing_is_left(timeout_s=20.0)
    assert run.exit_code == 1, run.output
    assert run.summary["reason"].startswith("learner-1 did not answer for 2 s; before that, "), (
        run.summary["reason"]
    )
    check_conservation(run.summary["groups"])


def test_two_ranks_survive_the_death_of_one_and_one_rank_resumes_their_checkpoint(
    tmp_path: Path,
) -> None:
    with running(
        tmp_path / "run", *TINY, *RANKS, "learner.tensor_parallel=2", "train.num_steps=5000"
    ) as live:
        live.wait_for(r"^step +5/")
        os.kill(live.pid("learner-1"), signal.SIGKILL)
        live.wait_for("^the learner trains again after", timeout_s=60.0)
        trained = re.findall(r"^step +(\d+)/", live.output, re.MULTILINE)
        live.wait_for(rf"^step +{int(trained[-1]) + 2}/")
        os.kill(live.driver, signal.SIGINT)
        run = live.finish(timeout_s=20.0)
        live.seconds_until_nothing_is_left(timeout_s=10.0)
    assert run.exit_code == 130
    assert "learner-1 lost its process: learner-1 died" in run.output
    assert [row["step"] for row in run.metrics] == list(range(len(run.metrics)))
    checkpoint = run.checkpoint
    version = int(checkpoint.name.removeprefix("step_"))
    assert version >= 2
    alone = finished(
        tmp_path / "run", "learner.tensor_parallel=1", f"train.num_steps={version + 2}", config=None
    )
    assert alone.exit_code == 0, alone.output
    assert [row["step"] for row in alone.metrics] == list(range(version + 2))
