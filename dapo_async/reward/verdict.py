"""What every verifier answers; evaluation and training judge by the same one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FAILED = "failed"  # the reason of a verdict that is none: the verifier died over it


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one response."""

    correct: bool | float  # a float in [0, 1] gives partial credit
    extracted: str | None  # the answer that was read; None: no answer found
    reason: str  # one word to count by: "correct", "wrong", "no_answer", …

    @property
    def accuracy(self) -> float:
        return float(self.correct)

    @property
    def failed(self) -> bool:
        """Nothing is known about the response: it must not count as wrong."""
        return self.reason == FAILED


class VerifierFailed(Exception):
    """A group has a verdict that failed, so it can't be trained: it ends as failed, which is counted by this text."""


Verifier = Callable[[str, str], Verdict]
"""`verify(response, gold) -> Verdict`; raises ValueError for an empty gold answer, which would make an empty response right."""
