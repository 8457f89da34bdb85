"""Ends an own Ray whose driver was killed.

A killed driver can end nothing, and Ray's agents outlive their raylet by up to a minute.

    reaper = Reaper()        # before Ray starts: a small process in a session of its own
    reaper.watch()           # once Ray runs: these processes must not outlive the driver
    with reaper.hasten():    # around the end of Ray, see below
        ray.shutdown()
    reaper.dismiss()         # after Ray's orderly end

Ray's processes are shielded from SIGTERM (`connect.shielded`), so `ray.shutdown` would wait one
second for each of them in vain; `hasten` kills them instead. The reaper waits for the end of a
pipe that only the driver holds, whatever ends the driver. It imports neither Ray nor torch. A
thread of the driver waits for the end of the reaper, and starts another one.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

GRACE_S = 8.0  # an orphaned raylet ends itself and its workers in 2 to 4 s; the rest is killed
PAUSE_S = 1.0  # before a reaper that has ended is replaced
log = logging.getLogger(__name__)


class Reaper:
    """The driver's end of the pipe."""

    def __init__(self, *, grace_s: float = GRACE_S) -> None:
        """`grace_s`: how long the reaper leaves orphans to end by themselves."""
        self._grace_s = grace_s
        self._lock = threading.Lock()  # held while the process changes, and while it is told
        self._is_dismissed, self._is_watching = threading.Event(), False
        self._watched: list[psutil.Process] = []
        self._process = self._start()
        self._keeper = threading.Thread(target=self._keep, daemon=True, name="reaper")
        self._keeper.start()

    def _start(self) -> subprocess.Popen[str]:
        # A session of its own: what ends the driver's process group must not end the reaper.
        return subprocess.Popen(
            [sys.executable, "-m", "dapo_async.runtime.cluster.orphan_reaper", str(self._grace_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def _keep(self) -> None:
        """Replaces the process when it ends."""
        while True:
            code = self._process.wait()
            while not self._is_dismissed.wait(PAUSE_S):
                try:
                    with self._lock:
                        if self._is_dismissed.is_set():
                            return
                        self._process = self._start()
                except OSError as error:  # too many processes
                    log.warning("the reaper of this run's Ray can't be started again: %s", error)
                else:
                    log.warning(
                        "the reaper of this run's Ray ended (exit code %s) and was started again",
                        code,
                    )
                    break
            if self._is_dismissed.is_set():
                return
            if self._is_watching:
                self.watch()

    def watch(self) -> None:
        """Names every process that descends from this one."""
        with self._lock:
            self._is_watching = True
            self._watched = [
                child
                for child in psutil.Process().children(recursive=True)
                if child.pid != self._process.pid
            ]
            lines = [f"{child.pid} {child.create_time()}\n" for child in self._watched]
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has just ended: the next one is told
                self._process.stdin.writelines(lines)
                self._process.stdin.flush()

    @contextlib.contextmanager
    def hasten(self) -> Iterator[None]:
        """Kills the watched processes as soon as Ray sends the first of them SIGTERM; by then this
        process has left Ray."""
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
        """Ends the reaper."""
        with self._lock:
            self._is_dismissed.set()
            self._process.kill()
        self._keeper.join()


def _is_asked_to_end(process: psutil.Process) -> bool:
    """Whether the process, which blocks SIGTERM, has one pending."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:  # gone
        return False
    waiting = next(
        (line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:")), "0"
    )
    return bool(int(waiting, 16) >> (signal.SIGTERM - 1) & 1)


def reap(grace_s: float) -> None:
    """Waits for the end of standard input, then kills the processes that were named on it and that
    have not ended by themselves within `grace_s`.

    The creation time tells them from new processes with the same pid.
    """
    named = [line.split() for line in sys.stdin]
    watched = []
    for pid, created_s in named:
        try:
            process = psutil.Process(int(pid))
            if process.create_time() == float(created_s):
                watched.append(process)
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(watched, timeout=grace_s)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    reap(float(sys.argv[1]))
