"""The user's verifier in processes that can be killed: a response and its gold answer come in, a
verdict leaves, within a deadline.

`verifiers.get_verifier` makes one for `module:function`. Whatever the function does, the run goes
on: if it raises, hangs, ends its process or returns something else, the verdict is `failed`, and
its `detail` says why.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from dapo_async.reward.verdict import FAILED, Verdict
from dapo_async.reward.verdict_process import ask_process, kill_session, read_reply
from dapo_async.utils.plugins import load_function

TIMEOUT_S = 60.0  # of one verdict, by the clock
GRACE_S = 2.0  # beyond it, in which the process ends itself and says where it hung
START_S = 120.0  # the import of the user's module
WAIT_S = 600.0  # for a free process


class OwnVerifier:
    """Calls one function of the user. Any thread may call it."""

    def __init__(self, name: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._idle: list[_Process] = []
        self._free = threading.Semaphore(_most_processes())
        atexit.register(self.stop)

    def __call__(self, response: str, gold: str, /, *, prompt: str = "") -> Verdict:
        """The verdict of the function; `failed` when there is none."""
        if not self._free.acquire(timeout=WAIT_S):
            return _failed(f"{self._name}: no process became free within {WAIT_S:g} s")
        try:
            process = self._take()
            request = {"response": response, "gold": gold, "prompt": prompt}
            reply = process.ask(request, self._timeout_s)
            if process.is_alive:
                with self._lock:
                    self._idle.append(process)
        finally:
            self._free.release()
        if "error" in reply:
            return _failed(str(reply["error"]))
        return Verdict(reply["correct"], reply["extracted"], reply["reason"])

    def stop(self) -> None:
        """Kills the processes. Does nothing in a fork of the process that started them."""
        if self._owner == os.getpid():
            with self._lock:
                idle, self._idle = self._idle, []
            for process in idle:
                process.kill()

    def _take(self) -> _Process:
        """The process that was used last, so that no more processes run than are needed."""
        with self._lock:
            if self._owner != os.getpid():  # this is a fork
                self._owner, self._idle = os.getpid(), []
            return self._idle.pop() if self._idle else _Process(self._name)


class _Process:
    """A process that runs `own_process.py`; it starts with the first request."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_alive(self) -> bool:
        return self._process is not None

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply, with `error` when there is none; the process is gone then."""
        if self._process is None or self._process.poll() is not None:
            self.kill()
            try:
                self._start()
            except OSError as error:
                return {"error": f"{self._name}: its process did not start: {error}"}
            assert self._process is not None
            said = read_reply(self._process, time.monotonic() + START_S)
            if not said or "ready" not in said:
                self.kill()
                why = said["error"] if said else f"it died or was silent for {START_S:g} s"
                return {"error": f"{self._name}: its process did not start: {why}"}
        assert self._process is not None
        began_s = time.monotonic()
        reply = ask_process(
            self._process, {**request, "timeout_s": timeout_s}, began_s + timeout_s + GRACE_S
        )
        if reply is None:
            self.kill()
            late = time.monotonic() - began_s >= timeout_s
            why = f"gave no verdict within {timeout_s:g} s" if late else "ended its process"
            return {"error": f"{self._name} {why}"}
        return reply

    def kill(self) -> None:
        """Kills the process and what it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        kill_session(process)

    def _start(self) -> None:
        # The process finds modules where this one does.
        path = os.pathsep.join(each or os.getcwd() for each in sys.path)
        self._process = subprocess.Popen(
            (sys.executable, "-P", "-m", "dapo_async.reward.own_process", self._name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
            bufsize=0,
        )


def load_own_verifier(name: str, *, knob: str) -> Callable[..., object]:
    """The user's function. Raises ValueError when it can't be used."""
    return load_function(name, knob=knob, parameters=("response", "gold"), optional=("prompt",))


def _failed(detail: str) -> Verdict:
    return Verdict(correct=False, extracted=None, reason=FAILED, detail=detail)


def _most_processes() -> int:
    """As many as asyncio has threads for verdicts."""
    return min(32, (os.cpu_count() or 1) + 4)
