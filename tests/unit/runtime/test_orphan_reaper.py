"""Signals at an own Ray: SIGTERM to all does not end it, and Ray's own shutdown is quick."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from dapo_async.runtime.cluster.connect import shielded
from dapo_async.runtime.cluster.orphan_reaper import Reaper


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with shielded():
        process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait(60)


@pytest.fixture
def reaper(child: subprocess.Popen[bytes]) -> Iterator[Reaper]:
    watcher = Reaper()
    watcher.watch()
    yield watcher
    watcher.dismiss()


def test_shielded_process_outlives_sigterm_and_its_parent_still_heeds_it(
    child: subprocess.Popen[bytes],
) -> None:
    child.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.3)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_shielded_process_is_killed_once_it_is_asked_to_end(
    child: subprocess.Popen[bytes], reaper: Reaper
) -> None:
    with reaper.hasten():
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)  # nobody has asked
        child.send_signal(signal.SIGTERM)
        assert child.wait(60.0) == -signal.SIGKILL


def test_signal_that_came_before_the_end_is_not_taken_for_it(
    child: subprocess.Popen[bytes], reaper: Reaper
) -> None:
    os.kill(child.pid, signal.SIGTERM)  # a batch queue's
    with reaper.hasten(), pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.3)
