"""Signals at an own Ray: SIGTERM to all does not end it, and Ray's own shutdown is quick."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
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


DRIVER = """
import subprocess, time
from dapo_async.runtime.cluster import orphan_reaper
orphan_reaper.PAUSE_S = 0.05
orphan = subprocess.Popen(["sleep", "100"], start_new_session=True)
reaper = orphan_reaper.Reaper(grace_s=0.2)
reaper.watch()
print(orphan.pid, flush=True)
time.sleep(100)
"""


def reapers(driver: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(driver).children():
        with suppress(psutil.NoSuchProcess):  # it has ended, perhaps as a zombie of another test
            if "dapo_async.runtime.cluster.orphan_reaper" in child.cmdline():
                found.append(child)
    return found


def test_a_reaper_that_dies_is_replaced_and_nothing_is_left_over() -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    orphan = psutil.Process(int(driver.stdout.readline()))
    try:
        for _ in range(2):
            (reaper,) = reapers(driver.pid)
            reaper.kill()
            until_s = time.monotonic() + 30.0
            while not (found := reapers(driver.pid)) or found[0].pid == reaper.pid:
                assert time.monotonic() < until_s, "it was not replaced"
                time.sleep(0.02)
        (last,) = reapers(driver.pid)
        time.sleep(0.2)  # it is told whom it watches right after its start
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
    gone, alive = psutil.wait_procs([orphan, last], timeout=30.0)
    assert (len(gone), alive) == (2, [])


def test_a_dismissed_reaper_stays_away(reaper: Reaper) -> None:
    (before,) = reapers(os.getpid())
    reaper.dismiss()
    assert not before.is_running()
    assert reapers(os.getpid()) == []
    assert not reaper._keeper.is_alive()
