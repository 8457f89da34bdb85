"""`train --supervise`: runs training in a child process, and starts it again when it dies or fails.

In: the command line of `train` and the run directory. Out: the exit code of the last child. Each
further child resumes the run from its newest checkpoint. The child is restarted when

- it is killed, or its machine's Ray ends it,
- it fails, unless `summary.json` says that a restart does not help,
- it hangs: it writes to a pipe each second, and has not done so for `silence_s`.

The budget refills whenever a child has saved a newer checkpoint than the one before. This module
imports neither torch nor Ray, so the parent is small and outlives both.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.checkpoint_dir import CheckpointFolder
from dapo_async.utils.readable import is_readable
from dapo_async.utils.restart_budget import RestartBudget

PULSE_FD = "DAPO_ASYNC_PULSE_FD"  # environment variable: where the child writes
RESTARTED = "DAPO_ASYNC_RESTARTED"  # environment variable: set for each child but the first
BEAT_S = 1.0
FAILED, WRONG_INPUT = 1, 2  # exit codes
RESTARTS = 5  # without a newer checkpoint
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class LifeSign:
    """In the child: shows the parent that the process runs, and while it trains, its event loop.

    When a run starts and ends, imports and files may keep the event loop for seconds. Does nothing
    without a parent.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._pipe = int(environment[PULSE_FD]) if PULSE_FD in environment else None
        self._turns: int | None = None  # of the event loop; None: it need not turn

    def start(self) -> None:
        """Writes from a thread of its own, until the process ends."""
        if self._pipe is None:
            return
        os.set_blocking(self._pipe, False)
        threading.Thread(target=self._write, daemon=True, name="life sign").start()

    @asynccontextmanager
    async def of_the_loop(self) -> AsyncIterator[None]:
        """The event loop of the body has to turn all the time."""
        turning = asyncio.create_task(self._turn())
        try:
            yield
        finally:
            turning.cancel()
            self._turns = None

    async def _turn(self) -> None:
        for turns in itertools.count():
            self._turns = turns
            await asyncio.sleep(BEAT_S / 2)

    def _write(self) -> None:
        assert self._pipe is not None
        seen: int | None = None
        while True:
            turns = self._turns
            if turns is None or turns != seen:
                try:
                    os.write(self._pipe, b".")
                except BlockingIOError:
                    pass  # the parent is late
                except OSError:
                    return  # the parent is gone; training goes on
            seen = turns
            time.sleep(BEAT_S)


def is_restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """In the child: whether another one began the run. That one may have trained all steps."""
    return RESTARTED in environment


@dataclass(frozen=True, slots=True)
class Ended:
    """How one child has ended."""

    code: int  # negative: the signal that killed it
    hung: bool

    @property
    def line(self) -> str:
        if self.hung:
            return "the driver hung"
        if self.code < 0:
            return f"the driver was killed by {signal.Signals(-self.code).name}"
        return f"the driver ended with exit code {self.code}"


class RunKeeper:
    """Runs children one after another until one of them ends the run."""

    def __init__(
        self,
        root: Path,
        *,
        silence_s: float,
        say: Callable[[str], None],
        nodes_wait_s: float = 0.0,
        program: Sequence[str] = (sys.executable, "-m", "dapo_async"),
    ) -> None:
        """`nodes_wait_s`: how long a child waits for nodes; the first one in vain is the last."""
        self._nodes_wait_s = nodes_wait_s
        self._run_dir, self._silence_s, self._say = RunDir(root), silence_s, say
        self._program = program
        self._signal: signal.Signals | None = None  # that was received
        self._child: subprocess.Popen[bytes] | None = None

    def keep(self, first: Sequence[str]) -> int:
        """Runs `train` with the words `first`, then `--resume`; returns the last exit code."""
        before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        try:
            return self._keep(first)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _keep(self, first: Sequence[str]) -> int:
        words, budget, num_starts = list(first), RestartBudget(RESTARTS), 0
        while True:
            newest, began_s = self._newest, time.time()
            ended = self._run(words, is_first=num_starts == 0)
            num_starts += 1
            code = ended.code if ended.code >= 0 else 128 - ended.code
            if code == WRONG_INPUT and num_starts > 1:
                code = FAILED  # the input was right: a run began with it
            if not self._may_restart(ended, num_starts=num_starts, since_s=began_s):
                return code
            if self._newest != newest:
                budget = RestartBudget(RESTARTS)
            pause_s = budget.spend(time.monotonic())
            if pause_s is None:
                reason = self._summary(since_s=began_s).get("reason")
                self._say(
                    f"{ended.line}; it was restarted {RESTARTS} times without a newer checkpoint, "
                    f"so the run ends{f': {reason}' if reason else ''}"
                )
                return code
            self._say(
                f"{ended.line}; resuming the run{f' in {pause_s:g} s' if pause_s else ''} "
                f"({budget.spent} of {RESTARTS} restarts without a newer checkpoint)"
            )
            if self._wait_for_signal(pause_s):
                return code
            words = ["--resume", str(self._run_dir.root)]

    def _may_restart(self, ended: Ended, *, num_starts: int, since_s: float) -> bool:
        """Whether another child can do better."""
        if ended.code == 0 or self._signal is not None or not self._run_dir.config.exists():
            return False
        if ended.code == WRONG_INPUT and not ended.hung:
            # The first one was checked. Now the cluster may be away, or may have lost nodes.
            waited = 0 < self._nodes_wait_s <= time.time() - since_s
            return num_starts > 1 and not waited
        if ended.code < 0 or ended.hung:
            return True
        return bool(self._summary(since_s=since_s).get("restartable", True))

    def _summary(self, *, since_s: float) -> dict[str, Any]:
        """What the child that began at `since_s` has written; empty if it has written nothing."""
        path = self._run_dir.summary
        if not path.exists() or path.stat().st_mtime < since_s:
            return {}
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary

    def _run(self, words: Sequence[str], *, is_first: bool) -> Ended:
        """One child, from its start to its end."""
        restarted = {} if is_first else {RESTARTED: "1"}
        reader, writer = os.pipe()
        try:
            self._child = child = subprocess.Popen(
                [*self._program, "train", *words],
                env={**os.environ, **restarted, PULSE_FD: str(writer)},
                pass_fds=[writer],
            )
            os.close(writer)
            if self._signal is not None:  # it came before there was a child
                child.send_signal(self._signal)
            hung = self._watch(child, reader)
            return Ended(child.wait(), hung)
        finally:
            self._child = None
            os.close(reader)

    def _watch(self, child: subprocess.Popen[bytes], reader: int) -> bool:
        """Waits for the end of the child; kills it and returns True if it hangs.

        Until its first beat it imports and checks its input, which has no limit here.
        """
        last_s: float | None = None
        while child.poll() is None:
            ready = is_readable(reader, BEAT_S / 2)
            now_s = time.monotonic()
            if ready:
                if os.read(reader, 4096):
                    last_s = now_s
                else:  # closed: the child is about to end
                    time.sleep(BEAT_S / 10)
            elif last_s is not None and now_s - last_s > self._silence_s:
                self._say(f"the driver did not run for {self._silence_s:g} s; ending it")
                child.kill()
                child.wait()
                return True
        return False

    def _wait_for_signal(self, seconds: float) -> bool:
        """Waits; returns early, and whether a signal has come."""
        until_s = time.monotonic() + seconds
        while self._signal is None and time.monotonic() < until_s:
            time.sleep(min(0.2, seconds))
        return self._signal is not None

    def _pass_on(self, number: int, frame: object) -> None:
        self._signal = signal.Signals(number)
        if self._child is not None:
            self._child.send_signal(number)

    @property
    def _newest(self) -> int:
        """Version of the newest checkpoint; -1 before the first one."""
        return max(CheckpointFolder(self._run_dir.checkpoints).versions(), default=-1)
