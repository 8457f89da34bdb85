r"""The verifier of mathematical answers: a response and its gold answer come in, a verdict leaves.

The rollout worker, evaluation and `dapo-async grade` call it. Its steps, by module:

thinking     leaves out the thinking, also that which the prompt opened (`reward/thinking.py`)
extract      finds the answer: an Answer: line or \boxed{…}
normalize    gives it one spelling, without typesetting
numeric      compares texts, numbers, units, words and choices, tens of thousands per second
size_limits  rejects what is too large to compare
pool         compares everything else by computer algebra (`symbolic.py`), in processes that have a
             deadline (`worker.py`)

A verdict depends only on its arguments, unless the deadline passes. The deadline counts processor
time, so a busy machine changes no verdict.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from dapo_async.reward.math_verifier.extract import (
    WHITE,
    bare,
    is_cut,
    marked_answer,
    squeezed,
    stated,
)
from dapo_async.reward.math_verifier.normalize import (
    ends_glued,
    is_glued,
    is_suspicious,
    normalised,
)
from dapo_async.reward.math_verifier.numeric import (
    choice,
    parse_number,
    plain_equal,
    spelt_out,
    words,
)
from dapo_async.reward.math_verifier.pool import shared_pool
from dapo_async.reward.math_verifier.size_limits import has_too_large, is_too_large
from dapo_async.reward.thinking import conclusion
from dapo_async.reward.verdict import FAILED, Verdict

Extraction = Literal["marker", "any", "none"]
TIMEOUT_S, MOST_TIMEOUT_S = 5.0, 86_400.0
TAIL_CHARACTERS = 3000  # in which the last expression of an unmarked text is searched
LAST_CHARACTERS = 100  # in which no character may imitate another one
# Parts of an answer that math-verify ignores, and what the gold answer must have to allow them: a
# ratio, dots, a congruence, an index.
_MORE_THAN_A_VALUE = tuple(
    (re.compile(pattern), re.compile(allowed))
    for pattern, allowed in (
        (r"[0-9]\s*:\s*[0-9]", r":|/|\\frac"),
        (r"\\[lc]?dots", r"\\[lc]?dots"),
        (r"\\equiv", r"\\equiv|\bmod|\\[bp]?mod"),
        (r"[0-9]_\s*+(?:\{\s*+)?[A-Za-z]", "_"),
    )
)
LONGEST_ANSWER = 2000  # characters; longer answers are not compared


def verify(
    prediction: str,
    gold: str,
    *,
    timeout_s: float = TIMEOUT_S,
    extraction: Extraction = "marker",
    prompt: str = "",
) -> Verdict:
    r"""Whether the answer of `prediction` equals `gold`.

    `timeout_s`: seconds of processor time for the comparison by computer algebra.

    `prompt`: the text that the model continued. If it ends inside a thinking block, `prediction`
    begins inside it, and there is no answer before the closing marker.

    `extraction`: `marker` reads the last `Answer:` line or `\boxed{…}` after the thinking; without
    one there is no answer. `any` falls back to the last mathematical expression. `none` takes the
    whole text as the answer.

    Reasons: `correct`, `wrong`, `no_answer`; `timeout` (not equal within the deadline), `too_large`
    (not compared) and `unreadable` (computer algebra could not read it) count as wrong; `failed`
    means that the verifier died, so nothing is known (`Verdict.failed`).

    Raises ValueError for an empty gold answer, an unknown extraction, and a timeout that is not
    positive or more than a day. Raises RuntimeError when no verifier process starts.
    """
    if not gold.strip():
        raise ValueError("the gold answer is empty; fill it in or remove the problem")
    if extraction not in get_args(Extraction):
        raise ValueError(
            f"extraction ({extraction!r}) must be one of {', '.join(get_args(Extraction))}; "
            "leave it out for marker"
        )
    if not 0 < timeout_s <= MOST_TIMEOUT_S:
        raise ValueError(
            f"timeout_s ({timeout_s}) must be positive and at most {MOST_TIMEOUT_S:g} (a day); "
            f"leave it out for {TIMEOUT_S:g}"
        )
    text = conclusion(prediction, prompt)
    answer = text if text is None or extraction == "none" else marked_answer(text)
    if extraction == "any" and text is not None and (answer is None or _is_prose(answer)):
        return _anywhere(answer or text, gold, timeout_s)
    if answer is None or not answer.strip():
        return Verdict(correct=False, extracted=None, reason="no_answer")
    return _compared(answer, gold, timeout_s)


def vote_key(answer: str) -> str:
    """One text for all spellings of a plain answer, without a leading `name =`.

    It is the exact value of a number, else the text in one spelling.
    """
    text = normalised(bare(answer[:LONGEST_ANSWER]))
    name, equals, rest = text.partition("=")
    if equals and re.fullmatch(r"\s*[A-Za-z](?:_\{?\w+\}?)?\s*", name):
        text = rest.strip()
    value = parse_number(text)
    if value is not None:
        return f"{value.value}{'%' if value.percent else ''}"
    return choice(text) or words(text) or "".join(text.split())


def _compared(answer: str, gold: str, timeout_s: float, *, quantities: bool = False) -> Verdict:
    extracted = answer.strip(WHITE)
    if extracted == gold.strip(WHITE):
        return _verdict(True, extracted)
    extracted = squeezed(extracted)
    if len(extracted) > LONGEST_ANSWER:
        return Verdict(correct=False, extracted=extracted[:LONGEST_ANSWER], reason="too_large")
    if is_suspicious(extracted) or is_glued(extracted):
        return _verdict(False, extracted)
    written, expected = normalised(bare(extracted)), normalised(bare(_gold_answer(gold)))
    equal = plain_equal(written, expected)
    if equal is not None:
        return _verdict(equal, extracted)
    if any(
        pattern.search(written) and not allowed.search(expected)
        for pattern, allowed in _MORE_THAN_A_VALUE
    ):
        return _verdict(False, extracted)
    if is_too_large(written):
        return Verdict(correct=False, extracted=extracted, reason="too_large")
    question: dict[str, str | bool] = {
        "answer": spelt_out(written, expected),
        "gold": spelt_out(expected, expected),
        "anywhere": False,
        "quantities": quantities,
    }
    return _asked(question, timeout_s, extracted=extracted)


def _anywhere(text: str, gold: str, timeout_s: float) -> Verdict:
    """The verdict by the last mathematical expression.

    A text that is only an answer is compared as a whole.
    """
    text = squeezed(text.strip())
    if not text or is_cut(text):
        return Verdict(correct=False, extracted=None, reason="no_answer")
    last = text
    for end_of_work in ("\n", "####", ">>"):  # what follows may be the answer alone
        last = last.rpartition(end_of_work)[2].strip()
    if _is_formula(last) and not re.fullmatch(r"-?[0-9]+,[0-9]+", gold.strip()):
        return _compared(last, gold, timeout_s, quantities=True)
    if text == gold.strip():
        return _verdict(True, text)
    if (
        len(text) <= TAIL_CHARACTERS
        and not is_glued(text)
        and plain_equal(normalised(bare(text)), normalised(bare(_gold_answer(gold))))
    ):
        return _verdict(True, text)
    tail = text[-TAIL_CHARACTERS:]
    if is_suspicious(tail[-LAST_CHARACTERS:]) or ends_glued(tail[-LAST_CHARACTERS:]):
        return Verdict(correct=False, extracted=None, reason="no_answer")
    if has_too_large(tail):
        return Verdict(correct=False, extracted=None, reason="too_large")
    return _asked({"answer": tail, "gold": gold, "anywhere": True}, timeout_s, extracted=None)


def _gold_answer(gold: str) -> str:
    """The answer of a gold text that is a worked solution or a sentence, else the text."""
    gold = squeezed(gold)
    marked = marked_answer(gold) if r"\boxed" in gold or "nswer:" in gold else None
    return marked or stated(gold) or gold


def _is_formula(text: str) -> bool:
    """Whether a text is one formula, without words, delimiters or commas.

    A comma may be a decimal point.
    """
    if len(text) > LONGEST_ANSWER or re.search("[0-9A-Za-z]", text) is None:
        return False
    return not re.search(r"[$,:#]|\\[(\[]|\\boxed|[^\W\d_]{2}", re.sub(r"\\[a-z]+", "", text))


def _is_prose(answer: str) -> bool:
    """Whether the answer is a sentence: it has four words in a row."""
    text = re.sub(r"\\[a-z]+\{[^{}]*\}", "", answer[:LONGEST_ANSWER])
    return re.search(r"(?<![A-Za-z'])(?:[A-Za-z']++\s++){3}[A-Za-z']", text) is not None


def _asked(question: dict[str, str | bool], timeout_s: float, *, extracted: str | None) -> Verdict:
    reply = shared_pool().ask(question, timeout_s)
    extracted = reply.get("extracted", extracted)
    if reason := reply.get("reason"):
        return Verdict(
            correct=False, extracted=extracted, reason=FAILED if reason == "failed" else str(reason)
        )
    if extracted is None:
        return Verdict(correct=False, extracted=None, reason="no_answer")
    return _verdict(bool(reply["equal"]), extracted)


def _verdict(correct: bool, extracted: str) -> Verdict:
    return Verdict(correct=correct, extracted=extracted, reason="correct" if correct else "wrong")
