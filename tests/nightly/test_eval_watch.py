"""`dapo-async eval --watch` beside a real run: every checkpoint is measured into the same run."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from run_support import COMMAND, TINY, command, environment, running

from dapo_async.tracking.run_dir import RunDir

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
VERSIONS = [0, 20, 40, 60, 80]


def test_a_watcher_measures_every_checkpoint_of_a_run_into_the_same_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_dir = RunDir(root)
    sinks = ("tracking.sinks=mlflow,tensorboard,wandb",)
    often = ("train.num_steps=80", "train.checkpoint_every_steps=20", "train.keep_checkpoints=1")
    with running(root, *TINY, *often, *sinks) as run:
        deadline_s = time.monotonic() + 60
        while not run_dir.config.exists():  # before the first step: the watcher has to start, too
            assert time.monotonic() < deadline_s, run.output
            time.sleep(0.05)
        watch = ("eval", "--watch", str(root), "--follow-until-end", "--k", "2")
        watcher = subprocess.Popen(
            [COMMAND, *watch, "--max-problems", "16"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        ended = run.finish(timeout_s=300)
        assert ended.exit_code == 0, ended.output
        said, _ = watcher.communicate(timeout=240)
    assert watcher.returncode == 0, said
    assert run_dir.watched.versions() == VERSIONS, said
    rows = run_dir.watched.rows()
    assert {(row["k"], row["num_prompts"]) for row in rows} == {(2, 16)}
    assert not run_dir.watched.lease.exists()

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = json.loads(run_dir.mlflow.read_text())["run_id"]
    history = client.get_metric_history(run_id, "watched/accuracy")
    assert {(each.step, each.value) for each in history} == {
        (row["version"], row["accuracy"]) for row in rows
    }
    assert client.get_run(run_id).info.status == "FINISHED"  # the watcher left it closed
    assert any((run_dir.tensorboard / "watched").iterdir())
    assert [*root.glob("wandb/offline-run-*/*.wandb")]
    assert ended.summary["caught"] == {}

    page = tmp_path / "report.html"
    reported = command("report", str(root), "--out", str(page))
    assert reported.returncode == 0, reported.stderr
    assert "Held-out accuracy and published values" in page.read_text()


def test_a_killed_watcher_is_followed_by_one_that_measures_the_rest(tmp_path: Path) -> None:
    root = tmp_path / "run"
    often = ("train.num_steps=2", "train.checkpoint_every_steps=1", "train.keep_checkpoints=3")
    with running(root, *TINY, *often) as run:
        assert run.finish(timeout_s=240).exit_code == 0
    watch = [COMMAND, "eval", "--watch", str(root), "--follow-until-end", "--k", "2"]
    folder = RunDir(root).watched
    first = subprocess.Popen(watch, env=environment(), stdout=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 120
    while not folder.versions():
        assert first.poll() is None
        assert time.monotonic() < deadline_s, "no version was measured within 120 s"
        time.sleep(0.05)
    first.kill()
    first.wait(10)
    assert folder.lease.exists()
    done = {version: os.stat(folder.result(version)).st_mtime_ns for version in folder.versions()}
    second = command(*watch[1:])
    assert second.returncode == 0, second.stdout + second.stderr
    assert folder.versions() == [0, 1, 2]
    assert all(os.stat(folder.result(v)).st_mtime_ns == time_ns for v, time_ns in done.items())
    assert not folder.lease.exists()
