"""Which problems are trained: no repeats, no conflicting answers, one language, none of the evaluation sets. What is left out is counted."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dapo_async.reward.math_verifier.normalize import normalised
from dapo_async.reward.math_verifier.numeric import plain_equal

NUM_NAMED = 3  # rows that are named of each reason
NO_WORD = re.compile(r"[\W_]+")
CHINESE = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True, slots=True)
class Problem:
    row: int  # in the data set, from 0
    text: str  # without any template
    answer: str
    source: str = ""  # as the row names it


@dataclass(slots=True)
class LeftOut:
    """Rows that are no prompts, by reason: how many, and the first of them."""

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
        rows, count = self.first_rows[reason], self.counts[reason]
        return (
            ("row " if count == 1 else "rows ")
            + ", ".join(map(str, rows))
            + (", …" if count > len(rows) else "")
        )


@dataclass(frozen=True, slots=True)
class Screening:
    """What is asked of training problems. `against`: the `fingerprints` of each evaluation set, by its name."""

    language: Literal["en", "zh"] | None = None
    deduplicate: bool | None = None  # None: as the preset has it
    contamination: Literal["drop", "warn", "off"] = "off"
    against: Mapping[str, frozenset[str]] = field(default_factory=dict)


def of_language(problems: Iterable[Problem], language: str, left_out: LeftOut) -> Iterator[Problem]:
    """A problem with a Chinese character is zh, every other one en: the two languages of DAPO-Math-17k."""
    for problem in problems:
        if (CHINESE.search(problem.text) is not None) == (language == "zh"):
            yield problem
        else:
            left_out.add("of another language", problem.row)


def deduplicated(problems: Iterable[Problem], left_out: LeftOut) -> list[Problem]:
    """The first of equal problems, and none where their answers differ. Equal: but for whitespace and Unicode's composition of characters.

    Signs count: `a + b` and `a - b` are two problems. Answers that are plainly equal to the verifier, such as `1/2` and `0.5`, do not differ; those
    that only its symbolic engine could tell do.
    """
    keys: dict[
        str, str
    ] = {}  # most repeats are equal to the last character: so the set's hundred copies are normalised once
    alike: dict[str, Problem] = {}
    rows: dict[str, list[int]] = {}
    answers: defaultdict[str, list[str]] = defaultdict(list)  # every spelling once
    differ: set[str] = set()
    for problem in problems:
        key = keys.get(problem.text)
        if key is None:
            key = keys[problem.text] = " ".join(unicodedata.normalize("NFC", problem.text).split())
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
    """Whether each of two answers is right where the other is the gold answer."""
    if one.split() == other.split():
        return True
    one, other = normalised(one), normalised(other)
    return plain_equal(one, other) is True and plain_equal(other, one) is True


def fingerprint(text: str) -> str:
    """What is compared with evaluation problems: word characters alone, in one case. Laxer than `deduplicated`, for a leak is worse than a loss."""
    return NO_WORD.sub("", unicodedata.normalize("NFC", text).casefold())


def fingerprints(texts: Iterable[str]) -> frozenset[str]:
    """Of a whole set; what has no word character at all is like nothing."""
    return frozenset(fingerprint(text) for text in texts) - {""}


def contaminated(
    problems: Sequence[Problem], against: Mapping[str, frozenset[str]]
) -> tuple[set[int], Counter[str]]:
    """The rows of the problems that are evaluation problems too, and how many of each set; a problem may be in several."""
    rows: set[int] = set()
    counts: Counter[str] = Counter()
    for problem in problems:
        key = fingerprint(problem.text)
        for name in [name for name, known in against.items() if key in known]:
            rows.add(problem.row)
            counts[name] += 1
    return rows, counts
