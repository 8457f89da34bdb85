"""The answer of every verifier. Training, evaluation and `dapo-async grade` use the same type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

FAILED = "failed"  # the reason when the verifier died, so that nothing is known about the response
# How failures of groups are counted: the verifier has judged none of its responses, or too few.
VERIFIER_FAILED = "verifier failed"
TOO_FEW_VERDICTS = "too few verdicts"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of one response."""

    correct: bool | float  # a float in [0, 1] gives partial credit
    extracted: str | None  # the answer that the verifier read; None: it found none
    reason: str  # one word, which is counted: "correct", "wrong", "no_answer", …
    detail: str = ""  # why the verdict failed, for a message

    @property
    def accuracy(self) -> float:
        return float(self.correct)

    @property
    def failed(self) -> bool:
        """The verifier died over the response, which must not count as wrong."""
        return self.reason == FAILED


class VerifierFailed(Exception):
    """The verifier failed on so many responses of a group that it can't be trained; the text is
    counted.

    `detail`: what the verifier did, for a message.
    """

    def __init__(self, why: str = VERIFIER_FAILED, detail: str = "") -> None:
        super().__init__(why)
        self.detail = detail


class Verifier(Protocol):
    """`verify(response, gold, prompt=…) -> Verdict`."""

    def __call__(self, response: str, gold: str, /, *, prompt: str = "") -> Verdict:
        """Judges `response`, which continues the text `prompt`.

        Raises ValueError for an empty gold answer, which would make an empty response correct.
        """
        ...
