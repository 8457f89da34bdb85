"""Where a run continues: in whatever folder it is now, with the files that it needs or one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from paths import QUICKSTART
from run_folders import DATA, run_of

from dapo_async import config as knobs
from dapo_async.runtime.preflight import check_inputs
from dapo_async.runtime.resume import (
    START,
    choose_checkpoint,
    find_resume_point,
    resumed_config,
    with_model_at_hand,
)
from dapo_async.runtime.services import measured_before
from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.manifest import MANIFEST, write_manifest


def seal(root: Path) -> None:
    """Writes the manifests of all checkpoints."""
    for path in (root / "checkpoints").iterdir():
        write_manifest(path, path / "state" / MANIFEST)


def flip(path: Path, *, count: int = 1) -> None:
    """Damages bytes in the middle of a file without changing its size."""
    content = bytearray(path.read_bytes())
    start = len(content) // 2
    for place in range(start, min(len(content), start + count)):
        content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "state/learner/part.safetensors"]
)
def test_a_checkpoint_with_flipped_bytes_is_stepped_over_with_one_line(
    name: str, tmp_path: Path
) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    seal(root)
    point = choose_checkpoint(root)
    assert point.version == 4
    assert re.fullmatch(
        r"step_000004 is whole: \d+ files, \d+\.\d MiB, checked in \d+\.\d\d s", point.notes[0]
    )
    damaged = root / "checkpoints" / "step_000004" / name
    flip(damaged, count=64)
    point = choose_checkpoint(root)
    assert point.version == 2
    assert point.notes[0] == (
        f"step_000004 is damaged, so it is not used: {damaged} has other content than was written"
    )
    assert point.notes[1].startswith("step_000002 is whole: ")
    flip(root / "checkpoints" / "step_000002" / "state" / "replay.json")
    with pytest.raises(ValueError, match="other content than was written; copy the checkpoint"):
        choose_checkpoint(root)


def test_a_checkpoint_of_an_earlier_version_is_used_without_a_check_of_its_content(
    tmp_path: Path,
) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    assert choose_checkpoint(root).notes == (
        "step_000004 has no checksums, so the content of its files is not checked",
    )
    (root / "checkpoints" / "step_000004" / "state" / MANIFEST).write_text("{")
    assert choose_checkpoint(root).version == 2


@pytest.mark.parametrize("at", ["step_000002", "2", "checkpoints/step_000002/"])
def test_a_run_can_be_rolled_back_to_an_older_checkpoint(tmp_path: Path, at: str) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    run_dir = RunDir(root)
    for name in ("rollouts", "recorded"):
        (root / name).mkdir()
    for step in range(4):
        run_dir.log_step({"step": step})
        run_dir.recorded_step(step).write_text(f"batch {step}")
        run_dir.list_file(run_dir.recorded_step(step))
    point = choose_checkpoint(root, at=at)
    assert (point.version, point.checkpoint) == (2, root / "checkpoints" / "step_000002")
    aside = run_dir.reopen(point.version)
    assert [path.name for path in aside] == ["aside1.step_000004"]
    assert [row["step"] for row in run_dir.rows()] == [0, 1]
    assert [*run_dir.listed_files()] == [
        f"recorded/step_00000{step}.safetensors" for step in (0, 1)
    ]
    assert choose_checkpoint(root).version == 2
    shutil.copytree(aside[0], root / "checkpoints" / "step_000004")  # the run came there again
    assert [path.name for path in run_dir.reopen(2)] == ["aside2.step_000004"]


def test_a_run_can_be_rolled_back_to_its_best_checkpoint(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    with pytest.raises(ValueError, match=r"--from best: no checkpoint in .* was evaluated"):
        choose_checkpoint(root, at="best")
    for version, accuracy in ((2, 0.9), (3, 1.0), (4, 0.4)):  # 3 has no checkpoint
        RunDir(root).log_evaluation({"version": version, "accuracy": accuracy}, accuracies={})
    assert choose_checkpoint(root, at="best").version == 2


def test_a_checkpoint_that_is_not_there_is_one_line_with_those_that_are(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    with pytest.raises(ValueError, match=r"--from step_3 .* there: step_000002, step_000004$"):
        choose_checkpoint(root, at="step_3")


def test_resume_with_other_data_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "11", "answer": "2"}\n')
    root = run_of(tmp_path / "run", tmp_path / "base", versions=(2,))
    config = knobs.load(QUICKSTART, [f"data.train={data}"])
    (root / "config.yaml").write_text(knobs.to_yaml(config))
    began_with = check_inputs(config).fingerprint
    driver = root / "checkpoints" / "step_000002" / "state" / "driver.json"
    driver.write_text(json.dumps({"version": 2, "train_data": began_with}))
    assert find_resume_point(resumed_config(root, []), train_data=began_with).version == 2
    data.write_text('{"prompt": "12", "answer": "4"}\n')
    other = check_inputs(config).fingerprint
    with pytest.raises(ValueError, match="does not give the prompts that this run began with"):
        find_resume_point(resumed_config(root, []), train_data=other)


def test_a_moved_run_is_found_where_it_is_now(tmp_path: Path) -> None:
    root = run_of(tmp_path / "runs" / "first", tmp_path / "base")
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    config = resumed_config(moved, [])
    assert config.run_dir == str(moved)
    point = find_resume_point(config, train_data=DATA)
    assert (point.version, point.checkpoint) == (4, moved / "checkpoints" / "step_000004")
    assert point.state == moved / "checkpoints" / "step_000004" / "state"


def test_the_newest_checkpoint_stands_in_for_a_base_model_that_is_gone(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    config = resumed_config(root, [])
    checkpoint = choose_checkpoint(root).checkpoint
    assert with_model_at_hand(config, checkpoint) == config
    shutil.rmtree(tmp_path / "base")
    assert resumed_config(root, []) == config
    assert with_model_at_hand(config, checkpoint).model.path == str(checkpoint)
    assert with_model_at_hand(config, None) == config  # before the first checkpoint it is needed


def test_a_run_folder_names_its_files_from_itself_and_other_files_in_full(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    assert run_dir.relative(run_dir.checkpoints / "step_000002") == "checkpoints/step_000002"
    assert run_dir.relative(tmp_path / "base") == str(tmp_path / "base")


def test_data_and_base_model_may_lie_elsewhere_if_they_are_the_same(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "model")
    data = shutil.copy(QUICKSTART.parent / "data" / "quickstart" / "train.jsonl", tmp_path)
    config = resumed_config(root, [f"model.path={tmp_path}/model", f"data.train={data}"])
    assert (config.model.path, config.data.train) == (str(tmp_path / "model"), str(data))
    with pytest.raises(ValueError, match="does not give the prompts that this run began with"):
        find_resume_point(config, train_data="another")
    generation = tmp_path / "model" / "generation_config.json"
    generation.write_text('{"eos_token_id": [12, 3]}')
    with pytest.raises(ValueError, match="its stop tokens differ from those of"):
        resumed_config(root, [f"model.path={tmp_path}/model"])
    generation.unlink()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json differs from .*step_000004/tokenizer"):
        resumed_config(root, [f"model.path={tmp_path}/model"])


def test_a_resumed_run_is_evaluated_on_the_same_prompts(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    config = resumed_config(root, [])
    assert find_resume_point(config, train_data=DATA, heldout_data="beef").version == 4
    path = root / "checkpoints" / "step_000004" / "state" / "driver.json"
    driver = json.loads(path.read_text()) | {"heldout_data": "beef"}
    path.write_text(json.dumps(driver))
    assert find_resume_point(config, train_data=DATA, heldout_data="beef").version == 4
    assert find_resume_point(config, train_data=DATA).version == 4  # not loaded
    with pytest.raises(ValueError, match="does not give the prompts that this run was evaluated"):
        find_resume_point(config, train_data=DATA, heldout_data="another")


def test_without_a_checkpoint_the_base_model_may_not_change(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base", versions=())
    shutil.copytree(tmp_path / "base", tmp_path / "model")
    with pytest.raises(ValueError, match="no copy to compare it with; start a new run"):
        resumed_config(root, [f"model.path={tmp_path}/model"])


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), ("{", "Expecting"), ("[]", "list"), ("{}", "train_data is missing")],
)
def test_a_broken_driver_state_is_named_with_the_remedy(
    content: str | None, why: str, tmp_path: Path
) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    path = root / "checkpoints" / "step_000004" / "state" / "driver.json"
    if content is None:
        shutil.rmtree(path.parent)
    else:
        path.write_text(content)
    point = find_resume_point(resumed_config(root, []), train_data=DATA)
    assert point.version == 2  # the damaged one is stepped over
    line = f"step_000004 is damaged, so it is not used: {path} can't be read "
    assert point.notes[0].startswith(line)
    shutil.rmtree(root / "checkpoints" / "step_000002")
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(path))} can't be read .*{why}"
    ) as raised:
        find_resume_point(resumed_config(root, []), train_data=DATA)
    assert "to resume from the one before" in str(raised.value)


def test_a_resume_point_has_the_counts_of_its_checkpoint(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base")
    point = find_resume_point(resumed_config(root, []), train_data=DATA)
    counts = point.counts
    assert (counts.admitted, counts.trained, counts.evicted, counts.in_flight) == (9, 4, 1, 2)
    assert counts.flat()["rejected.all_wrong"] == 2
    counts.check()
    before = measured_before(point)
    assert before.counts == counts.flat()
    assert before.failures == {"rollout-0": 1}
    assert measured_before(START).counts["admitted"] == 0


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("replay.json", None, "no such file"),
        ("replay.json", "{", "not JSON"),
        ("replay.json", "{}", "has no ended"),
        ("replay.json", "[]", "JSON of another form"),
        ("groups.safetensors", None, "no such file"),
        ("learner", None, "no such file"),
        ("learner/learner.json", None, "no such file"),
        ("learner/learner.json", "{", "not JSON"),
        ("learner/learner.json", "{}", "has no files"),
        ("learner/part.safetensors", None, "is missing"),
        ("learner/part.safetensors", "half a part", "has 11 bytes"),
    ],
)
def test_a_missing_part_of_a_checkpoint_is_named_before_anything_starts(
    name: str, content: str | None, why: str, tmp_path: Path
) -> None:
    root = run_of(tmp_path / "run", tmp_path / "base", versions=(4,))
    state = root / "checkpoints" / "step_000004" / "state"
    if content is not None:
        (state / name).write_text(content)
    elif (state / name).is_dir():
        shutil.rmtree(state / name)
    else:
        (state / name).unlink()
    with pytest.raises(ValueError, match=why) as caught:
        find_resume_point(resumed_config(root, []), train_data=DATA)
    line = str(caught.value)
    assert str(state / name) in line
    assert "copy the checkpoint whole" in line
    assert "\n" not in line
