"""Limits of the machine, compared with what the run needs before it starts."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import QUICKSTART
from run_support import COMMAND, environment

from dapo_async import config as knobs
from dapo_async.runtime.cluster import limits

Usage = namedtuple("Usage", "total used free")


def test_open_files_are_raised_as_far_as_the_hard_limit_lets() -> None:
    script = (
        "import resource\n"
        "from dapo_async.runtime.cluster.limits import raise_open_files\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1000))\n"
        "raise_open_files()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "(1000, 1000)\n"


def test_too_few_open_files_are_one_line_with_the_remedy_before_anything_is_made(
    tmp_path: Path,
) -> None:
    words = f"{COMMAND} train {QUICKSTART} run_dir={tmp_path / 'run'} ray.address=local"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -n 64; {words}"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "dapo-async: a process may open 64 files at most, this run needs 288; raise the limit with "
        "ulimit -n 8192, or LimitNOFILE of the service that starts this command\n"
    )
    assert not (tmp_path / "run").exists()


def test_more_processes_need_more_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    small = knobs.load(QUICKSTART)
    large = knobs.load(QUICKSTART, ["rollout.num_workers=100", "learner.data_parallel=16"])
    assert limits.open_files_needed(small) == 256 + 8 * 4
    assert limits.open_files_needed(large) == 256 + 8 * 118
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 2048))
    assert limits.open_files_fault(small) is None
    assert "may open 1024 files at most, this run needs 1200" in str(limits.open_files_fault(large))


def test_a_disk_that_lacks_inodes_for_all_steps_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = knobs.load(QUICKSTART, ["train.num_steps=1000", "train.record=true"])
    assert limits.inodes_fault(tmp_path / "runs" / "run", config) is None
    few = SimpleNamespace(f_files=10_000, f_favail=2000)
    monkeypatch.setattr(os, "statvfs", lambda path: few)
    assert limits.inodes_fault(tmp_path / "run", config) == (
        f"the disk of run_dir {tmp_path / 'run'} can hold 2000 more files (inodes), this run "
        "writes up to 2250; remove files there, or choose another run_dir"
    )
    few.f_files = 0  # no such limit
    assert limits.inodes_fault(tmp_path / "run", config) is None


def test_space_that_may_become_short_is_noted_and_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = knobs.load(QUICKSTART, ["replay.groups_per_step=64", "replay.group_size=16"])
    assert [*limits.space_notes(tmp_path, config, checkpoint_bytes=2**20)] == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 2**18))
    disk, memory = limits.space_notes(tmp_path, config, checkpoint_bytes=2**20)
    assert disk == (
        "disk       0.2 MiB free for 5 checkpoints of 1.0 MiB; lower train.keep_checkpoints or "
        "free some space"
    )
    assert memory.startswith("memory     /dev/shm has 0.2 MiB free, batches need up to ")


def test_ports_that_the_kernel_chooses_outside_the_range_are_told_on_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def notes(*overrides: str) -> list[str]:
        return list(limits.ports_notes(knobs.load(QUICKSTART, overrides)))

    joined = "ray.address=10.0.0.1:6379"
    monkeypatch.setattr(limits, "chosen_by_kernel", lambda: range(32768, 61000))
    (line,) = notes(joined, "network.ports=20000-20999")
    assert "here 32768-60999, outside network.ports (20000-20999); firewalls" in line
    assert notes(joined, "network.ports=32000-61000") == notes(joined) == []
    assert notes("ray.address=local", "network.ports=20000-20999") == []
