"""Screening of problems: leaves out repeats, conflicting answers, other languages and evaluation
problems, and counts them. `prompts.py` calls it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dapo_async.data.conversation import USER, Turn
from dapo_async.data.places import Places
from dapo_async.reward.math_verifier.normalize import normalised
from dapo_async.reward.math_verifier.numeric import plain_equal

NUM_NAMED = 3  # rows that a message names for each reason
NO_WORD = re.compile(r"[\W_]+")
CHINESE = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True, slots=True)
class Problem:
    """A row of a data set, before the template."""

    row: int  # in the data set, from 0; messages count from 1
    text: str  # without the template; of a chat its last turn
    answer: str
    source: str = ""  # the content of the column data_source
    context: tuple[Turn, ...] = ()  # of a chat the turns before the last one

    @property
    def asked(self) -> str:
        """The texts of all user turns."""
        if not self.context:
            return self.text
        return "\n".join([*self.questions, self.text])

    @property
    def questions(self) -> list[str]:
        """The texts of the user turns before the last turn."""
        return [turn.content for turn in self.context if turn.role == USER]


@dataclass(slots=True)
class RowCounts:
    """Rows by reason: their number and the first of them."""

    places: Places = field(default_factory=Places)
    counts: Counter[str] = field(default_factory=Counter)
    first_rows: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, row: int) -> None:
        self.counts[reason] += 1
        if len(self.first_rows[reason]) < NUM_NAMED:
            self.first_rows[reason].append(row)

    def __str__(self) -> str:
        return (
            ", ".join(
                f"{count} {reason} ({self._named(reason)})" for reason, count in self.counts.items()
            )
            or "none"
        )

    def _named(self, reason: str) -> str:
        rows = self.first_rows[reason]
        return self.places.named(rows, more=self.counts[reason] > len(rows))


@dataclass(frozen=True, slots=True)
class Screening:
    """The rules for training problems."""

    deduplicate: bool | None = None  # None: the preset decides
    contamination: Literal["drop", "warn", "off"] = "off"
    # The `fingerprints` of each evaluation set, by its name.
    against: Mapping[str, frozenset[str]] = field(default_factory=dict)


def of_language(
    problems: Iterable[Problem], language: str, left_out: RowCounts
) -> Iterator[Problem]:
    """The problems of one language of DAPO-Math-17k.

    A problem with a Chinese character is zh, every other one is en.
    """
    for problem in problems:
        if (CHINESE.search(problem.asked) is not None) == (language == "zh"):
            yield problem
        else:
            left_out.add("of another language", problem.row)


def deduplicated(problems: Iterable[Problem], left_out: RowCounts) -> list[Problem]:
    """The first of equal problems; none of them where their answers differ.

    The turns before a problem belong to it. Problems are equal when they differ only in whitespace
    and in Unicode's composition of characters; `a + b` and `a - b` are two problems. Answers are
    equal when `plain_equal` finds it, as for `1/2` and `0.5`; answers that only computer algebra
    could compare differ.
    """
    # The copies of a problem are mostly identical, so each text is normalised once.
    keys: dict[str, str] = {}

    def same_for_copies(text: str) -> str:
        key = keys.get(text)
        if key is None:
            key = keys[text] = " ".join(unicodedata.normalize("NFC", text).split())
        return key

    alike: dict[Any, Problem] = {}
    rows: dict[Any, list[int]] = {}
    answers: defaultdict[Any, list[str]] = defaultdict(list)  # every spelling once
    differ: set[Any] = set()
    for problem in problems:
        key: Any = same_for_copies(problem.text)
        if problem.context:
            turns = (part for turn in problem.context for part in turn)
            key = (key, *map(same_for_copies, turns))
        alike.setdefault(key, problem)
        rows.setdefault(key, []).append(problem.row)
        if key not in differ and problem.answer not in answers[key]:
            if not all(_are_one(problem.answer, answer) for answer in answers[key]):
                differ.add(key)
            answers[key].append(problem.answer)
    for key, numbers in rows.items():
        for row in numbers if key in differ else numbers[1:]:
            left_out.add("with conflicting answers" if key in differ else "repeated", row)
    return [problem for key, problem in alike.items() if key not in differ]


def _are_one(one: str, other: str) -> bool:
    """Whether each of two answers is correct when the other one is the gold answer."""
    if one.split() == other.split():
        return True
    one, other = normalised(one), normalised(other)
    return plain_equal(one, other) is True and plain_equal(other, one) is True


def fingerprint(text: str) -> str:
    """The text that is compared with evaluation problems: its word characters, in lower case.

    This matches more than `deduplicated`, because a leaked problem is worse than a lost one.
    """
    return NO_WORD.sub("", unicodedata.normalize("NFC", text).casefold())


def fingerprints(texts: Iterable[str]) -> frozenset[str]:
    """The fingerprints of a set, without those of texts that have no word character."""
    return frozenset(fingerprint(text) for text in texts) - {""}


def contaminated(
    problems: Sequence[Problem], against: Mapping[str, frozenset[str]]
) -> tuple[set[int], Counter[str]]:
    """The rows of problems that are evaluation problems, and the number for each evaluation set.

    A problem may be in several sets. A chat is found by any of its user turns, or by all of them
    together.
    """
    rows: set[int] = set()
    counts: Counter[str] = Counter()
    for problem in problems:
        found = {fingerprint(problem.text)}
        if problem.context:
            found |= set(map(fingerprint, [*problem.questions, problem.asked]))
        for name in [name for name, known in against.items() if found & known]:
            rows.add(problem.row)
            counts[name] += 1
    return rows, counts
