"""A run folder that was moved: resume, rerun and report work there without the base model."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from paths import QUICKSTART
from run_support import TINY, check_checkpoint, command, finished, running

MORE = 3  # steps after the move
FILES = ("config.yaml", "summary.json", "mlflow.json", "checkpoints/*/state/*.json")


def named_paths(root: Path, gone: Path) -> list[str]:
    """Files of the run folder `root` that name a folder which was there before the move."""
    return [
        str(path.relative_to(root))
        for pattern in FILES
        for path in root.glob(pattern)
        if str(gone) in path.read_text()
    ]


@pytest.mark.ray
def test_an_interrupted_run_continues_in_another_folder_without_its_base_model(
    tmp_path: Path,
) -> None:
    job = tmp_path / "job"  # such as the working directory of a Ray job: gone after the run
    for name in ("base", "data"):
        shutil.copytree(QUICKSTART.parent / name / "quickstart", job / name)
    first, moved = tmp_path / "runs" / "first", tmp_path / "elsewhere" / "second"
    first.parent.mkdir()
    moved.parent.mkdir()
    files = (
        f"model.path={job}/base",
        f"data.train={job}/data/train.jsonl",
        f"data.heldout={job}/data/heldout.jsonl",
    )
    options = ("train.num_steps=200", "train.record=true", "tracking.sinks=mlflow")
    with running(first, *TINY, *options, *files) as live:
        live.wait_for(r"^step +2/")
        os.kill(live.driver, signal.SIGINT)
        interrupted = live.finish(timeout_s=60.0)
    assert interrupted.exit_code == 130, interrupted.output
    trained = len(interrupted.metrics)
    first.rename(moved)
    (job / "base").rename(tmp_path / "base")
    (job / "data").rename(tmp_path / "data")
    assert named_paths(moved, first) == []

    num_steps = trained + MORE
    missing = command("train", "--resume", str(moved), f"train.num_steps={num_steps}")
    assert missing.returncode == 2
    assert f"{job}/data/train.jsonl" in missing.stderr
    data = (
        f"data.train={tmp_path}/data/train.jsonl",
        f"data.heldout={tmp_path}/data/heldout.jsonl",
    )
    resumed = finished(moved, f"train.num_steps={num_steps}", *data, config=None)
    assert resumed.exit_code == 0, resumed.output
    assert resumed.summary["resumed_from"] == f"checkpoints/step_{trained:06d}"
    assert [row["step"] for row in resumed.metrics] == list(range(num_steps))
    assert not first.exists()
    check_checkpoint(resumed.checkpoint)
    assert resumed.checkpoint == moved / "checkpoints" / f"step_{num_steps:06d}"
    assert named_paths(moved, moved) == []
    assert min(event["ts"] for event in resumed.trace if event["ph"] == "X") == 0

    finally_at = tmp_path / "third"
    moved.rename(finally_at)
    gone = command("rerun", str(finally_at))
    assert gone.returncode == 2
    assert f"model.path ({job}/base) does not exist; give --model FOLDER" in gone.stderr
    again = command("rerun", str(finally_at), "--model", f"{tmp_path}/base")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"all {num_steps} steps are equal" in again.stdout
    page = tmp_path / "report.html"
    report = command("report", str(finally_at), "--out", str(page))
    assert report.returncode == 0, report.stderr
    assert "third" in page.read_text()
