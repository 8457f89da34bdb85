"""Finds an actor that answers its pings and gets nowhere, such as ranks that wait for each other.

In: what the thread of an actor does, with every answer to a ping. Out: a line for the user, once
for each standstill. The supervisor asks; a deadline of the work ends the run later. Pure.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

LEAST_S = 60.0  # in one line of code; a decode step never takes as long
TIMES_MEDIAN = 10.0  # of the newest minibatches
FIRST_S = 600.0  # of a learner's first minibatch, which compiles and warms up
KEPT = 50  # minibatches


@dataclass(slots=True)
class MinibatchTimes:
    """How long the minibatches of a learner take."""

    num_ended: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, seconds: float) -> None:
        self.num_ended += 1
        self.seconds.append(seconds)

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def standstill_s(self) -> float:
        """A rank that is in the same line of one minibatch for so long gets nowhere."""
        return FIRST_S if self.median_s is None else max(LEAST_S, TIMES_MEDIAN * self.median_s)


@dataclass(frozen=True, slots=True)
class _Place:
    line: str
    work: int
    since_s: float


class Standstill:
    """Of actors that work together: each line names all of them."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._places: dict[str, _Place] = {}  # by actor that works
        self._told: set[str] = set()

    def seen(
        self, name: str, line: str | None, *, limit_s: float = LEAST_S, work: int = 0
    ) -> str | None:
        """`name` is in `line` of its piece of work number `work`; None: it does not work.

        Returns who is where and for how long, if `name` has been there for `limit_s`.
        """
        now_s, before = self._now_s(), self._places.get(name)
        if line is None or before is None or (before.line, before.work) != (line, work):
            self._places.pop(name, None)
            self._told.discard(name)
            if line is not None:
                self._places[name] = _Place(line, work, now_s)
            return None
        if now_s - before.since_s < limit_s or name in self._told:
            return None
        self._told.update(self._places)
        return ", ".join(
            f"{each} in {place.line} for {now_s - place.since_s:.0f} s"
            for each, place in sorted(self._places.items())
        )
