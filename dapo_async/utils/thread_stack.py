"""What the threads and tasks of this process do now: it tells what hangs from what waits for it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from dapo_async.utils.state_clock import StateClock

PACKAGE = Path(__file__).resolve().parent.parent


def stack_location(thread: int) -> str | None:
    """The innermost line in this package and the innermost function of all.

    Such as `model/mesh.py:42 sum > all_reduce`; None when the thread has ended.
    """
    frame = sys._current_frames().get(thread)
    if frame is None:
        return None
    stack = traceback.extract_stack(frame)
    last, own = stack[-1], [each for each in stack if PACKAGE in Path(each.filename).parents]
    if not own:
        return last.name
    place = f"{Path(own[-1].filename).relative_to(PACKAGE)}:{own[-1].lineno} {own[-1].name}"
    return place if own[-1] is last else f"{place} > {last.name}"


def process_dump(clock: StateClock, counts: object = None) -> str:
    """What this process does now. `counts`: anything that tells what it has in hand."""
    lines = [f"pid {os.getpid()} on {socket.gethostname()}", f"state: {clock.state}"]
    if counts is not None:
        lines.append(str(counts))
    return "\n".join([*lines, every_stack()])


def every_stack() -> str:
    """The stack of each thread, and where each task of the running event loop waits."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()  # it runs this function
    ]
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        parts.append(f"task {task.get_name()}\n{''.join(_awaited(task))}")
    return "\n".join(parts)


def _awaited(task: asyncio.Task[object]) -> list[str]:
    """One line per coroutine that the task is in, the innermost last."""
    lines: list[str] = []
    waiting: Any = task.get_coro()
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None)
        if frame is not None:
            code = frame.f_code
            lines.append(f"  {code.co_filename}:{frame.f_lineno} {code.co_name}\n")
        waiting = getattr(waiting, "cr_await", None)
    return lines
