"""Just-in-time admission: no more groups are out than the learner can soon take.

Credits bound how many groups may be out; they say nothing about how many should be. When the
learner is the bottleneck, groups that start with every credit finish early, wait in the buffer, and
are trained at the largest staleness that is allowed. The pacer lowers the number of groups until
a batch is complete about when the learner asks for it. When the learner has to wait for groups, it
raises the number again. The credits stay the hard bound.

It also holds starts back while new weights are on their way to the engines. A group that starts a
moment later has a deadline one version later, so the learner waits less often for a late group.

Called by the replay actor. In: when the learner asks for a batch and gets it. Out: how many groups
may start now, and when the next one may. Times are seconds of any clock that only rises.
"""

from __future__ import annotations

from collections import deque

WINDOW = 6  # takes, at least, whose smallest surplus says by how much the limit may fall
STEP_TIMES = 8  # steps of which the shortest predicts the next one
ENGINES_WAIT = 0.25  # share of these takes at which engines have to wait for groups
MARGIN = 0.05  # finished groups that stay in reserve, as a share of a take
# How long the learner may wait for groups while the limit is low, in steps: per step, saved up at
# most, and owed at most. While it owes, the limit does not fall.
WAIT_PER_STEP, MOST_SAVED, MOST_OWED = 0.005, 0.1, 0.1
LONGEST_HOLD = 0.1  # of a step, for new weights


class Pacer:
    """Holds the number of groups that are out at a limit, and moves the limit.

    A group is out from its start until the learner gets it. If n groups are trained per step and
    the limit is L, a group is out for about L / n steps: this is about its staleness.
    """

    def __init__(self, *, groups_per_take: int, credits: int) -> None:
        """Starts at the limit `credits`, which means: without any limit."""
        self.limit = credits
        self._n, self._credits = groups_per_take, credits
        # Of the takes since the limit or the debt changed.
        self._surplus: deque[int] = deque()
        self._engines_wait: deque[bool] = deque()
        self._step_s: deque[float] = deque(maxlen=STEP_TIMES)
        self._version = -1  # of the learner
        self._version_s = self._began_s = 0.0  # when it asked first at this version, and began
        self._asked_s: float | None = None  # when the learner asked; None: it has a batch
        self._missing = 0  # groups that a batch lacked when the learner asked
        self._took_s = 0.0
        self._saved_s = 0.0  # of waiting; negative: owed
        self._raises, self._since_raise = 0, 0  # raises in a row, and takes since the last one

    def asks(self, now_s: float, *, version: int, finished: int, engines_wait: bool) -> None:
        """The learner at `version` asks for groups; `finished` ones are ready.

        `engines_wait`: an engine has free slots and gets no group.
        """
        if self._asked_s is not None:
            return  # it asks again after a passed deadline
        if version != self._version:
            if self._version >= 0:
                self._step_s.append(now_s - self._began_s)
            self._version, self._version_s = version, now_s
        self._asked_s = now_s
        self._missing = max(0, self._n - finished)
        self._surplus.append(max(0, finished - self._n))
        self._engines_wait.append(engines_wait)

    def took(self, now_s: float) -> None:
        """The learner has its groups. Moves the limit."""
        assert self._asked_s is not None, "took without asks"
        waited_s, elapsed_s = now_s - self._asked_s, now_s - self._took_s
        if self._took_s <= self._version_s:
            self._began_s = now_s  # the first take of this step
        self._asked_s, self._took_s = None, now_s
        self._since_raise += 1
        if not self._step_s:
            self._forget()  # the first step: nothing is known yet
            return
        step_s = min(self._step_s)
        self._saved_s = min(MOST_SAVED * step_s, self._saved_s + WAIT_PER_STEP * elapsed_s)
        if self._missing:  # else it waited for a deadline: more groups would not help
            self._saved_s = max(-MOST_OWED * step_s, self._saved_s - waited_s)
        if self._saved_s >= 0:
            self._lower()
        else:
            self._forget()
            self._raise()

    def room(self, now_s: float, *, out: int, served_version: int) -> int:
        """How many groups may start now.

        `out`: groups that generate or are finished. `served_version`: the oldest of any engine.
        """
        if now_s < self._held_until_s(served_version):
            return 0
        return self._credits if self.limit >= self._credits else max(0, self.limit - out)

    def next_start_s(self, now_s: float, *, served_version: int) -> float | None:
        """When groups may start even if nothing else happens. None: now, or not before an event."""
        until_s = self._held_until_s(served_version)
        return until_s if until_s > now_s else None

    def _held_until_s(self, served_version: int) -> float:
        """Not for ever: with slow publishes the engines would be empty most of the time."""
        if served_version >= self._version or not self._step_s:
            return 0.0
        return self._version_s + LONGEST_HOLD * min(self._step_s)

    @property
    def _lag(self) -> int:
        """Takes until a new limit shows: as many as a group is out for."""
        return -(-self.limit // self._n)

    def _raise(self) -> None:
        """By the groups that were missing; by more if the raise before was too low."""
        if not self._missing or self._since_raise < self._lag:
            return
        self._raises = self._raises + 1 if self._since_raise <= 2 * self._lag + 1 else 0
        most = (self._credits - self.limit) // 4 if self._raises else 0
        more = max(most, self._missing * 2**self._raises)
        self.limit = min(self._credits, self.limit + more)
        self._since_raise = 0

    def _lower(self) -> None:
        """By half of the spare groups: the smallest surplus of a window, without the margin.

        If engines seldom wait, they are about as fast as the learner, and a surplus covers their
        ups and downs: nothing is spare.
        """
        if len(self._surplus) < max(WINDOW, self._lag):
            return
        margin = -(-self._n // round(1 / MARGIN))
        spare = min(self._surplus) - margin
        if spare > 0 and sum(self._engines_wait) >= ENGINES_WAIT * len(self._engines_wait):
            self.limit = max(self._n, self.limit - (spare + 1) // 2)
            self._forget()
        else:
            self._surplus.popleft()
            self._engines_wait.popleft()

    def _forget(self) -> None:
        self._surplus.clear()
        self._engines_wait.clear()
