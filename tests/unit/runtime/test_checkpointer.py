"""The checkpointer with an emulated learner and replay buffer: what it writes and what it keeps."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_disk import fill_up, make_room, small_disk

from dapo_async.config import Config, TrainConfig
from dapo_async.runtime.checkpointer import MAX_FAILED, Checkpointer, DiskRefused
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed
from dapo_async.runtime.handles.redo_log import RedoLog
from dapo_async.runtime.handles.restarts import Restarts
from dapo_async.runtime.mirror import Mirror, Uploads
from dapo_async.tracking.disk_faults import DiskFaults, RowFile
from dapo_async.tracking.event_log import ignore_event
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.watch_folder import WatchLease
from dapo_async.utils.checkpoint_dir import STATE

LINES: list[str] = []  # what the newest checkpointer has printed


class Writer:
    """A learner or a replay buffer whose state is its version."""

    def __init__(self, name: str) -> None:
        self._name, self.at = name, 0

    async def version(self) -> int:
        return self.at

    async def save(self, folder: Path) -> None:
        (folder / self._name).write_text(str(self.at))


class Replay(Writer):
    async def checkpointed(self, version: int) -> None:
        pass

    async def capture_state(self, version: int = -1) -> Any:
        return None


class Learner(Writer):
    restarts, redo = Restarts("learner"), RedoLog()

    def saved(self, version: int, state: Path) -> bool:
        assert state.is_dir(), "a restarted learner reads it"
        return True

    async def capture_state(self, version: int = -1) -> Any:
        return self.at


class LostLearner(Learner):
    """It is lost while the first checkpoint is written, and restarted."""

    losses = 1

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.restarts = Restarts("learner")
        self.restarts.keep()

    async def save(self, folder: Path) -> None:
        if self.losses:
            self.losses -= 1
            raise ActorDied("learner", "was restarted after its state was captured")
        await super().save(folder)


class LargeLearner(Learner):
    """Its state has so many KiB; the disk's refusal comes as that of an actor."""

    kib = 20

    async def save(self, folder: Path) -> None:
        try:
            (folder / self._name).write_bytes(bytes(1024 * self.kib))
        except OSError as error:
            raise ActorFailed("learner failed in save") from error


async def _written(version: int) -> None:
    return None


def checkpointer(
    root: Path,
    *,
    keep: int,
    evaluated: int | None,
    learner: Learner | None = None,
    uploads: Uploads | None = None,
) -> tuple[Checkpointer, Learner]:
    LINES.clear()
    learner = learner or Learner("model.safetensors")
    made = Checkpointer(
        replace(Config(), train=TrainConfig(keep_checkpoints=keep)),
        system=SimpleNamespace(  # type: ignore[arg-type]
            learner=learner, replay=Replay("replay.json"), event=ignore_event
        ),
        tracker=SimpleNamespace(  # type: ignore[arg-type]
            clock=SimpleNamespace(now_s=lambda: 0.0),
            checkpoint_pause_s=0.0,
            written=_written,
            rows=RowFile(root / "metrics.jsonl", DiskFaults(LINES.append)),
        ),
        run_dir=RunDir(root),
        driver_state=dict,
        in_evaluation=lambda: evaluated,
        say=LINES.append,
        uploads=uploads,
    )
    return made, learner


async def save_versions(made: Checkpointer, learner: Learner, versions: list[int]) -> None:
    for version in versions:
        learner.at = version
        await made.save(deadline_s=60.0)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_keep_checkpoints_stay(tmp_path: Path, keep: int) -> None:
    made, learner = checkpointer(tmp_path, keep=keep, evaluated=None)
    asyncio.run(save_versions(made, learner, [2, 4, 6, 8]))
    assert made.folder.versions() == [2, 4, 6, 8][-keep:]
    newest = made.folder.path(8)
    assert (newest / "model.safetensors").read_text() == "8"
    assert (newest / STATE / "replay.json").is_file()
    assert made.saved == 4


def test_copies_follow_the_checkpoints_and_none_is_removed_while_it_is_read(tmp_path: Path) -> None:
    read: list[int] = []

    class Slow(Mirror):
        def upload(self, run_dir: RunDir, version: int) -> None:
            time.sleep(0.1)
            assert (run_dir.checkpoints / f"step_{version:06d}" / "model.safetensors").exists()
            super().upload(run_dir, version)
            read.append(version)

    async def train() -> Checkpointer:
        mirror = Slow(f"memory://bucket/{tmp_path.name}")
        uploads = Uploads(mirror, RunDir(tmp_path), first=0, say=LINES.append)
        made, learner = checkpointer(tmp_path, keep=1, evaluated=None, uploads=uploads)
        await save_versions(made, learner, [2, 4, 6, 8])
        await made.finish_copies(deadline_s=60.0)
        assert mirror.versions()[-1] == 8
        return made

    made = asyncio.run(train())
    assert (read[-1], LINES) == (8, [])
    summary = made.summary()
    assert (summary["uploaded"], summary["not_uploaded"]) == (len(read), 0)


def test_an_upload_that_does_not_end_delays_no_step_and_no_checkpoint(tmp_path: Path) -> None:
    free = threading.Event()

    class Stuck(Mirror):
        def upload(self, run_dir: RunDir, version: int) -> None:
            assert free.wait(60.0)
            super().upload(run_dir, version)

    async def train() -> tuple[Checkpointer, list[int]]:
        mirror = Stuck(f"memory://stuck/{tmp_path.name}")
        uploads = Uploads(mirror, RunDir(tmp_path), first=0, say=LINES.append)
        made, learner = checkpointer(tmp_path, keep=2, evaluated=None, uploads=uploads)
        await asyncio.wait_for(save_versions(made, learner, [*range(1, 9)]), 30.0)
        assert (uploads.uploaded, uploads.in_use) == (0, {1, 8})
        kept = made.folder.versions()
        free.set()
        await made.finish_copies(deadline_s=30.0)
        return made, kept

    made, kept = asyncio.run(train())
    assert kept == [1, 7, 8]
    assert (made.saved, made.skipped, made.summary()["uploaded"]) == (8, 0, 2)


def test_a_version_that_is_being_evaluated_stays_however_old(tmp_path: Path) -> None:
    made, learner = checkpointer(tmp_path, keep=1, evaluated=4)
    asyncio.run(save_versions(made, learner, [2, 4, 6, 8]))
    assert made.folder.versions() == [4, 8]


def test_checkpoints_stay_until_a_living_watcher_has_measured_them(tmp_path: Path) -> None:
    made, learner = checkpointer(tmp_path, keep=1, evaluated=None)
    folder = RunDir(tmp_path).watched
    with WatchLease(folder):
        asyncio.run(save_versions(made, learner, [2, 4, 6]))
        assert made.folder.versions() == [2, 4, 6]
        folder.result(2).write_text("{}")
        asyncio.run(save_versions(made, learner, [8]))
        assert made.folder.versions() == [4, 6, 8]
    asyncio.run(save_versions(made, learner, [10]))
    assert made.folder.versions() == [10]


def test_a_full_disk_costs_old_checkpoints_and_the_next_step_tries_again(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=120) as disk:
        made, learner = checkpointer(
            disk, keep=3, evaluated=None, learner=LargeLearner("model.safetensors")
        )

        async def train() -> None:
            await save_versions(made, learner, [2, 4])
            fill_up(disk)
            await started(made, learner, 6)
            assert made.is_late  # the next step tries again, with the space of version 2
            await started(made, learner, 7)

        asyncio.run(train())
        assert made.folder.versions() == [4, 7]
        assert (made.folder.path(7) / "model.safetensors").stat().st_size == 20 * 1024
    assert not made.is_late
    assert (made.saved, made.refused) == (3, 1)
    assert made.summary()["refused"] == 1
    assert LINES == [
        "the checkpoint of version 6 can't be written: no space left on device; 1 older "
        "checkpoints were removed, training goes on, and the run ends after 4 more such failures; "
        "free some space"
    ]


def test_a_disk_that_stays_full_ends_the_run_and_keeps_the_newest_checkpoint(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", kib=100) as disk:
        made, learner = checkpointer(
            disk, keep=3, evaluated=None, learner=LargeLearner("model.safetensors")
        )

        async def train() -> None:
            await save_versions(made, learner, [2])
            fill_up(disk)
            for version in range(3, 2 + MAX_FAILED):
                await started(made, learner, version)
                assert made.is_late == (version == 3)
            with pytest.raises(DiskRefused, match="left on device, 5 times in a row; free "):
                await started(made, learner, 2 + MAX_FAILED)
            assert made.folder.versions() == [2]
            assert not [*made.folder.root.glob("*.partial")]
            make_room(disk)
            learner.at = 8
            await made.save(deadline_s=60.0)  # the end of the run tries once more

        asyncio.run(train())
        assert made.folder.versions() == [2, 8]


async def started(made: Checkpointer, learner: Learner, version: int) -> None:
    """A checkpoint beside the steps, until its write has ended."""
    learner.at = version
    background: list[Any] = []
    made._system.in_background = lambda work, _: background.append(work)  # type: ignore[method-assign, assignment, return-value]
    await made.start(version)
    await background[0]


def test_checkpoint_of_a_learner_that_is_lost_meanwhile_is_postponed(tmp_path: Path) -> None:
    made, learner = checkpointer(tmp_path, keep=1, evaluated=None, learner=LostLearner("weights"))

    async def scenario() -> None:
        learner.at = 2
        await made._write_or_postpone(2, {})
        assert made.is_late, "the next step tries again"
        assert made.folder.versions() == []
        await save_versions(made, learner, [3])

    asyncio.run(scenario())
    assert made.folder.versions() == [3]
    assert LINES == [
        "the checkpoint of version 2 is postponed: learner was restarted after its state was "
        "captured"
    ]
