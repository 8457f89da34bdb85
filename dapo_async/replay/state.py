"""Data of the replay buffer: states of a group, answers to an offer, the snapshot of a checkpoint.

Only the buffer makes these; the replay actor writes the snapshot to disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from dapo_async.types import RejectReason


@dataclass(frozen=True, slots=True)
class Generating:
    """An admitted group that a worker generates."""

    worker: str
    # Version served at admission + max_staleness, or the deadline of the partial completions. The
    # attested deadline is never earlier, except when an engine is at fault.
    deadline: int
    continues: bool = False  # the worker continues partial completions of a lost engine


@dataclass(frozen=True, slots=True)
class Buffered:
    """An accepted group that waits for a take."""

    worker: str
    deadline: int  # oldest_version + max_staleness
    oldest_version: int  # as its engine attested, per token
    payload: Any  # opaque: what the train batch refers to
    num_response_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Taken:
    """A group in the learner's step."""

    version: int  # of the learner at the take
    group: Buffered  # a checkpoint within the step keeps the group as a buffered one


class OfferOutcome(StrEnum):
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    EVICTED = "evicted"  # its deadline had passed
    REFUSED = "refused"


class Refusal(StrEnum):
    """Why an offer belongs to no open admission. A refused offer changes nothing."""

    CLOSED = "closed"  # the run ended
    FOREIGN_INCARNATION = "foreign_incarnation"  # of the weights of another incarnation of the run
    UNKNOWN = "unknown"  # never admitted
    ENDED = "ended"  # evicted, failed with its worker, or already offered


@dataclass(frozen=True, slots=True)
class OfferResult:
    outcome: OfferOutcome
    reason: RejectReason | Refusal | None = None  # set when rejected or refused


@dataclass(frozen=True, slots=True)
class BufferState:
    """Snapshot of the buffer for a checkpoint: plain values; payloads are stored beside them.

    No group is generating after a resume. Those that were, in `reissue`, keep their id and credit
    and are admitted once more.
    """

    version: int  # of the learner
    next_step: int
    admitted: int
    ended: Mapping[str, int]  # outcome or reject reason → groups
    failures: Mapping[str, int]
    streak: Mapping[str, int]  # consecutive rejects by reason
    acceptance: Mapping[str, Any]  # of the step that is being filled
    reissue: tuple[int, ...]  # group ids, ascending
    buffered: Mapping[int, Buffered]  # by group id, in the order of their offers

    def to_json(self) -> dict[str, Any]:
        """All values except the payloads."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["buffered"] = [
            {
                "group_id": group_id,
                "worker": group.worker,
                "deadline": group.deadline,
                "oldest_version": group.oldest_version,
                "num_response_tokens": group.num_response_tokens,
            }
            for group_id, group in self.buffered.items()
        ]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], payloads: Mapping[int, Any]) -> BufferState:
        """Reads `to_json` back; `payloads` by group id, one for each buffered group."""
        buffered = {}
        for entry in values["buffered"]:
            fields = dict(entry)
            group_id = fields.pop("group_id")
            buffered[group_id] = Buffered(**fields, payload=payloads[group_id])
        return cls(**{**values, "reissue": tuple(values["reissue"]), "buffered": buffered})
