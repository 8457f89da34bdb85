"""`train.resume=auto`: one command starts a run, continues it, and ends when it is complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from paths import QUICKSTART
from run_folders import run_of

from dapo_async import config as knobs
from dapo_async.cli.arguments import Parser, parse
from dapo_async.cli.main import main
from dapo_async.cli.train import _begin, add_arguments
from dapo_async.config import Config
from dapo_async.runtime.mirror import Mirror
from dapo_async.runtime.resume import START, ResumePoint, complete_line, continued_config
from dapo_async.runtime.run_keeper import RESTARTED
from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.manifest import MANIFEST, write_manifest

TRAIN = ("train", str(QUICKSTART), "train.resume=auto")


def begin(*words: str) -> tuple[Config, Path, ResumePoint | None]:
    """What a dry run of `train` would do. It locks nothing."""
    parser = Parser(prog="dapo-async train", allow_abbrev=False)
    add_arguments(parser)
    return _begin(parse(parser, [str(QUICKSTART), "train.resume=auto", *words, "--dry-run"]))


def complete_run(root: Path, base: Path) -> Path:
    run_of(root, base)
    (root / "summary.json").write_text(json.dumps({"status": "done", "steps": 4}))
    return root


def test_a_folder_without_a_run_is_a_new_run(tmp_path: Path) -> None:
    for root in (tmp_path / "missing", tmp_path):
        config, chosen, point = begin(f"run_dir={root}")
        assert (chosen, point, config.train.resume) == (root, None, "auto")


def test_a_run_with_a_checkpoint_continues_there_with_the_given_config(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    words = (f"run_dir={root}", f"model.path={tmp_path}/base", "rollout.num_workers=3")
    config, chosen, point = begin(*words)
    assert chosen == root
    assert point is not None
    assert (point.version, config.rollout.num_workers, config.run_dir) == (4, 3, str(root))


def test_the_newer_one_of_run_directory_and_mirror_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    ahead = run_of(tmp_path / "there" / "run", base)
    for version in (2, 4):
        path = ahead / "checkpoints" / f"step_{version:06d}"
        write_manifest(path, path / "state" / MANIFEST)
    url = "memory://auto/runs"
    Mirror(f"{url}/run").upload(RunDir(ahead), 4)
    root = tmp_path / "here" / "run"
    shutil.copytree(ahead, root)
    shutil.rmtree(root / "checkpoints" / "step_000004")
    words = (f"run_dir={root}", f"model.path={base}", f"train.checkpoint_mirror={url}")
    _, _, point = begin(*words)  # a dry run downloads nothing
    assert point is not None
    assert point.version == 2
    would = f"would download step_000004 of {url}/run to {root}, which has step_000002\n"
    assert capsys.readouterr().out == would
    assert main([*TRAIN, *words, "train.num_steps=4"]) == 0
    out = capsys.readouterr().out
    assert "; this machine has step_000002\nthe run in " in out
    assert "all 4 steps" in out


def test_a_run_without_a_checkpoint_starts_again_with_any_config(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base", versions=())
    config, _, point = begin(f"run_dir={root}", "learner.lr=0.5")
    assert (point, config.learner.lr) == (START, 0.5)


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    words = (f"run_dir={root}", f"model.path={tmp_path}/base", "learner.lr=0.5")
    with pytest.raises(ValueError, match=r"^learner\.lr can't change from 0\.0003 to 0\.5 when"):
        begin(*words)


def test_a_copy_of_the_base_model_is_the_same_model(tmp_path: Path) -> None:
    # Each job has its own copy of the working directory.
    root = run_of(tmp_path / "run", tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    config, _, _ = begin(f"run_dir={root}", f"model.path={tmp_path}/copy")
    assert config.model.path == f"{tmp_path}/copy"
    (tmp_path / "copy" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.path can't change to .*config\.json differs"):
        begin(f"run_dir={root}", f"model.path={tmp_path}/copy")


def test_a_model_of_the_hub_keeps_the_revision_of_the_run(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    pinned, given = "hub:owner/name@0123abc", "hub:owner/name"
    saved = knobs.load(QUICKSTART, [f"model.path={pinned}"], files=False)
    (root / "config.yaml").write_text(knobs.to_yaml(saved))
    checkpoint = root / "checkpoints" / "step_000004"
    config = knobs.load(QUICKSTART, [f"model.path={given}"], files=False)
    assert continued_config(root, config, checkpoint=checkpoint).model.path == pinned
    other = knobs.load(QUICKSTART, [f"model.path={given}@ffff"], files=False)
    with pytest.raises(ValueError, match=r"model\.path .* must be a folder"):
        continued_config(root, other, checkpoint=checkpoint)


def test_a_complete_run_ends_with_exit_code_0_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = complete_run(tmp_path / "run", tmp_path / "base")
    given = (f"run_dir={root}", f"model.path={tmp_path}/base", "train.num_steps=4")
    line = f"the run in {root} is complete: all 4 steps (train.num_steps) are trained\n"
    assert main([*TRAIN, *given]) == 0
    assert capsys.readouterr().out == line
    assert main([*TRAIN, *given, "--dry-run"]) == 0
    assert capsys.readouterr().out == line


def test_resume_of_a_complete_run_follows_the_knob(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = complete_run(tmp_path / "run", tmp_path / "base")
    assert main(["train", "--resume", str(root), "train.num_steps=4", "train.resume=auto"]) == 0
    assert "is complete" in capsys.readouterr().out


def test_a_run_whose_driver_died_after_the_last_step_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, kept = (
        complete_run(tmp_path / name, tmp_path / f"base of {name}") for name in ("asked", "kept")
    )
    # Whoever asks for more steps has to say how many.
    assert main(["train", "--resume", str(asked), "train.num_steps=4"]) == 2
    monkeypatch.setenv(RESTARTED, "1")
    assert main(["train", "--resume", str(kept), "train.num_steps=4"]) == 0
    assert "is complete" in capsys.readouterr().out


def test_a_solved_run_is_complete_until_it_is_rolled_back(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    solved = {"status": "solved", "steps": 4, "reason": "every group is all correct"}
    (root / "summary.json").write_text(json.dumps(solved))
    config = knobs.load(root / "config.yaml", files=False)
    newest, older = (ResumePoint(root, version, {}) for version in (4, 2))
    assert complete_line(root, config, newest) == (
        f"the run in {root} is complete: every group is all correct"
    )
    assert complete_line(root, config, older) is None
    assert complete_line(tmp_path / "new", config, START) is None


def test_a_run_directory_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TRAIN) == 2
    assert "train.resume=auto needs a fixed run_dir, " in capsys.readouterr().err


def test_a_run_that_still_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    RunDir(root).lock()
    assert main([*TRAIN, f"run_dir={root}"]) == 2
    assert "is still running in another process" in capsys.readouterr().err


def test_empty_folders_of_a_start_that_was_killed_are_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    RunDir.create(root)
    # It goes on to the check of its input.
    assert main([*TRAIN, f"run_dir={root}", "data.prompt_key=problem"]) == 2
    assert "data.prompt_key" in capsys.readouterr().err
    assert list(root.iterdir()) == []
