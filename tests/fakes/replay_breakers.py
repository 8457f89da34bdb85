"""Buffers, ledgers and publishers that each break a guarantee by one line.

The replay tests show that their checks notice each of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from replay_world import World

from dapo_async.replay import GroupOutcome, ReplayBuffer
from dapo_async.replay.ledger import Ledger
from dapo_async.types import RejectReason


class DropsARelease(ReplayBuffer):
    def release(self, group_ids: Iterable[int]) -> None:
        pass


class LosesTheCreditOfARejectedGroup(ReplayBuffer):
    def _end(self, group_id: int, ending: GroupOutcome | RejectReason) -> None:
        self._ledger.end(group_id, ending)


class TakesWithoutWaitingForStragglers(ReplayBuffer):
    def _overload_after_take(self, learner_version: int) -> None:
        return None


class TakesInOrderOfCompletion(ReplayBuffer):
    def _pick(self) -> list[int]:
        return list(self._buffered)[: self.groups_per_take]

    def _overload_after_take(self, learner_version: int) -> None:
        return None

    def evict_doomed(self, learner_version: int) -> dict[int, str]:
        return {}


class AdmitsPastTheEnd(ReplayBuffer):
    def admissible(self) -> int:
        return self._credits.free


class EndsTwice(Ledger):
    def end(self, group_id: int, ending: GroupOutcome | RejectReason) -> None:
        super().end(group_id, ending)
        self._ended[ending] += ending is GroupOutcome.TRAINED


class ForgetsAnEnding(Ledger):
    def end(self, group_id: int, ending: GroupOutcome | RejectReason) -> None:
        self._open.remove(group_id)


class ForgetsToCloseAnAdmission(Ledger):
    def end(self, group_id: int, ending: GroupOutcome | RejectReason) -> None:
        self._ended[ending] += 1


def with_ledger(kind: type[Ledger]) -> type[ReplayBuffer]:
    class Sabotaged(ReplayBuffer):
        def __init__(self, **knobs: Any) -> None:
            super().__init__(**knobs)
            self._ledger = kind()

    return Sabotaged


class SkipsAPublish(World):
    """The second version never reaches the engines, but replay is called as if it had."""

    def finish_publish(self) -> None:
        before = dict(self.engine_versions)
        super().finish_publish()
        if self.version == 2:
            self.engine_versions = before


class ReleasesBeforeServing(World):
    def finish_publish(self) -> None:
        assert self.publishing is not None
        self.buffer.release(self.publishing)
