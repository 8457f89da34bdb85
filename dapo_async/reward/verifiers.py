"""Verifiers by name, and by the data source of a row: a response and its gold answer come in, a
verdict leaves. `score.py`, evaluation and `grading.py` call them.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dapo_async.reward.math_verifier.verify import TIMEOUT_S
from dapo_async.reward.math_verifier.verify import verify as verify_math
from dapo_async.reward.own_verifier import OwnVerifier, load_own_verifier
from dapo_async.reward.thinking import conclusion, opened_by
from dapo_async.reward.verdict import Verdict, Verifier
from dapo_async.utils.plugins import is_custom

MARKER = "####"  # GSM8K writes the final answer after it


def verify_marker(response: str, gold: str, *, prompt: str = "") -> Verdict:
    """Exact match of the text after the last `####`, without the whitespace around it.

    A marker within a thinking block does not count, nor one in a block that is never closed.
    Raises ValueError for an empty gold answer.
    """
    gold = _stripped(gold)
    _, marker, answer = (conclusion(response, prompt) or "").rpartition(MARKER)
    answer = answer.strip()
    if not marker or not answer:
        return Verdict(correct=False, extracted=None, reason="no_answer")
    return _compared(answer, gold)


def verify_exact(response: str, gold: str, *, prompt: str = "") -> Verdict:
    """Exact match of the whole response, without the whitespace around it.

    There is no answer in a thinking block that the prompt opened and the response does not close.
    Raises ValueError for an empty gold answer.
    """
    gold, answer = _stripped(gold), response.strip()
    if not answer or (opened_by(prompt) and conclusion(response, prompt) is None):
        return Verdict(correct=False, extracted=None, reason="no_answer")
    return _compared(answer, gold)


VERIFIERS: Mapping[str, Verifier] = MappingProxyType(
    {"marker": verify_marker, "exact": verify_exact, "math": verify_math}
)


@dataclass(frozen=True, slots=True)
class VerifierChoice:
    """The verifier for each data source."""

    default: Verifier
    by_source: Mapping[str, Verifier]

    def of(self, source: str) -> Verifier:
        """The verifier of a row with this `data_source`.

        Rows without a source, and rows of a source that is not named, get the default.
        """
        return self.by_source.get(source, self.default)


def get_verifier(
    name: str, *, timeout_s: float = TIMEOUT_S, knob: str = "reward.verifier"
) -> Verifier:
    """A built-in verifier, or the user's `module:function` with parameters `(response, gold)`.

    A function that has a parameter `prompt` gets the text of the prompt as a keyword. It runs in
    processes of its own, see `own_verifier.py`. `timeout_s` is the deadline of `math`; `knob` is
    where `name` comes from, for messages. Raises ValueError for an unknown name, a missing
    math-verify, or a function that can't be used.
    """
    if is_custom(name):
        load_own_verifier(name, knob=knob)
        return OwnVerifier(name)
    if name not in VERIFIERS:
        near = difflib.get_close_matches(name, VERIFIERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{knob} {name!r} is unknown; did you mean {near!r}? "
            f"Known are {', '.join(VERIFIERS)}, and module:function"
        )
    if name == "math":
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(f"{knob}=math needs math-verify; pip install math-verify")
        return functools.partial(verify_math, timeout_s=timeout_s)
    return VERIFIERS[name]


def choose_verifiers(text: str) -> VerifierChoice:
    """The verifiers of `reward.verifier`, such as `marker, gsm8k=math`.

    One entry is the default; `source=verifier` is for the rows of that source. Raises ValueError.
    """
    chosen: dict[str, Verifier] = {}
    for source, name in _entries(text):
        if not name or source in chosen:
            what = f"the source {source!r}" if source else "the default"
            raise ValueError(
                f"reward.verifier ({text!r}) must name one default verifier, and one for each "
                f"source=verifier; correct {what}, for example marker,gsm8k=math"
            )
        chosen[source] = get_verifier(name)
    if "" not in chosen:
        raise ValueError(
            f"reward.verifier ({text!r}) has no default verifier for the rows of other sources; "
            "add one, for example marker,gsm8k=math"
        )
    return VerifierChoice(chosen.pop(""), MappingProxyType(chosen))


def named_sources(text: str) -> tuple[str, ...]:
    """The sources that `reward.verifier` names."""
    return tuple(source for source, _ in _entries(text) if source)


def _entries(text: str) -> list[tuple[str, str]]:
    """(source, verifier) of each entry; the default has the source ""."""
    found = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        source, equals, name = (part.strip() for part in entry.partition("="))
        if equals and not source:
            raise ValueError(
                f"reward.verifier ({text!r}) has {entry!r}, which names no source; "
                "write source=verifier, for example gsm8k=math"
            )
        found.append((source, name) if equals else ("", source))
    return found


def _compared(answer: str, gold: str) -> Verdict:
    correct = answer == gold
    return Verdict(correct=correct, extracted=answer, reason="correct" if correct else "wrong")


def _stripped(gold: str) -> str:
    gold = gold.strip()
    if not gold:
        raise ValueError("the gold answer is empty; fill it in or remove the problem")
    return gold
