"""Resume, on files: a checkpoint appears whole or not at all, whenever its writer is killed.

Which checkpoints are kept, and groups that are read back bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_world import TINY_JSON, VERSION, rank_of, synthetic_groups, tiny_decoder
from replay_world import make_buffer, make_group
from safetensors.torch import load_file, save_file
from small_disk import fill_up, small_disk
from torch.distributed.checkpoint import CheckpointException

from dapo_async.learner import read_whole_state, save_state
from dapo_async.model import Mesh, export_folder
from dapo_async.replay import BufferState, ReplayBuffer
from dapo_async.replay.group_io import pack_group, read_groups, unpack_group, write_groups
from dapo_async.tracking.run_dir import RunDir
from dapo_async.types import Group
from dapo_async.utils.checkpoint_dir import STATE, CheckpointFolder
from dapo_async.utils.files import disk_fault
from dapo_async.utils.manifest import MANIFEST, FileCheck, write_manifest

FILE_EVENTS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.unlink",
    "shutil.rmtree",
    "os.truncate",
    "os.replace",
}


def write_checkpoint(folder: CheckpointFolder, version: int, *, keep: int = 1) -> None:
    """What a run writes, with other contents for each version."""
    partial = folder.begin(version)
    (partial / "config.json").write_text(json.dumps({"version": version}))
    save_file({"weights": torch.full((64,), float(version))}, partial / "model.safetensors")
    write_groups(partial / STATE / "groups.safetensors", [make_group(version)])
    (partial / STATE / "driver.json").write_text(json.dumps({"version": version}))
    folder.commit(version)
    folder.prune(keep=keep)


def check_usable(folder: CheckpointFolder) -> int:
    """The newest checkpoint, whole: its version."""
    assert folder.newest is not None, "no checkpoint is left"
    version = folder.versions()[-1]
    assert json.loads((folder.newest / "config.json").read_text()) == {"version": version}
    assert (load_file(folder.newest / "model.safetensors")["weights"] == version).all()
    assert [
        group.group_id for group in read_groups(folder.newest / STATE / "groups.safetensors")
    ] == [version]
    assert json.loads((folder.newest / STATE / "driver.json").read_text()) == {"version": version}
    return version


def killed_at(operation: int, root: Path, work: Callable[[], None]) -> bool:
    """Runs `work` in a child that dies before its file operation number `operation` below `root`;
    False when it came to its end."""
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in FILE_EVENTS and str(arguments[0]).startswith(str(root)):
                seen += 1
                if seen == operation:
                    os._exit(9)

        sys.addaudithook(watch)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def kill_at_every_operation(
    root: Path, work: Callable[[], None], prepare: Callable[[], None]
) -> list[int]:
    """The newest version after each kill, and after the whole work."""
    found = []
    for operation in range(1, 1000):
        prepare()
        killed = killed_at(operation, root, work)
        found.append(check_usable(CheckpointFolder(root)))
        if not killed:
            return found
    raise AssertionError("the work never came to its end")


@pytest.mark.slow
def test_kill_at_any_file_operation_leaves_the_old_or_the_new_checkpoint_whole(
    tmp_path: Path,
) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.root.mkdir()

    def prepare() -> None:
        for version in folder.versions():
            if version > 10:
                folder.prune(keep=1, spare=[10])
                folder.path(version).rename(folder.path(version).with_name("step_000011.removed"))
        if folder.versions() != [10]:
            write_checkpoint(folder, 10)

    # What one kill leaves behind, the next life has to cope with: nothing is cleared in between.
    found = kill_at_every_operation(folder.root, lambda: write_checkpoint(folder, 11), prepare)
    assert set(found) == {10, 11}
    assert found == sorted(found)  # old until the rename, new from there on
    assert len(found) > 15, f"only {len(found)} file operations were seen"
    assert folder.versions() == [11]
    write_checkpoint(folder, 12)
    assert sorted(path.name for path in folder.root.iterdir()) == ["step_000012"]


def test_the_search_for_torn_checkpoints_notices_one_that_is_written_in_place(
    tmp_path: Path,
) -> None:
    folder = CheckpointFolder(tmp_path)
    write_checkpoint(folder, 10)

    def in_place() -> None:
        (folder.path(11) / STATE).mkdir(parents=True)
        (folder.path(11) / "config.json").write_text(json.dumps({"version": 11}))

    with pytest.raises(FileNotFoundError):
        kill_at_every_operation(tmp_path, in_place, prepare=lambda: None)


def test_the_newest_are_kept_and_the_best_by_evaluation(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path / "run")
    folder = CheckpointFolder(run_dir.checkpoints)
    assert run_dir.best_version([]) is None
    for version, accuracy in ((2, 0.5), (4, 0.9), (6, 0.9), (8, 0.7), (10, 0.6)):
        with run_dir.evaluations.open("a") as file:
            file.write(json.dumps({"version": version, "accuracy": accuracy}) + "\n")
        write_checkpoint(folder, version, keep=100)
        best = run_dir.best_version(folder.versions())
        assert best is not None
        folder.prune(keep=2, spare=[best])
    assert folder.versions() == [6, 8, 10]  # 6 is as good as 4 and later
    assert run_dir.best_version([8, 10]) == 8


def through_a_file(groups: Sequence[Group], folder: Path) -> list[Group]:
    write_groups(folder / "groups.safetensors", groups)
    return read_groups(folder / "groups.safetensors")


def through_bytes(groups: Sequence[Group], folder: Path) -> list[Group]:
    packed = [pack_group(group) for group in groups]
    ends = np.cumsum([len(data) for data in packed])
    joined = np.concatenate(packed)
    return [
        unpack_group(joined[end - len(data) : end]) for end, data in zip(ends, packed, strict=True)
    ]


@pytest.mark.parametrize("copied", [through_a_file, through_bytes])
def test_groups_come_back_from_a_file_and_from_bytes_bit_for_bit(
    tmp_path: Path, copied: Callable[[Sequence[Group], Path], list[Group]]
) -> None:
    groups = [
        replace(group, prompt=replace(group.prompt, text="Zahl \u2028 ∑", answer='"'))
        for group in synthetic_groups()
    ]
    empty = make_group(99, num_tokens=0)
    back = copied([*groups, empty], tmp_path)
    nothing: Any = None
    for group, copy in zip([*groups, empty], back, strict=True):
        assert repr(replace(copy, prompt=nothing, rollouts=())) == repr(
            replace(group, prompt=nothing, rollouts=())
        )
        assert (copy.prompt.token_ids == group.prompt.token_ids).all()
        assert (copy.prompt.row, copy.prompt.text, copy.prompt.answer) == (
            group.prompt.row,
            group.prompt.text,
            group.prompt.answer,
        )
        for rollout, twin in zip(group.rollouts, copy.rollouts, strict=True):
            assert repr(replace(twin, completion=nothing)) == repr(
                replace(rollout, completion=nothing)
            )
            for name in ("token_ids", "behaviour_logprobs", "weight_versions"):
                ours, theirs = getattr(rollout.completion, name), getattr(twin.completion, name)
                assert ours.dtype == theirs.dtype
                assert theirs.flags.aligned
                assert np.array_equal(ours, theirs), name
    write_groups(tmp_path / "none.safetensors", [])
    assert read_groups(tmp_path / "none.safetensors") == []


def test_versions_of_tokens_take_room_by_runs_and_come_back() -> None:
    runs = ((7, 40), (8, 50), (8, 10), (6, 30), (7, 1))  # over the edges of the responses, too
    versions = np.concatenate([np.full(count, version, np.int32) for version, count in runs])
    group = make_group(3, num_tokens=len(versions))
    rollouts = tuple(
        replace(each, completion=replace(each.completion, weight_versions=np.roll(versions, by)))
        for by, each in enumerate(group.rollouts)
    )
    packed = pack_group(replace(group, rollouts=rollouts))
    for before, after in zip(rollouts, unpack_group(packed).rollouts, strict=True):
        assert (after.completion.weight_versions == before.completion.weight_versions).all()
    tokens = len(versions) * len(rollouts)
    extra = len(packed) - len(pack_group(make_group(3, num_tokens=len(versions))))
    assert 0 < extra < tokens / 2, "each token takes its version again"


@pytest.mark.slow
def test_rank_that_loads_a_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    groups, rank = synthetic_groups(), rank_of(num_minibatches=2)
    rank.step(groups)
    save_state(rank.capture_state(), tmp_path / "learner", Mesh())
    other = rank_of(num_minibatches=2)
    other.load(tmp_path / "learner")
    assert other.version == rank.version
    assert rank.step(groups) == other.step(groups)
    whole = {name: part.tensor for name, part in rank.capture_state().parts.items()}
    assert len(whole) == 3 * len(rank.decoder.state_dict())
    for name, tensor in whole.items():
        assert torch.equal(tensor, other.capture_state().parts[name].tensor), name
    fresh = rank_of(
        num_minibatches=2, version=rank.version - 1
    )  # without the optimizer's memory the step is another one
    with torch.no_grad():
        for (name, parameter), _ in zip(
            fresh.decoder.named_parameters(), tiny_decoder().parameters(), strict=True
        ):
            parameter.copy_(read_whole_state(tmp_path / "learner")[f"weights.{name}"])
    fresh.step(groups)
    assert any(
        not torch.equal(tensor, fresh.capture_state().parts[name].tensor)
        for name, tensor in whole.items()
    )


def test_a_rank_in_the_midst_of_a_step_gives_no_state() -> None:
    groups, rank = synthetic_groups(), rank_of(num_minibatches=2)
    rank.minibatch(groups[:2], more=True)
    with pytest.raises(AssertionError, match="step 3 is open after 1 updates"):
        rank.capture_state()
    rank.end_step()
    assert rank.capture_state().version == VERSION + 1


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_state_of_which_a_file_is_not_whole_is_refused_by_name(harm: str, tmp_path: Path) -> None:
    rank = rank_of()
    save_state(rank.capture_state(), tmp_path, Mesh())
    (file,) = tmp_path.glob("*.safetensors")
    file.unlink() if harm == "missing" else file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(
        ValueError, match=f"{re.escape(str(file))} .*copy the checkpoint whole, or take another one"
    ):
        rank.load(tmp_path)


def test_a_rank_compares_what_it_reads_with_its_checksums(tmp_path: Path) -> None:
    rank, state = rank_of(), tmp_path / "step_000003" / "state"
    save_state(rank.capture_state(), state / "learner", Mesh())
    (state / "replay.json").write_text("of no rank")
    write_manifest(state.parent, state / MANIFEST)
    check = FileCheck(state.parent, state / MANIFEST)
    (state / "replay.json").write_text("not read, so not compared")
    rank.load(state / "learner", check=check)
    assert check.line.startswith("step_000003: 2 files, ")
    (file,) = (state / "learner").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    weights = rank.capture_state()
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} has other content than was"):
        rank.load(state / "learner", check=FileCheck(state.parent, state / MANIFEST))
    for name, part in rank.capture_state().parts.items():
        assert torch.equal(part.tensor, weights.parts[name].tensor), name
    file.with_name("more.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"more\.safetensors is not in"):
        FileCheck(state.parent, state / MANIFEST)([file.with_name("more.safetensors")])
    (state / MANIFEST).unlink()
    unchecked = FileCheck(state.parent, state / MANIFEST)
    assert unchecked.line == "step_000003 has no checksums, so its files are not checked"


def test_each_writer_of_a_checkpoint_names_a_full_disk_as_such(tmp_path: Path) -> None:
    rank = rank_of()
    state = rank.capture_state()
    shapes = {name: tuple(each.shape) for name, each in rank.decoder.named_parameters()}
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(TINY_JSON))

    def export(folder: Path) -> None:
        whole = dict(rank.decoder.named_parameters())
        export_folder(
            shapes,
            lambda names: {name: whole[name].detach() for name in names},
            dtype=torch.float32,
            base=base,
            out=folder,
        )

    writers: dict[str, Callable[[Path], object]] = {
        "learner": lambda folder: save_state(state, folder / "learner", Mesh()),
        "export": export,
        "groups": lambda folder: write_groups(folder / "groups", [make_group(0, num_tokens=9999)]),
        "manifest": lambda folder: write_manifest(tmp_path / "base", folder / "manifest"),
    }
    with small_disk(tmp_path / "disk", kib=16) as disk:
        for name, write in writers.items():
            if name == "export":  # the learner's state does not fit into 16 KiB
                fill_up(disk)
            with pytest.raises(Exception) as caught:
                write(disk)
            assert disk_fault(caught.value) == "no space left on device", (name, caught.value)
            # Its text would contain that of its cause, and so on without end.
            assert not isinstance(caught.value.__cause__, CheckpointException), name


def test_state_that_lost_a_group_is_refused() -> None:
    buffer = make_buffer(groups_per_step=2)
    buffer.serve(0)
    buffer.admit("worker-0")
    buffer.admit("worker-0")
    state = buffer.snapshot(0)
    assert state.reissue == (0, 1)
    with pytest.raises(AssertionError, match="conservation broken"):
        ReplayBuffer.from_snapshot(
            replace(state, reissue=(0,)),
            groups_per_step=2,
            max_staleness=0,
            num_steps=4,
            filters=(),
            max_rejected_in_a_row=10,
            incarnation="life-1",
        )
    assert BufferState.from_json(json.loads(json.dumps(state.to_json())), {}) == state
