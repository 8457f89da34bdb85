"""The start and the end of a run, with fakes in place of Ray: every part of the end is tried."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_async.algorithm.guards import RunGuards
from dapo_async.config import Config, TrackingConfig, TrainConfig
from dapo_async.replay import Counts
from dapo_async.runtime.cluster.connection import RayConnection
from dapo_async.runtime.resume import START, ResumePoint
from dapo_async.runtime.run import Run
from dapo_async.runtime.status import RunOutcome, Status
from dapo_async.runtime.step_metrics import Totals
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


def run_of(
    run_dir: RunDir,
    ray: RayConnection,
    lines: Lines,
    *,
    config: Config | None = None,
    resume: ResumePoint = START,
    **more: Any,
) -> Run:
    config = replace(config or Config(), tracking=TrackingConfig(sinks="none"))
    return Run(
        config,
        run_dir,
        Sinks(config, run_dir, lines),
        resume=resume,
        train_data="",
        heldout_data="",
        ray=ray,
        **more,
    )


def ended(root: Path, ray: NoRay, lines: Lines, **more: Any) -> tuple[RunOutcome, dict[str, Any]]:
    """Outcome and summary of a run."""
    run_dir = RunDir.create(root)
    outcome = asyncio.run(run_of(run_dir, ray, lines, **more).live())
    return outcome, json.loads(run_dir.summary.read_text())


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


def test_ray_that_cannot_start_is_wrong_input_and_writes_nothing(tmp_path: Path) -> None:
    ray, lines = NoRay(ValueError("Ray can't start: no; set RAY_TMPDIR")), Lines()
    run_dir = RunDir.create(tmp_path / "run")
    run_dir.summary.write_text("of the start before")
    before = sorted(run_dir.root.rglob("*"))
    prepared: list[str] = []
    run = run_of(run_dir, ray, lines, prepare=lambda: prepared.append("prepared"))
    outcome = asyncio.run(run.live())
    assert (outcome.exit_code, outcome.reason) == (2, "Ray can't start: no; set RAY_TMPDIR")
    assert (ray.closed, prepared, lines.said) == (1, [], [])
    assert sorted(run_dir.root.rglob("*")) == before
    assert run_dir.summary.read_text() == "of the start before"


class SlowRay(NoRay):
    """A Ray whose start is interrupted by a signal."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(AssertionError("the signal has cancelled the start"))
        self.number = number

    async def open(self) -> str:
        os.kill(os.getpid(), self.number)
        await asyncio.sleep(5.0)
        return await super().open()


def resume_point(root: Path) -> ResumePoint:
    driver = {
        "wall_s": 100.0,
        "totals": {"steps": 4, "tokens": 40.0, "train_s": 7.0},
        "guards": {"counts": {"entropy_collapse": 3}},
    }
    return ResumePoint(root / "step_000004", 4, driver, Counts(9, trained=4, in_flight=5), {"a": 1})


def test_interrupted_start_keeps_the_counts_of_the_checkpoint(tmp_path: Path) -> None:
    point = resume_point(tmp_path)
    ray = SlowRay(signal.SIGTERM)
    outcome, summary = ended(tmp_path / "run", ray, Lines(), resume=point)
    assert (outcome.status, outcome.exit_code) == (Status.INTERRUPTED, 143)
    assert (summary["status"], summary["reason"]) == ("interrupted", "SIGTERM received")
    assert (summary["steps"], summary["tokens"], summary["train_s"]) == (4, 40, 7.0)
    assert (summary["groups"]["admitted"], summary["groups"]["trained"]) == (9, 4)
    assert summary["failures"] == {"a": 1}
    assert summary["guards"] == {"entropy_collapse": 3}
    assert summary["wall_s"] > 100.0


def test_a_checkpoint_has_the_guards_for_the_resumed_driver(tmp_path: Path) -> None:
    run, guards = run_of(RunDir.create(tmp_path / "run"), NoRay(OSError()), Lines()), RunGuards()
    guards.after_step(0, {"entropy": 2.0}, mismatches=0)
    tracker: Any = SimpleNamespace(totals=Totals(), train_s=0.0, guards=guards)
    state = json.loads(json.dumps(run._driver_state(tracker)))
    resumed = RunGuards.resumed("warn", state["guards"])
    (line,) = resumed.after_step(1, {"entropy": 0.03, "accuracy": 0.5}, mismatches=0)
    assert "entropy_collapse" in line


class EndingRay(NoRay):
    """The start fails; a signal comes while Ray is closed."""

    async def close(self) -> None:
        await super().close()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.1)


def test_signal_while_a_run_ends_does_not_change_its_outcome(tmp_path: Path) -> None:
    lines = Lines()
    outcome, summary = ended(tmp_path / "run", EndingRay(OSError("no Ray today")), lines)
    assert (outcome.status, outcome.exit_code) == (Status.FAILED, 1)
    assert (summary["status"], summary["reason"]) == ("failed", "no Ray today")
    assert lines.said == ["SIGINT: the run is ending; a second signal ends it at once"]


class UnhurriedRay(EndingRay):
    """The start takes longer than the time limit; a signal comes while Ray is closed."""

    async def open(self) -> str:
        await asyncio.sleep(60.0)
        return await super().open()


def test_signal_in_an_ending_for_lack_of_time_leaves_it_out_of_time(tmp_path: Path) -> None:
    config = replace(Config(), train=TrainConfig(num_steps=1, max_wall_s=11.0))
    ray = UnhurriedRay(AssertionError("the time limit has cancelled the start"))
    outcome, summary = ended(tmp_path / "run", ray, Lines(), config=config)
    assert (outcome.status, outcome.exit_code) == (Status.OUT_OF_TIME, 0)
    assert summary["status"] == "out_of_time"
    assert summary["reason"].startswith("train.max_wall_s (11) would have passed ")


class FullDisk(RunDir):
    """Refuses the summary so many times."""

    refusals = 2

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        if FullDisk.refusals:
            FullDisk.refusals -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write_summary(summary)


def test_a_summary_that_the_disk_refuses_is_written_when_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_async.runtime.run.RETRY_S", 0.01)
    monkeypatch.setattr(FullDisk, "refusals", 4)  # at the end of the run, again, and two tries
    lines, run_dir = Lines(), FullDisk(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    outcome = asyncio.run(run_of(run_dir, NoRay(full), lines).live())
    assert outcome.exit_code == 1
    summary = json.loads(run_dir.summary.read_text())
    assert (summary["status"], summary["caught"]["summary.json"]) == ("failed", 4)
    assert summary["reason"] == (
        "[Errno 28] No space left on device; free some space on the disk of "
        f"{tmp_path}, and continue with dapo-async train --resume {tmp_path}"
    )
    assert [line for line in lines.said if "summary" in line] == [
        "summary.json can't be written: no space left on device; it is kept in memory, and written "
        "as soon as there is space"
    ]


def test_a_summary_that_is_refused_to_the_end_is_printed_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_async.runtime.run.STOP_S", 0.2)
    monkeypatch.setattr("dapo_async.runtime.run.RETRY_S", 0.1)
    monkeypatch.setattr(FullDisk, "refusals", 100)
    lines, run_dir = Lines(), FullDisk(tmp_path)
    run_dir.summary.write_text("of the start before")
    (tmp_path / "error.txt").mkdir()  # can't be written either
    with pytest.raises(OSError, match="No space left"):  # the command makes one line of it
        asyncio.run(run_of(run_dir, NoRay(OSError("no Ray today")), lines).live())
    assert run_dir.summary.read_text() == "of the start before"
    (printed,) = [line for line in lines.said if line.startswith("summary.json: ")]
    assert json.loads(printed.removeprefix("summary.json: "))["reason"] == "no Ray today"
    assert "failed: no Ray today" in lines.said
