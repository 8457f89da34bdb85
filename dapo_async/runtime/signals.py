"""SIGINT and SIGTERM of a run: the first ends its task, and with it the run, in order; one more ends the process."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

SAME_S = 0.5  # a wrapper may pass on what its whole process group has got already: that is one Ctrl-C, not two


class Interrupts:
    """`first` is the signal that ended the run, None so far. `at_first` is called when it comes; `at_once`, for one more, must not return."""

    def __init__(
        self,
        say: Callable[[str], None],
        at_first: Callable[[signal.Signals], None],
        at_once: Callable[[signal.Signals], None],
    ) -> None:
        self.first: signal.Signals | None = None
        self._say, self._at_first, self._at_once, self._first_s = say, at_first, at_once, 0.0

    def listen(self, task: asyncio.Task[None]) -> None:
        """Takes both signals over, for `task` of the running loop."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._receive, task, number)

    def _receive(self, task: asyncio.Task[None], number: signal.Signals) -> None:
        if self.first is None:
            self.first, self._first_s = number, time.monotonic()
            self._say(f"{number.name}: ending with a checkpoint; once more ends at once, without")
            task.cancel()
            self._at_first(number)
        elif time.monotonic() - self._first_s > SAME_S:
            self._at_once(number)
