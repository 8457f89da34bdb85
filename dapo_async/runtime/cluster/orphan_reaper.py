"""Ends an own Ray whose driver was killed. Ray's agents outlive their raylet by up to a minute, which nothing sets; a killed driver can end nothing.

    watcher = Reaper()        # before Ray starts: a small process in a session of its own
    watcher.watch()           # once Ray runs: these are the processes that must not outlive the driver
    with watcher.hasten():    # they are shielded from SIGTERM (`cluster.shielded`): Ray would wait a second for each of them in vain
        ray.shutdown()
    watcher.dismiss()         # after Ray's orderly end

It imports neither Ray nor torch: it waits for the end of a pipe that only the driver holds, whatever ends the driver.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

GRACE_S = 8.0  # Ray's own end of an orphaned raylet and its workers takes 2 to 4 s; only what is left afterwards is killed


class Reaper:
    """The driver's end of the pipe."""

    def __init__(self) -> None:
        # A session of its own: what ends the driver's process group must not end the reaper.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dapo_async.runtime.cluster.orphan_reaper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._watched: list[psutil.Process] = []

    def watch(self) -> None:
        """Names every process that descends from this one."""
        assert self._process.stdin is not None
        self._watched = [
            child
            for child in psutil.Process().children(recursive=True)
            if child.pid != self._process.pid
        ]
        for child in self._watched:
            self._process.stdin.write(f"{child.pid} {child.create_time()}\n")
        self._process.stdin.flush()

    @contextlib.contextmanager
    def hasten(self) -> Iterator[None]:
        """Whatever is watched is killed once the first of it is sent SIGTERM, by which time this process has left Ray."""
        unasked = [process for process in self._watched if not _is_asked_to_end(process)]
        over = threading.Event()

        def kill() -> None:
            while not over.wait(0.02):
                if any(_is_asked_to_end(process) for process in unasked):
                    for process in self._watched:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            process.kill()
                    return

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        try:
            yield
        finally:
            over.set()
            killer.join()

    def dismiss(self) -> None:
        """Everything has ended in order, or is left to Ray: the reaper goes."""
        self._process.kill()
        self._process.wait()


def _is_asked_to_end(process: psutil.Process) -> bool:
    """Whether a SIGTERM waits for it, which it has blocked."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:  # gone
        return False
    waiting = next(
        (line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:")), "0"
    )
    return bool(int(waiting, 16) >> (signal.SIGTERM - 1) & 1)


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
