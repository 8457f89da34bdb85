"""The start and the end of a run, with fakes in place of Ray: every part of the end is tried."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dapo_async.config import Config, TrackingConfig
from dapo_async.runtime.cluster.connection import RayConnection
from dapo_async.runtime.resume import START
from dapo_async.runtime.run import Run
from dapo_async.runtime.status import RunOutcome, Status
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.sinks import Sinks
from dapo_async.tracking.terminal import Outlet, Progress


class NoRay(RayConnection):
    """A Ray whose start fails."""

    def __init__(self, error: Exception) -> None:
        self.error, self.closed = error, 0

    async def open(self) -> str:
        raise self.error

    async def close(self) -> None:
        self.closed += 1


class Lines(Progress):
    def __init__(self) -> None:
        with open("/dev/null", "w") as null:
            super().__init__(Outlet(null), num_steps=1, max_staleness=0)
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def ended(root: Path, ray: NoRay, lines: Lines, **more: Any) -> tuple[RunOutcome, dict[str, Any]]:
    """Outcome and summary of a run."""
    config = replace(Config(), tracking=TrackingConfig(mlflow=None))
    run_dir = RunDir.create(root)
    run = Run(
        config,
        run_dir,
        Sinks(config, run_dir, lines),
        resume=START,
        train_data="",
        heldout_data="",
        ray=ray,
        **more,
    )
    return asyncio.run(run.live()), json.loads(run_dir.summary.read_text())


def test_picture_that_cannot_be_drawn_changes_no_outcome(tmp_path: Path) -> None:
    def draw(_: RunDir) -> bool:
        raise AttributeError("partially initialized module 'IPython'\nhas no 'version_info'")

    ray, lines = NoRay(OSError("no Ray today")), Lines()
    outcome, summary = ended(tmp_path / "run", ray, lines, draw=draw)
    assert (outcome.status, outcome.exit_code) == (Status.FAILED, 1)
    assert ray.closed == 1
    assert [line for line in lines.said if "picture" in line] == [
        "the run ends without the picture: "
        "partially initialized module 'IPython' has no 'version_info'"
    ]
    assert summary["caught"] == {"OSError": 1, "the picture": 1}
    assert summary["reason"] == "no Ray today"
