"""Ends an own Ray whose driver was killed. Ray's agents outlive their raylet by up to a minute, which nothing sets; a killed driver can end nothing.

    watcher = Reaper()        # before Ray starts: a small process in a session of its own
    watcher.watch()           # once Ray runs: these are the processes that must not outlive the driver
    watcher.dismiss()         # after Ray's orderly end

It imports neither Ray nor torch: it waits for the end of a pipe that only the driver holds, whatever ends the driver.
"""

from __future__ import annotations

import subprocess
import sys

import psutil

GRACE_S = 8.0  # Ray's own end of an orphaned raylet and its workers takes 2 to 4 s; only what is left afterwards is killed


class Reaper:
    """The driver's end of the pipe."""

    def __init__(self) -> None:
        # A session of its own: what ends the driver's process group must not end the reaper.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dapo_async.runtime.reaper"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
        )

    def watch(self) -> None:
        """Names every process that descends from this one."""
        me = psutil.Process()
        assert self._process.stdin is not None
        for child in me.children(recursive=True):
            if child.pid != self._process.pid:
                self._process.stdin.write(f"{child.pid} {child.create_time()}\n")
        self._process.stdin.flush()

    def dismiss(self) -> None:
        """Everything has ended in order, or is left to Ray: the reaper goes."""
        self._process.kill()
        self._process.wait()


def reap() -> None:
    """Waits for the end of standard input, then kills what was named on it and still lives. A pid that was given to another process is left alone."""
    named = [line.split() for line in sys.stdin]
    watched = []
    for pid, created_s in named:
        try:
            process = psutil.Process(int(pid))
            if process.create_time() == float(created_s):
                watched.append(process)
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(watched, timeout=GRACE_S)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    reap()
