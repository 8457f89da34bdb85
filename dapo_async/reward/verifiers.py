"""Verifiers by name: a response and its gold answer come in, a verdict leaves. `score.py` and held-out evaluation call them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from dapo_async.reward.verdict import Verdict, Verifier

MARKER = "####"  # GSM8K's convention: the final answer stands after it
END_OF_THINKING = "</think>"


def verify_marker(response: str, gold: str) -> Verdict:
    """Exact match, but for surrounding whitespace, of what follows the last `####`; a marker within the thinking does not count.

    Raises ValueError for an empty gold answer.
    """
    gold = _stripped(gold)
    conclusion = response.rpartition(END_OF_THINKING)[2]
    _, marker, answer = conclusion.rpartition(MARKER)
    answer = answer.strip()
    if not marker or not answer:
        return Verdict(correct=False, extracted=None, reason="no_answer")
    return _compared(answer, gold)


def verify_exact(response: str, gold: str) -> Verdict:
    """Exact match of the whole response, but for surrounding whitespace. Raises ValueError for an empty gold answer."""
    gold, answer = _stripped(gold), response.strip()
    return _compared(answer, gold) if answer else Verdict(correct=False, extracted=None, reason="no_answer")


VERIFIERS: Mapping[str, Verifier] = MappingProxyType({"marker": verify_marker, "exact": verify_exact})


def get_verifier(name: str) -> Verifier:
    """Raises ValueError naming the nearest known one."""
    if name not in VERIFIERS:
        near = difflib.get_close_matches(name, VERIFIERS, n=1, cutoff=0.0)[0]
        raise ValueError(f"reward.verifier {name!r} is unknown; did you mean {near!r}? Known are {', '.join(VERIFIERS)}")
    return VERIFIERS[name]


def _compared(answer: str, gold: str) -> Verdict:
    correct = answer == gold
    return Verdict(correct=correct, extracted=answer, reason="correct" if correct else "wrong")


def _stripped(gold: str) -> str:
    gold = gold.strip()
    if not gold:
        raise ValueError("the gold answer is empty, so nothing can be judged by it; drop the problem or fill in its answer")
    return gold
