"""Just-in-time admission: no more groups are out than the learner can soon take.

Credits bound how many groups may be out; they say nothing about how many should be. When the
learner is the bottleneck, groups that start with every credit finish early, wait in the buffer, and
are trained at the largest staleness that is allowed. The pacer lowers the number of groups until
a batch is complete about when the learner asks for it. When the learner has to wait, it raises the
number again. The credits stay the hard bound.

Called by the replay actor. In: when the learner asks for a batch and gets it. Out: how many groups
may start now, and when the next one may. Times are seconds of any clock that only rises.
"""

from __future__ import annotations

import math
from collections import deque

WINDOW = 6  # steps whose smallest surplus says by how much the limit may fall
STEP_TIMES = 8  # steps of which the shortest predicts the next one
MARGIN = 0.15  # finished groups that stay in reserve, as a share of a batch
WAIT = 0.01  # a longer wait of the learner, as a share of its step, is too long
FIRST_PAUSE, LONGEST_PAUSE = 8, 128  # steps without a lower limit after a wait; doubles each time
CALM = 64  # steps without a wait that halve the pause


class Pacer:
    """Holds the number of groups that are out at a limit, and moves the limit.

    A group is out while it generates, while it is finished, and while the learner trains it: the
    groups of a batch count as consumed one by one over the expected duration of the step. So
    admissions spread over the step and do not come in a wave after each take.
    """

    def __init__(self, *, groups_per_step: int, credits: int) -> None:
        """Starts at the limit `credits`, which means: without any pacing."""
        self.limit = float(credits)
        self._n, self._credits = groups_per_step, credits
        self._surplus: deque[int] = deque(maxlen=WINDOW)
        self._step_s: deque[float] = deque(maxlen=STEP_TIMES)
        self._asked_s: float | None = None  # when the learner asked; None: it has a batch
        self._missing = 0  # groups that a batch lacked when the learner asked
        self._took_s: float | None = None
        self._pause, self._paused, self._calm = FIRST_PAUSE, 0, 0

    def asks(self, now_s: float, *, finished: int) -> None:
        """The learner ended its step and asks for a batch; `finished` groups are buffered."""
        if self._asked_s is not None:
            return  # it asks again after a passed deadline
        if self._took_s is not None:
            self._step_s.append(now_s - self._took_s)
        self._asked_s = now_s
        surplus = finished - self._n
        self._missing = max(0, -surplus)
        self._surplus.append(max(0, surplus))

    def took(self, now_s: float) -> None:
        """The learner has its batch. Moves the limit."""
        assert self._asked_s is not None, "took without asks"
        waited_s, self._asked_s, self._took_s = now_s - self._asked_s, None, now_s
        self._paused = max(0, self._paused - 1)
        if not self._step_s:
            self._surplus.clear()  # the first batch: nothing is known yet
        elif waited_s > WAIT * min(self._step_s):
            self._raise()
        else:
            self._calm += 1
            if self._calm % CALM == 0:
                self._pause = max(FIRST_PAUSE, self._pause // 2)
            if self._paused == 0:
                self._lower()

    def room(self, now_s: float, *, out: int) -> int:
        """How many groups may start now, when `out` groups generate or are finished."""
        if self.limit >= self._credits:
            return self._credits
        return max(0, math.floor(self.limit - out - self._unconsumed(now_s) + 1e-9))

    def next_start_s(self, now_s: float, *, out: int) -> float | None:
        """When a group may start if nothing else happens. None: now, or not before an event."""
        over = out + 1 - self.limit  # groups that have to be consumed until then, if negative
        if self.room(now_s, out=out) > 0 or over > 0 or self._took_s is None:
            return None
        return max(now_s, self._took_s + min(self._step_s) * (1 + over / self._n))

    def _unconsumed(self, now_s: float) -> float:
        """Groups of the batch in training that count as not consumed yet."""
        if self._asked_s is not None or self._took_s is None or not self._step_s:
            return 0.0
        return self._n * max(0.0, 1 - (now_s - self._took_s) / min(self._step_s))

    def _raise(self) -> None:
        """The learner waited: half of the way back to all credits, and a longer pause."""
        self.limit = min(
            self._credits, self.limit + max(self._missing, self._credits - self.limit) / 2
        )
        if self._credits - self.limit < 1:
            self.limit = float(self._credits)
        self._paused, self._pause = self._pause, min(LONGEST_PAUSE, 2 * self._pause)
        self._calm = 0
        self._surplus.clear()

    def _lower(self) -> None:
        """A window without a wait: half of the smallest surplus above the margin goes."""
        if len(self._surplus) < WINDOW:
            return
        spare = min(self._surplus) - math.ceil(MARGIN * self._n)
        if spare > 0:
            self.limit = max(float(self._n), self.limit - math.ceil(spare / 2))
        self._surplus.clear()
