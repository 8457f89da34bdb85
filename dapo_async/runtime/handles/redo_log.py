"""What the learner has done since its newest checkpoint, so that a restarted one can do it again.

In: the calls that change its state, as they end. Out: the same calls, in order. The entries keep
the batches in Ray's object store, which spills to disk when memory is short.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path

from dapo_async.types import TrainBatch

MOST_STEPS = 100  # since the newest checkpoint; more of them are not kept


@dataclass(frozen=True, slots=True)
class Done:
    """One call of the learner."""

    step: int
    batch: TrainBatch | None  # None: the step was ended before its last minibatch


class RedoLog:
    """`version`: of the newest checkpoint, or 0; `state`: its `state/` folder, or None."""

    def __init__(self, version: int = 0, state: Path | None = None) -> None:
        self.version, self.state = version, state
        self.entries: deque[Done] = deque()

    @property
    def fault(self) -> str | None:
        """Why the learner can't be brought to where it was; None: it can."""
        if not self.entries or self.entries[0].step <= self.version:
            return None
        return (
            f"the newest checkpoint is older than the last {MOST_STEPS} steps, which can be done "
            "again (train.checkpoint_every_steps)"
        )

    def add(self, batch: TrainBatch) -> None:
        """A minibatch was trained."""
        self._append(Done(batch.learner_version, batch))

    def end_step(self) -> None:
        """The step of the newest minibatch was ended."""
        self._append(Done(self.entries[-1].step, None))

    def _append(self, done: Done) -> None:
        self.entries.append(done)
        self._forget(done.step - MOST_STEPS)

    def saved(self, version: int, state: Path) -> None:
        """A checkpoint of `version` is on disk."""
        self.version, self.state = version, state
        self._forget(version - 1)

    def _forget(self, step: int) -> None:
        """Drops this step and those before it."""
        while self.entries and self.entries[0].step <= step:
            self.entries.popleft()
