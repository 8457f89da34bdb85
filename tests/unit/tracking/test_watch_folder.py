"""The claim of a watcher on checkpoints: it holds while the watcher lives, and no longer."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.watch_folder import (
    LEASE_S,
    WatchClaims,
    WatchFolder,
    WatchLease,
    watched_row,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def result(version: int, *, accuracy: float = 0.5, sums: str = "", k: int = 32) -> dict[str, Any]:
    """As much of a result as its readers use."""
    estimate = {"mean": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
    names = (f"avg@{k}", f"pass@{k}", f"maj@{k}")
    return {
        "settings": {
            "k": k,
            "temperature": 1.0,
            "top_p": 0.7,
            "version": version,
            "checkpoint_sums": sums,
        },
        "totals": {
            "problems": 30,
            **dict.fromkeys(names, estimate),
            "mean_response_tokens": 12.5,
            "truncated": 0.25,
            "answered": 0.75,
        },
        "problems": [],
    }


def write(folder: WatchFolder, version: int, **more: Any) -> None:
    folder.root.mkdir(exist_ok=True)
    folder.result(version).write_text(json.dumps(result(version, **more)))


def test_without_a_watcher_no_checkpoint_is_claimed(tmp_path: Path) -> None:
    assert WatchClaims(WatchFolder(tmp_path / "watched")).unmeasured([2, 4]) == []


def test_a_living_watcher_claims_what_has_no_result(tmp_path: Path) -> None:
    folder = WatchFolder(tmp_path / "watched")
    claims = WatchClaims(folder)
    with WatchLease(folder):
        write(folder, 2)
        (folder.root / "version_000004.json.partial.jsonl").touch()
        assert claims.unmeasured([2, 4, 6]) == [4, 6]
    assert not folder.lease.exists()
    assert claims.unmeasured([2, 4, 6]) == []


def test_a_killed_watcher_blocks_the_removal_for_a_bounded_time(tmp_path: Path) -> None:
    folder, clock = WatchFolder(tmp_path / "watched"), Clock()
    lease = WatchLease(folder)
    lease.renew()  # and the process is killed: nobody removes the file
    claims = WatchClaims(folder, now_s=clock)
    assert claims.unmeasured([2]) == [2]
    clock.now_s = LEASE_S - 1
    assert claims.unmeasured([2]) == [2]
    clock.now_s = LEASE_S
    assert claims.unmeasured([2]) == []
    lease.renew()  # it was only slow
    assert claims.unmeasured([2]) == [2]


def test_the_thread_of_a_lease_counts_on(tmp_path: Path) -> None:
    folder = WatchFolder(tmp_path / "watched")
    with WatchLease(folder, renew_s=0.001) as lease:
        before = json.loads(folder.lease.read_text())["count"]
        while json.loads(folder.lease.read_text())["count"] < before + 2:
            assert lease._thread.is_alive()


WATCH = """
import sys
from pathlib import Path
from dapo_async.tracking.watch_folder import WatchFolder, WatchLease
try:
    with WatchLease(WatchFolder(Path(sys.argv[1]))):
        print("watches", flush=True)
except ValueError as error:
    print(error)
"""


def another_watcher(root: Path) -> str:
    """What a watcher in a process of its own says; locks are those of processes."""
    command = [sys.executable, "-c", WATCH, str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_second_watcher_of_one_run_is_refused(tmp_path: Path) -> None:
    folder = WatchFolder(tmp_path / "watched")
    with WatchLease(folder):
        assert another_watcher(folder.root).startswith("another process watches")
        assert folder.lease.exists()  # the refused one removes nothing
    assert another_watcher(folder.root) == "watches\n"
    with WatchLease(folder):
        pass


def test_a_watcher_that_ends_leaves_the_lease_of_another_machine(tmp_path: Path) -> None:
    """Locks of its file system are local, so the other one watches, too."""
    folder = WatchFolder(tmp_path / "watched")
    other = {"pid": 7, "host": "node-2", "count": 3}
    with WatchLease(folder):
        folder.lease.write_text(json.dumps(other))
    assert json.loads(folder.lease.read_text()) == other


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with pytest.raises(ValueError, match="can't be locked: No locks available; mount the file"):
        WatchLease(WatchFolder(tmp_path / "watched"))


def test_a_row_has_the_averages_of_a_result() -> None:
    assert watched_row(20, result(20, accuracy=0.4)) == {
        "version": 20, "k": 32, "temperature": 1.0, "top_p": 0.7, "num_prompts": 30,
        "accuracy": 0.4, "low": pytest.approx(0.3), "high": 0.5, "pass_at_k": 0.4,
        "maj_at_k": 0.4, "mean_response_tokens": 12.5, "truncated": 0.25, "answered": 0.75,
    }  # fmt: skip


@pytest.mark.parametrize("broken", [{}, {"settings": {}}, {"settings": {"k": "x"}, "totals": {}}])
def test_anything_else_than_a_result_is_no_row(broken: dict[str, Any]) -> None:
    assert watched_row(1, broken) == {}


def test_broken_results_are_left_out_of_the_rows(tmp_path: Path) -> None:
    folder = WatchFolder(tmp_path)
    write(folder, 4)
    folder.result(2).write_text('{"sett')
    assert [row["version"] for row in folder.rows()] == [4]


def test_a_resume_forgets_the_results_of_versions_that_it_trains_again(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path / "run")
    for version in (0, 2, 4):
        write(run_dir.watched, version)
    (run_dir.watched.root / "version_000006.json.partial.jsonl").touch()
    run_dir.reopen(2)
    assert {path.name for path in run_dir.watched.root.iterdir()} == {
        "version_000000.json",
        "version_000002.json",
    }


def test_the_best_version_follows_the_watcher_where_it_has_measured_any(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path / "run")
    for version, accuracy in ((2, 0.9), (4, 0.1)):
        run_dir.log_evaluation({"version": version, "accuracy": accuracy}, accuracies={})
    assert run_dir.best_version([2, 4]) == 2
    write(run_dir.watched, 2, accuracy=0.3)
    write(run_dir.watched, 4, accuracy=0.6)
    assert run_dir.best_version([2, 4]) == 4
    assert run_dir.best_version([2]) == 2
