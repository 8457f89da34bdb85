"""A child process that gives verdicts: one line of JSON per request and reply, and the end of its
session.

Used by the pool of `math` and by the processes of own verifiers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import Any

from dapo_async.utils.readable import is_readable, is_writable

CHUNK = 65536
PAUSE_S = 0.01


def ask_process(
    process: subprocess.Popen[bytes], request: dict[str, Any], deadline_s: float
) -> dict[str, Any] | None:
    """The reply to `request`; None when the process has ended, or at `deadline_s` (monotonic).

    A process that does not read fills the pipe, so the deadline holds for the request, too.
    """
    assert process.stdin is not None
    pipe, left = process.stdin.fileno(), memoryview(json.dumps(request).encode() + b"\n")
    os.set_blocking(pipe, False)
    while left:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not is_writable(pipe, left_s):
            return None
        try:
            left = left[os.write(pipe, left) :]
        except BlockingIOError:  # less room than the system writes at once
            time.sleep(PAUSE_S)
        except BrokenPipeError:
            return None
    return read_reply(process, deadline_s)


def read_reply(process: subprocess.Popen[bytes], deadline_s: float) -> dict[str, Any] | None:
    """The next line of the process; None when it has ended, or at `deadline_s` (monotonic)."""
    assert process.stdout is not None
    pipe, said = process.stdout.fileno(), b""
    while not said.endswith(b"\n"):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not is_readable(pipe, left_s):
            return None
        chunk = os.read(pipe, CHUNK)
        if not chunk:
            return None
        said += chunk
    reply: dict[str, Any] = json.loads(said)
    return reply


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and what it has started, and closes its pipes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        assert process.poll() is not None  # it had ended before
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
