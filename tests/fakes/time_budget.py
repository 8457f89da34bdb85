"""A limit on the time of all tests of a folder together, without pytest-timeout."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

EXIT_CODE = 1


class TimeBudget:
    """Of the tests that run in `spent_by`: the first one that begins when `together_s` have gone
    fails, and all later ones. A test that takes longer than `each_s` ends the session. So the tests
    take at most the sum of both."""

    def __init__(self, *, together_s: float, each_s: float) -> None:
        self._together_s, self._each_s = together_s, each_s
        self._spent_s = 0.0

    @contextmanager
    def spent_by(self, item: pytest.Item) -> Iterator[None]:
        """The body runs `item`. It may hang in a kernel, so the end of the session is not left to
        the interpreter."""
        began_s = time.monotonic()
        limit = threading.Timer(self._each_s, self._end, [item])
        limit.daemon = True
        limit.start()
        try:
            yield
        finally:
            limit.cancel()
            self._spent_s += time.monotonic() - began_s

    def check(self) -> None:
        """Fails the test that is about to begin if there is no time left."""
        if self._spent_s > self._together_s:
            pytest.fail(
                f"the tests before it took {self._spent_s:.0f} s, more than the "
                f"{self._together_s:g} s that all of them may take"
            )

    def _end(self, item: pytest.Item) -> None:
        capture = item.config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            capture.suspend_global_capture(in_=True)
        print(f"\n{item.nodeid} takes longer than {self._each_s:g} s", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
        os._exit(EXIT_CODE)
