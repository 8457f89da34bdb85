"""SIGINT and SIGTERM: the first signal ends the run in order, one more ends the process at once."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

# A wrapper may pass on a signal that the whole process group has received already: a second signal
# within this time belongs to the same Ctrl-C.
SAME_S = 0.5


class Interrupts:
    """`first` is the first signal, None before it.

    `at_first` is called after the first signal; `at_once` after one more, and must not return.
    While `is_ending`, the first signal changes nothing: the run ends in order already.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        at_first: Callable[[signal.Signals], None],
        at_once: Callable[[signal.Signals], None],
        *,
        is_ending: Callable[[], bool] = lambda: False,
    ) -> None:
        self._is_ending = is_ending
        self.first: signal.Signals | None = None
        self._say, self._at_first, self._at_once, self._first_s = say, at_first, at_once, 0.0

    def listen(self, task: asyncio.Task[None]) -> None:
        """Installs the handlers of both signals for `task`, in the running loop."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._receive, task, number)

    def _receive(self, task: asyncio.Task[None], number: signal.Signals) -> None:
        if self.first is None:
            self.first, self._first_s = number, time.monotonic()
            if self._is_ending():
                self._say(f"{number.name}: the run is ending; a second signal ends it at once")
                return
            self._say(
                f"{number.name}: the run ends with a checkpoint; a second signal ends it without"
            )
            task.cancel()
            self._at_first(number)
        elif time.monotonic() - self._first_s > SAME_S:
            self._at_once(number)
