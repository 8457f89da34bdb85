"""Law 6: each actor's wall clock, split into disjoint named states that add up to the elapsed time.

Every actor owns one `StateClock`; the timeline, the idle shares and the waits all come from these spans and from nothing else.
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
    """Always in exactly one state; `enter` closes the running span and opens the next. Thread-safe."""

    def __init__(self, actor: str, *, state: str = "start") -> None:
        self.actor = actor
        # One monotonic clock anchored once at the epoch: spans never overlap, whatever the system time does.
        self._anchor_s = time.time() - time.monotonic()
        self._lock = threading.Lock()
        self._state, self._detail, self._since_s = state, "", self.now_s()
        self._spans: list[Span] = []

    def now_s(self) -> float:
        return self._anchor_s + time.monotonic()

    @property
    def state(self) -> str:
        return self._state

    def enter(self, state: str, detail: str = "") -> None:
        """Changes the state; entering the state one is in with the same detail changes nothing."""
        with self._lock:
            if (state, detail) == (self._state, self._detail):
                return
            now_s = self.now_s()
            self._spans.append(Span(self._state, self._since_s, now_s, self._detail))
            self._state, self._detail, self._since_s = state, detail, now_s

    @contextmanager
    def during(self, state: str, detail: str = "") -> Iterator[None]:
        """Enters `state` and goes back to the state before, whatever happens inside."""
        before, before_detail = self._state, self._detail
        self.enter(state, detail)
        try:
            yield
        finally:
            self.enter(before, before_detail)

    def take_spans(self) -> list[Span]:
        """Hands over the spans up to now, each once: the running one is cut here and goes on."""
        with self._lock:
            now_s = self.now_s()
            spans, self._spans = (
                [*self._spans, Span(self._state, self._since_s, now_s, self._detail)],
                [],
            )
            self._since_s = now_s
            return spans
