"""The program of a verifier process: requests come in as JSON lines, a reply for each leaves.

`pool.py` starts it with `python -m` and replaces it when it dies.

The process imports math-verify once and forks a child for each request, which takes milliseconds.
So every verdict starts from the same state, and a child that hangs or dies affects no other one.

- A child has `timeout_s` of processor time, so a busy machine changes no verdict. The signal of its
  timer ends it even within one long operation of C code.
- This process kills a child that did not get its processor time within `wall_s`; the reply is
  `failed`.
- A child has a memory limit.
- When stdin ends, which happens when the parent dies, all of these processes end.
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
LATE_S = 0.5  # the child's own clock deadline is this much later, in case this process is dead
WALL_FACTOR, WALL_EXTRA_S = 4.0, 5.0  # the clock deadline for the work of `timeout_s`
CHUNK = 65_536
WARM_UP = (  # one pair of each kind, because SymPy imports its parts when they are first used
    (r"\frac{x+1}{2}", r"\frac{1}{2}x+0.5"), (r"\sqrt{8}", r"2\sqrt{2}"), ("(1,2]", "(1,2)"),
    ("x=3", "3"), (r"\tan^2(y)+1", r"\sec^2(y)"),
    (r"(-\infty,3)\cup[5,6)", r"[5,6)\cup(-\infty,3)"), (r"\{1,2\}", r"\{3,1\}"),
    (r"\begin{pmatrix}1&2\\3&x\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("1<x<2", "(1,2)"), (r"2x+4y=3", r"y=-\frac{1}{2}x+1"), (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
    (r"\binom{5}{2}", "5!"), ("3+4i", "e^{i}"), (r"1\pm\sqrt{5}", r"1-\sqrt5, 1+\sqrt5"),
    (r"10^{\frac{1}{3}}", r"\pi"), (r"x^2-y^2", r"(x-y)(x+y)"), (r"\frac{x^2-1}{x-1}", "x+2"),
)  # fmt: skip


def wall_s(timeout_s: float) -> float:
    """The clock deadline of a verdict that may take `timeout_s` of processor time."""
    return WALL_FACTOR * timeout_s + WALL_EXTRA_S


class Requests:
    """Lines of stdin; `ended` is true once stdin has ended."""

    def __init__(self) -> None:
        self.ended = False
        self._buffer = b""

    def next(self) -> dict[str, Any] | None:
        """The next request; None once stdin has ended."""
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


def answer_requests() -> None:
    """Reports that it is ready, then answers until stdin ends."""
    try:
        from dapo_async.reward.math_verifier import symbolic
    except ImportError as error:
        _say({"error": f"{error}; pip install math-verify"})
        return
    for gold, answer in WARM_UP:
        symbolic.equal_formulas(answer, gold)
    gc.collect()
    gc.freeze()  # so the children share these pages
    requests = Requests()
    _say({"ready": os.getpid()})
    while (request := requests.next()) is not None:
        reply = _answer(request, requests)
        if requests.ended:
            return
        _say(reply)


def _answer(request: dict[str, Any], requests: Requests) -> dict[str, Any]:
    """The reply of a child.

    The reason is `timeout` when its processor time ran out, and `failed` when it died or did not
    get its processor time before the clock deadline.
    """
    deadline = time.monotonic() + wall_s(request["timeout_s"])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for inherited in (reading, sys.stdin.fileno(), sys.stdout.fileno()):
            os.close(inherited)  # else a living child would hide the death of this process
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
                    _, status = os.waitpid(child, 0)  # the pipe closes only when the child ends
    finally:
        os.close(reading)
        if status is None:
            os.kill(child, signal.SIGKILL)  # not reaped yet, so the id is still this child's
            os.waitpid(child, 0)
    if status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return {"reason": "timeout"}
    reply: dict[str, Any] = json.loads(said) if status == 0 and said else {"reason": "failed"}
    return reply


def _judge_and_exit(request: dict[str, Any], writing: int) -> None:
    """Runs in the child: writes one verdict to the pipe and exits."""
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
    except Exception:  # noqa: BLE001 (math-verify may raise anything on a model's text; counted)
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
    equal = symbolic.equal_formulas(
        request["answer"], request["gold"], quantities=request.get("quantities", False)
    )
    return {"equal": equal}


def _say(reply: dict[str, Any]) -> None:
    """Writes one line; the process ends when its parent is dead."""
    try:
        os.write(sys.stdout.fileno(), json.dumps(reply).encode() + b"\n")
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    answer_requests()
