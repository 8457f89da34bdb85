"""`dapo-async verify`: what it finds in a run directory that was damaged in each of its parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import QUICKSTART
from replay_world import make_group

from dapo_async.cli.main import main
from dapo_async.config import load, to_yaml
from dapo_async.replay import BufferState
from dapo_async.replay.group_io import write_groups
from dapo_async.replay.state import Buffered
from dapo_async.runtime.actors.replay_files import write_state
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.samples import write_rollouts
from dapo_async.utils.checkpoint_dir import STATE, CheckpointFolder

REPLAY = BufferState(
    version=2,
    next_step=2,
    admitted=5,
    ended={"trained": 2, "all_wrong": 1},
    failures={},
    streak={},
    acceptance={},
    reissue=(3,),
    buffered={4: Buffered("rollout-0", 2, 0, SimpleNamespace(group=make_group(4)), 3)},
)


def whole_run(root: Path) -> RunDir:
    """Two steps of one group each, all recorded, and a checkpoint."""
    run_dir = RunDir.create(root)
    run_dir.config.write_text(to_yaml(load(QUICKSTART)))
    for step in range(2):
        run_dir.log_step({"step": step})
        groups = [make_group(step)]
        run_dir.list_file(write_rollouts(run_dir.rollouts, step=step, groups=groups))
        write_groups(run_dir.recorded_step(step), groups)
        run_dir.list_file(run_dir.recorded_step(step))
    folder = CheckpointFolder(run_dir.checkpoints)
    partial = folder.begin(2)
    (partial / "model.safetensors").write_bytes(bytes(1000))
    write_state(partial / STATE, REPLAY)
    folder.seal(2)
    folder.commit(2)
    return run_dir


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_admissions(root: Path) -> None:
    """A group that is open twice, in a checkpoint whose manifest is written after that."""
    checkpoint = root / "checkpoints" / "step_000002"
    state = json.loads((checkpoint / STATE / "replay.json").read_text())
    state["reissue"] = [4]
    (checkpoint / STATE / "replay.json").write_text(json.dumps(state))
    checkpoint.rename(checkpoint.with_name("step_000002.partial"))
    CheckpointFolder(root / "checkpoints").seal(2)
    CheckpointFolder(root / "checkpoints").commit(2)


def train_twice(root: Path) -> None:
    run_dir = RunDir(root)
    run_dir.list_file(write_rollouts(run_dir.rollouts, step=1, groups=[make_group(0)]))


def test_a_whole_run_is_said_to_be_whole_part_by_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = whole_run(tmp_path / "run")
    assert main(["verify", str(run_dir.root)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "step_000002: whole, 3 files, 0.0 MiB",
        "step_000002: admissions: 5, of them 3 ended once, 2 open",
        "rollouts: 2 files whole",
        "recorded: 2 files whole",
        "metrics.jsonl: 2 steps, a row for each",
        "rollouts: 2 groups, each in one step",
        "everything is whole",
    ]


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (
            lambda root: flip(root / "checkpoints" / "step_000002" / "model.safetensors"),
            "step_000002/model.safetensors has other content than was written",
        ),
        (
            lambda root: (
                root / "checkpoints" / "step_000002" / STATE / "manifest.json"
            ).write_text("{"),
            "manifest.json can't be read (it is not JSON)",
        ),
        (edit_admissions, "admissions: a group is open twice"),
        (
            lambda root: flip(root / "recorded" / "step_000001.safetensors"),
            "recorded/step_000001.safetensors has other content than was written",
        ),
        (
            lambda root: (root / "rollouts" / "step_000000.jsonl").unlink(),
            "rollouts/step_000000.jsonl can't be read (no such file or directory)",
        ),
        (
            lambda root: (root / "metrics.jsonl").write_text('{"step": 0}\n{"step": 2}\n'),
            "metrics.jsonl: row 2 has step 2, must have step 1",
        ),
        (
            lambda root: (root / "metrics.jsonl").write_text('{"step": 0}\n{"st'),
            "metrics.jsonl: row 2 can't be read (it is not JSON)",
        ),
        (train_twice, "group 0 was trained twice: step_000000.jsonl and step_000001.jsonl"),
    ],
)
def test_each_damage_is_named_and_makes_the_exit_code_1(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], object],
    found: str,
) -> None:
    run_dir = whole_run(tmp_path / "run")
    harm(run_dir.root)
    assert main(["verify", str(run_dir.root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("DAMAGED")]
    assert found in line
    assert lines[-1] == "1 damaged"


def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no config.yaml, so it is no run directory" in capsys.readouterr().err


def test_a_recorded_batch_with_other_content_is_not_rerun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = whole_run(tmp_path / "run")
    flip(run_dir.recorded_step(0))
    assert main(["rerun", str(run_dir.root)]) == 2
    assert "other content than was written; copy the recorded batches" in capsys.readouterr().err
