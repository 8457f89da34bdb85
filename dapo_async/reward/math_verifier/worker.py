"""A verifier process: requests come in as JSON lines, one reply each leaves. `pool.py` starts it as `python -m` and replaces it when it dies.

It imports the symbolic engine once and forks a child for every request: one verdict leaves nothing behind for the next, a child that hangs or dies
takes nothing with it, and a new one is there in milliseconds. The child has so many seconds of processor time, so that no verdict depends on how
busy the machine is: its timer's signal ends it even within one long operation of C code. This process kills a child that has not had its time for
long; then nothing is known. The child has a memory limit. When stdin ends, or the parent is gone, everything here ends.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

MEMORY_BYTES = 2 * 2**30
LATE_S = 0.5  # the child's own wall clock goes off so much after the outer deadline, should this process be gone
WALL_FACTOR, WALL_EXTRA_S = 4.0, 5.0  # a busy machine may need so much longer for the same work
CHUNK = 65_536
WARM_UP = (  # equal and different, one of each kind: the engine imports its parts when they are first needed
    (r"\frac{x+1}{2}", r"\frac{1}{2}x+0.5"), (r"\sqrt{8}", r"2\sqrt{2}"), ("(1,2]", "(1,2)"), ("x=3", "3"), (r"\tan^2(y)+1", r"\sec^2(y)"),
    (r"(-\infty,3)\cup[5,6)", r"[5,6)\cup(-\infty,3)"), (r"\{1,2\}", r"\{3,1\}"),
    (r"\begin{pmatrix}1&2\\3&x\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("1<x<2", "(1,2)"), (r"2x+4y=3", r"y=-\frac{1}{2}x+1"), (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"), (r"\binom{5}{2}", "5!"), ("3+4i", "e^{i}"),
    (r"1\pm\sqrt{5}", r"1-\sqrt5, 1+\sqrt5"), (r"10^{\frac{1}{3}}", r"\pi"), (r"x^2-y^2", r"(x-y)(x+y)"), (r"\frac{x^2-1}{x-1}", "x+2"),
)  # fmt: skip


def wall_s(timeout_s: float) -> float:
    """How long the process waits for a verdict that may take `timeout_s` of processor time."""
    return WALL_FACTOR * timeout_s + WALL_EXTRA_S


class Requests:
    """Lines of stdin; `ended` when no more can come."""

    def __init__(self) -> None:
        self.ended = False
        self._buffer = b""

    def next(self) -> dict[str, Any] | None:
        """The next request; None when no more can come."""
        while b"\n" not in self._buffer and not self.ended:
            self.read()
        if self.ended:
            return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        request: dict[str, Any] = json.loads(line)
        return request

    def read(self) -> None:
        chunk = os.read(sys.stdin.fileno(), CHUNK)
        self.ended = not chunk
        self._buffer += chunk


def main() -> None:
    """Says ready, then answers until stdin ends."""
    try:
        from dapo_async.reward.math_verifier import symbolic
    except ImportError as error:
        _say({"error": f"{error}; pip install math-verify"})
        return
    for gold, answer in WARM_UP:
        symbolic.equal_formulas(answer, gold)
    gc.collect()
    gc.freeze()  # children share these pages as long as nothing touches them
    requests = Requests()
    _say({"ready": os.getpid()})
    while (request := requests.next()) is not None:
        reply = _answer(request, requests)
        if requests.ended:
            return
        _say(reply)


def _answer(request: dict[str, Any], requests: Requests) -> dict[str, Any]:
    """What a child says: its reply, `timeout` when its processor time ran out, `failed` when it died or had not got it by the outer deadline."""
    deadline = time.monotonic() + wall_s(request["timeout_s"])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for inherited in (reading, sys.stdin.fileno(), sys.stdout.fileno()):
            os.close(inherited)  # the end of this process must be seen although a child lives on
        _judge_and_exit(request, writing)
    os.close(writing)
    said, status = b"", None
    try:
        while status is None and (left_s := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([reading, sys.stdin.fileno()], [], [], left_s)
            if sys.stdin.fileno() in ready:
                requests.read()
                if requests.ended:
                    return {}
            if reading in ready:
                chunk = os.read(reading, CHUNK)
                said += chunk
                if not chunk:
                    _, status = os.waitpid(child, 0)  # only its end closes the pipe
    finally:
        os.close(reading)
        if status is None:
            os.kill(child, signal.SIGKILL)  # not reaped yet: the number is still its own
            os.waitpid(child, 0)
    if status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return {"reason": "timeout"}
    reply: dict[str, Any] = json.loads(said) if status == 0 and said else {"reason": "failed"}
    return reply


def _judge_and_exit(request: dict[str, Any], writing: int) -> None:
    """The child: one verdict, written to the pipe; never returns."""
    for timer, number, limit_s in (
        (signal.ITIMER_PROF, signal.SIGPROF, request["timeout_s"]),
        (signal.ITIMER_REAL, signal.SIGALRM, wall_s(request["timeout_s"]) + LATE_S),
    ):
        signal.signal(number, signal.SIG_DFL)
        signal.setitimer(timer, limit_s)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        reply = _judge(request)
    except (MemoryError, RecursionError, OverflowError):
        reply = {"reason": "too_large"}
    except Exception:  # noqa: BLE001 (whatever the engine raises on a model's text, it could not read it; counted by its reason)
        reply = {"reason": "unreadable"}
    os.write(writing, json.dumps(reply).encode())
    os._exit(0)


def _judge(request: dict[str, Any]) -> dict[str, Any]:
    from sympy.core.random import seed

    from dapo_async.reward.math_verifier import symbolic

    seed(0)
    if request["anywhere"]:
        equal, extracted = symbolic.last_expression(request["answer"], request["gold"])
        return {"equal": equal, "extracted": extracted and extracted[:1000]}
    return {"equal": symbolic.equal_formulas(request["answer"], request["gold"])}


def _say(reply: dict[str, Any]) -> None:
    """One line; a parent that is gone ends this process."""
    try:
        os.write(sys.stdout.fileno(), json.dumps(reply).encode() + b"\n")
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
