"""What every actor of a run does now: stacks, tasks, states and counts, in one text file.

For a run that seems to hang. It is written on SIGUSR1 (`dapo-async dump RUN_DIR`), and before the
end of a run that fails. Actors that do not answer are named in it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from dapo_async.runtime.system import System
from dapo_async.tracking.run_dir import DUMP_SIGNAL, RunDir
from dapo_async.utils.files import atomic_write
from dapo_async.utils.state_clock import StateClock
from dapo_async.utils.thread_stack import process_dump

ANSWER_S = 3.0  # an actor whose event loop runs answers within it


async def write_dump(system: System, run_dir: RunDir, clock: StateClock, *, why: str) -> Path:
    """Asks every actor; returns the file. Raises OSError when the disk refuses it."""
    actors = system.every_actor
    answers = await asyncio.gather(
        *(actor.within(ANSWER_S).dump() for actor in actors), return_exceptions=True
    )
    states = ", ".join(f"{name} {state}" for name, state in system.supervisor.states.items())
    parts = [
        f"why: {why}\nat: {time.strftime('%Y-%m-%d %H:%M:%S')}",
        _part("driver", process_dump(clock, states)),
    ]
    for actor, answer in zip(actors, answers, strict=True):
        text = f"no answer: {answer}" if isinstance(answer, BaseException) else answer
        parts.append(_part(actor.name, text))
    path = run_dir.new_dump()
    await asyncio.to_thread(atomic_write, path, "\n\n".join(parts) + "\n")
    return path


def _part(name: str, text: str) -> str:
    return f"=== {name}\n{text}"


def request_dump(root: Path, *, timeout_s: float, say: Callable[[str], None]) -> Path:
    """`dapo-async dump`: asks the driver of the run in `root` for a dump, and returns it.

    Raises ValueError where no driver runs, or runs on another machine, and TimeoutError.
    """
    run_dir = RunDir(root)
    if not run_dir.driver.exists() or not run_dir.is_locked():
        raise ValueError(f"no run is running in {root}; give the folder that a run has printed")
    driver = json.loads(run_dir.driver.read_text())
    if driver["host"] != socket.gethostname():
        raise ValueError(
            f"the driver of {root} runs on {driver['host']}; run this command there, or send "
            f"SIGUSR1 to process {driver['pid']}"
        )
    before = set(run_dir.dumps.glob("*.txt"))
    os.kill(driver["pid"], DUMP_SIGNAL)
    say(f"asked the driver, process {driver['pid']}")
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        if new := set(run_dir.dumps.glob("*.txt")) - before:
            return new.pop()
        time.sleep(0.1)
    raise TimeoutError(
        f"the driver of {root} wrote no dump within {timeout_s:g} s: its event loop hangs; "
        f"py-spy dump --pid {driver['pid']} shows where"
    )
