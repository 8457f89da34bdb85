"""Time accounting: each actor's wall clock, split into named states that add up to its time.

Every actor owns one `StateClock` and hands its spans to the driver. Timeline, idle shares and
waits all come from these spans and from nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """One stay in one state; times are seconds since the epoch."""

    state: str
    start_s: float
    end_s: float
    detail: str = ""


class StateClock:
    """Always in exactly one state. Thread-safe. `began_s` is when the clock was made."""

    def __init__(self, actor: str, *, state: str = "start") -> None:
        self.actor = actor
        # One monotonic clock, anchored once at the epoch: spans never overlap, even when the
        # system time is set back.
        self._anchor_s = time.time() - time.monotonic()
        self._lock = threading.Lock()
        self.began_s = self._since_s = self.now_s()
        self._state, self._detail = state, ""
        self._spans: list[Span] = []

    def now_s(self) -> float:
        return self._anchor_s + time.monotonic()

    @property
    def state(self) -> str:
        return self._state

    def enter(self, state: str, detail: str = "") -> None:
        """Ends the running span and begins the next; the same state and detail change nothing."""
        with self._lock:
            if (state, detail) == (self._state, self._detail):
                return
            now_s = self.now_s()
            self._spans.append(Span(self._state, self._since_s, now_s, self._detail))
            self._state, self._detail, self._since_s = state, detail, now_s

    @contextmanager
    def during(self, state: str, detail: str = "") -> Iterator[None]:
        """Enters `state`, and returns to the previous state also when the block raises."""
        before, before_detail = self._state, self._detail
        self.enter(state, detail)
        try:
            yield
        finally:
            self.enter(before, before_detail)

    def take_spans(self) -> list[Span]:
        """The spans up to now, each given once. The running span is cut here and continues."""
        with self._lock:
            now_s = self.now_s()
            running = Span(self._state, self._since_s, now_s, self._detail)
            spans, self._spans = [*self._spans, running], []
            self._since_s = now_s
            return spans
