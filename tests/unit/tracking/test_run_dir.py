"""The run directory: what it refuses, what a step adds to it, what a kill leaves of it."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Never

import pytest

from dapo_async.tracking.run_dir import RunDir, missing_folders, too_full, unusable
from dapo_async.utils.files import partial_path

Usage = namedtuple("Usage", "total used free")


def test_a_run_never_writes_over_another(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path / "runs" / "first")
    assert sorted(path.name for path in run_dir.root.iterdir()) == ["checkpoints", "rollouts"]
    with pytest.raises(ValueError, match=r"first is not empty; continue with train --resume"):
        RunDir.create(tmp_path / "runs" / "first")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt is a file; choose another run_dir"):
        RunDir.create(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert RunDir.create(tmp_path / "empty").checkpoints == tmp_path / "empty" / "checkpoints"


def test_a_folder_that_no_run_can_have_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    other = "; choose another run_dir"
    expected = {
        file: f"run_dir {file} is a file{other}",
        file / "a" / "b": f"run_dir {file}/a/b can't be made: {file} is a file{other}",
        tmp_path / ("a" * 300): f"can't be made: File name too long{other}",
        Path("/", *["a" * 200] * 30): f"can't be made: File name too long{other}",
    }
    for root, line in expected.items():
        found = unusable(root)
        assert found is not None
        assert found.endswith(line)
        with pytest.raises(ValueError, match="choose another run_dir") as error:
            RunDir.create(root)
        assert str(error.value) == found
        assert missing_folders(root)[-1:] != [tmp_path]
    assert unusable(tmp_path / "new" / "run") is None
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert unusable(tmp_path / "new" / "run") == (
        f"run_dir {tmp_path}/new/run can't be made: {tmp_path} can't be written to{other}"
    )
    assert [*tmp_path.iterdir()] == [file]


def test_a_disk_without_space_for_a_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs" / "run"
    assert too_full(root, 2**20) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - 2**20, 2**20))
    assert too_full(root, 2**20) is None
    assert too_full(root, 12 * 2**30) == (
        f"run_dir {root} has 1.0 MiB free, a checkpoint of this model needs at least "
        "12,288.0 MiB; free some space, or choose another run_dir"
    )


def test_each_step_is_one_line_of_strict_json_whatever_its_numbers(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path)
    run_dir.log_step({"step": 0, "loss": 0.25})
    run_dir.log_step({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})

    def refuse(constant: str) -> Never:
        raise AssertionError(f"{constant} is not JSON")

    rows = [
        json.loads(line, parse_constant=refuse) for line in run_dir.metrics.read_text().splitlines()
    ]
    assert rows == [{"step": 0, "loss": 0.25}, {"step": 1, "loss": None, "grad_norm": None}]


def test_the_summary_is_replaced_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir.create(tmp_path)
    run_dir.write_summary({"status": "running"})

    def dies(*_: object) -> Never:
        raise OSError("the machine stops before the rename")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dies)
        with pytest.raises(OSError, match="before the rename"):
            run_dir.write_summary({"status": "done"})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "running"}
    run_dir.write_summary({"status": "done"})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "done"}
    assert not list(tmp_path.glob("*.partial"))


def test_a_resume_removes_the_batch_that_a_kill_left_unfinished(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path)
    for step in (0, 1, 2):
        run_dir.recorded_step(step).write_bytes(b"whole")
    for step in (1, 3):
        partial_path(run_dir.recorded_step(step)).write_bytes(b"half")
    run_dir.reopen(2)
    assert sorted(path.name for path in run_dir.recorded.iterdir()) == [
        "step_000000.safetensors",
        "step_000001.safetensors",
    ]
