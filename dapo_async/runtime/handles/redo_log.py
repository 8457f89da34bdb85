"""What the learner has done since its newest checkpoint, so that a restarted one can do it again.

In: the calls that change its state, as they end. Out: the same calls, in order. The entries keep
the batches in Ray's object store, which spills to disk when memory is short.

The calls since the checkpoint before the newest one are kept, too: if the newest one turns out to
be damaged, a restart begins there.
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
    """`version`: of the checkpoint at which a restart begins, or 0; `state`: its `state/` folder,
    or None."""

    def __init__(self, version: int = 0, state: Path | None = None) -> None:
        self.version, self.state = version, state
        self._older: tuple[int, Path | None] | None = None  # the checkpoint before
        self._kept: deque[Done] = deque()

    @property
    def entries(self) -> list[Done]:
        """The calls since the checkpoint."""
        return [done for done in self._kept if done.step >= self.version]

    @property
    def oldest(self) -> int:
        """The version at which a restart may begin, if the newest checkpoint is damaged."""
        return self._older[0] if self._older is not None else self.version

    @property
    def fault(self) -> str | None:
        """Why the learner can't be brought to where it was; None: it can."""
        entries = self.entries
        if not entries or entries[0].step == self.version:
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
        self._append(Done(self._kept[-1].step, None))

    def _append(self, done: Done) -> None:
        self._kept.append(done)
        self._forget(done.step - MOST_STEPS)

    def saved(self, version: int, state: Path) -> None:
        """A checkpoint of `version` is on disk."""
        self._older = self.version, self.state
        self.version, self.state = version, state
        self._forget(self.oldest - 1)

    def step_back(self) -> bool:
        """The newest checkpoint is damaged: a restart begins at the one before. False: that one is
        gone, or not all calls since then are kept."""
        if self._older is None:
            return False
        version, state = self._older
        first = self._kept[0].step if self._kept else self.version
        if first > version or (state is not None and not state.is_dir()):
            return False
        (self.version, self.state), self._older = self._older, None
        return True

    def _forget(self, step: int) -> None:
        """Drops this step and those before it."""
        while self._kept and self._kept[0].step <= step:
            self._kept.popleft()
