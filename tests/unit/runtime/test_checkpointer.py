"""The checkpointer with an emulated learner and replay buffer: what it writes and what it keeps."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_async.config import Config, TrainConfig
from dapo_async.runtime.checkpointer import Checkpointer
from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.checkpoint_dir import STATE


class Writer:
    """A learner or a replay buffer whose state is its version."""

    def __init__(self, name: str) -> None:
        self._name, self.at = name, 0

    async def version(self) -> int:
        return self.at

    async def save(self, folder: Path) -> None:
        (folder / self._name).write_text(str(self.at))


class Replay(Writer):
    async def capture_state(self, version: int = -1) -> Any:
        return None


class Learner(Writer):
    async def capture_state(self, version: int = -1) -> Any:
        return self.at


async def _written(version: int) -> None:
    return None


def checkpointer(root: Path, *, keep: int, evaluated: int | None) -> tuple[Checkpointer, Learner]:
    learner = Learner("model.safetensors")
    made = Checkpointer(
        replace(Config(), train=TrainConfig(keep_checkpoints=keep)),
        system=SimpleNamespace(learner=learner, replay=Replay("replay.json")),  # type: ignore[arg-type]
        tracker=SimpleNamespace(  # type: ignore[arg-type]
            clock=SimpleNamespace(now_s=lambda: 0.0), checkpoint_pause_s=0.0, written=_written
        ),
        run_dir=RunDir(root),
        driver_state=dict,
        in_evaluation=lambda: evaluated,
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


def test_a_version_that_is_being_evaluated_stays_however_old(tmp_path: Path) -> None:
    made, learner = checkpointer(tmp_path, keep=1, evaluated=4)
    asyncio.run(save_versions(made, learner, [2, 4, 6, 8]))
    assert made.folder.versions() == [4, 8]
