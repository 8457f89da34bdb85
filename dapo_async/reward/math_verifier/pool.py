"""The pool of verifier processes: questions come in from any thread, replies leave in time.

`verify.py` calls it.
"""

from __future__ import annotations

import atexit
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dapo_async.reward.math_verifier.worker import wall_s
from dapo_async.reward.verdict_process import ask_process, kill_session, read_reply

NUM_PROCESSES = 2
RECYCLE_AFTER = 2000  # verdicts, after which a process is replaced
START_S = 120.0  # the import of math-verify takes seconds, more on a busy machine
GRACE_S = 2.0  # beyond the wall-clock deadline, in which a process kills its child
WAIT_S = 600.0  # for a free process
COMMAND = (sys.executable, "-P", "-m", "dapo_async.reward.math_verifier.worker")
FAILED_REPLY: dict[str, Any] = {"reason": "failed"}


class VerifierProcess:
    """A process that runs `worker.py`; replaced when it dies or after `RECYCLE_AFTER` verdicts."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._num_verdicts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the process and returns at once; the process reports when it is ready."""
        self.stop()
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join(each for each in (root, os.environ.get("PYTHONPATH", "")) if each)
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # The hash seed makes the order of sets, and so the verdict, the same in each process.
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            bufsize=0,
        )
        self._ready, self._num_verdicts = False, 0

    def wait_ready(self) -> None:
        """Starts the process if needed and waits for it. Raises RuntimeError if it fails."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        if self._ready:
            return
        assert self._process is not None
        said = read_reply(self._process, time.monotonic() + START_S)
        if not said or "ready" not in said:
            self.stop()
            why = said["error"] if said else f"it died or was silent for {START_S:g} s"
            raise RuntimeError(f"the verifier process did not start: {why}")
        self._ready = True

    def ask(self, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply; its reason is `failed` when the process died over the question.

        A process that was dead before is replaced first.
        """
        if self._num_verdicts >= RECYCLE_AFTER:
            self.start()
        self.wait_ready()
        assert self._process is not None
        self._num_verdicts += 1
        deadline_s = time.monotonic() + wall_s(timeout_s) + GRACE_S
        reply = ask_process(self._process, {**question, "timeout_s": timeout_s}, deadline_s)
        if reply is None:
            self.start()
            return FAILED_REPLY
        return reply

    def stop(self) -> None:
        """Kills the process and its child."""
        process, self._process = self._process, None
        if process is None:
            return
        kill_session(process)


class Pool:
    """Verifier processes that any thread may ask; each starts with its first question."""

    def __init__(self, num_processes: int = NUM_PROCESSES) -> None:
        self.processes = tuple(VerifierProcess() for _ in range(num_processes))
        self._idle: queue.LifoQueue[VerifierProcess] = queue.LifoQueue()
        for process in self.processes:
            self._idle.put(process)

    def ask(self, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply, within `timeout_s` of processor time and `worker.wall_s` of the clock.

        Raises RuntimeError when no process starts and TimeoutError when none is free in time.
        """
        try:
            process = self._idle.get(timeout=WAIT_S)
        except queue.Empty:
            raise TimeoutError(
                f"a verdict waited {WAIT_S:g} s for one of {len(self.processes)} verifier processes"
            ) from None
        try:
            return process.ask(question, timeout_s)
        finally:
            self._idle.put(process)

    def stop(self) -> None:
        for process in self.processes:
            process.stop()


_lock = threading.Lock()
_pool: tuple[int, Pool] | None = None


def shared_pool() -> Pool:
    """The pool of the calling process; a forked process gets a new one."""
    global _pool
    with _lock:
        if _pool is None or _pool[0] != os.getpid():
            _pool = os.getpid(), Pool()
            atexit.register(_stop, os.getpid())
        return _pool[1]


def _stop(owner: int) -> None:
    if owner == os.getpid() and _pool is not None:
        _pool[1].stop()
