"""What became of the response tokens that the engines generated, as exact counts.

Engine, rollout worker and replay buffer each keep a `TokenBook`: the engine books what it
generates, and whoever ends tokens books how they end. The sum over all actors of an incarnation is

    generated + resumed = all outcomes + in_flight

so `in_flight` needs no count of its own, and tokens may change hands without an entry.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from dapo_async.types import Completion, RejectReason


class TokenOutcome(StrEnum):
    """How a generated token ends, unless its group is rejected for a `RejectReason`."""

    TRAINED = "trained"
    SKIPPED = "skipped"  # its step was not finite and changed nothing
    EVICTED = "evicted"  # its group was evicted, while it was generated or later
    FAILED = "failed"  # its worker gave the group up: verifier failed, or wrong weights
    REPEATED = "repeated"  # its engine was lost, and another one generates it again
    UNUSED = "unused"  # the run ended first
    EVALUATION = "evaluation"  # a response to a held-out prompt, on a rollout engine


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The book of one actor, or the sum of several, at one instant. All are tokens."""

    generated: int = 0  # drawn by an engine
    resumed: int = 0  # of finished groups that a checkpoint had
    accepted: int = 0  # of groups that passed the filters; they end later
    prefilled: int = 0  # prompt tokens read for the first time; siblings share one read
    recomputed: int = 0  # keys and values computed again: new weights, or a lost engine
    ended: Mapping[TokenOutcome | RejectReason, int] = field(default_factory=dict)

    def __add__(self, other: Self) -> TokenCounts:
        ended = Counter(self.ended)
        ended.update(other.ended)
        return TokenCounts(
            self.generated + other.generated,
            self.resumed + other.resumed,
            self.accepted + other.accepted,
            self.prefilled + other.prefilled,
            self.recomputed + other.recomputed,
            dict(ended),
        )

    @property
    def trained(self) -> int:
        return self.ended.get(TokenOutcome.TRAINED, 0)

    @property
    def in_flight(self) -> int:
        """On an engine, with a worker, in the buffer or in the learner's step."""
        return self.generated + self.resumed - sum(self.ended.values())

    def flat(self) -> dict[str, int]:
        """One number per metric name: `generated`, `trained`, `rejected`, …"""
        return {
            "prefilled": self.prefilled,
            "recomputed": self.recomputed,
            "generated": self.generated,
            "resumed": self.resumed,
            **{outcome.value: self.ended.get(outcome, 0) for outcome in TokenOutcome},
            "rejected": sum(self.ended.get(reason, 0) for reason in RejectReason),
            "in_flight": self.in_flight,
        }


class TokenBook:
    """Counts tokens. Thread-safe: an engine's thread and its user's event loop write to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._ended: Counter[TokenOutcome | RejectReason] = Counter()

    def generate(self, count: int) -> None:
        self._add("generated", count)

    def resume(self, count: int) -> None:
        self._add("resumed", count)

    def accept(self, count: int) -> None:
        self._add("accepted", count)

    def prefill(self, count: int) -> None:
        self._add("prefilled", count)

    def recompute(self, count: int) -> None:
        self._add("recomputed", count)

    def end(self, outcome: TokenOutcome | RejectReason, count: int) -> None:
        """`count` tokens of generated or resumed ones end."""
        with self._lock:
            self._ended[outcome] += count

    @property
    def counts(self) -> TokenCounts:
        with self._lock:
            return TokenCounts(**self._counts, ended=dict(self._ended))

    def _add(self, name: str, count: int) -> None:
        with self._lock:
            self._counts[name] += count


def num_tokens(completions: tuple[Completion | None, ...]) -> int:
    """Response tokens of the completions that there are."""
    return sum(len(each.token_ids) for each in completions if each is not None)
