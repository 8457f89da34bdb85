r"""Equality of plain answers without a symbolic engine: two texts come in; True, False or None (undecided) leaves. Called by `math.py`.

Integers, decimals, simple and mixed fractions, percentages, units and currencies, words and choices. Decided exactly, with integers and fractions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from dapo_async.reward.math_verifier.normalize import TEXT, is_suspicious
from dapo_async.reward.math_verifier.units import (
    CHANGING,
    FUNCTIONS,
    is_unit,
    unit_of,
    without_unit,
    words_of,
)

MOST_DIGITS, MOST_EXPONENT = 2000, 300
ROUNDED_DECIMALS = 4  # so many, rightly rounded, stand for a fraction whose decimals never end

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
_REPEATING = re.compile(r"([+-]?)\s*([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{\s*([0-9]{1,30})\s*\}")
_DECIMAL = re.compile(rf"([+-]?)\s*({_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([+-]?[0-9]{{1,3}}))?")
_SCIENTIFIC = re.compile(r"([0-9.]+)[eE]([+-]?[0-9]{1,3})")
_FRACTION = re.compile(
    rf"([+-]?)\s*(?:({_INTEGER})\s*/\s*({_INTEGER})|\\frac\s*\{{\s*([+-]?)\s*({_INTEGER})\s*\}}\s*\{{\s*({_INTEGER})\s*\}})"
)
_MIXED = re.compile(
    r"([+-]?)\s*([0-9]+)(?: ([0-9]+)/([0-9]+)| ?\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\})"
)
_PERCENT = re.compile(r"\s*(?:\\?%|(?i:percent|percentage|pct)\b\.?)")
_CURRENCY = re.compile(r"(?:\\\$|[$€£¥₹]|\\(?:euro|pounds)\b|(?:USD|EUR|GBP|Rs\.?)(?= ?[0-9]))\s*")
_IN_ALL = re.compile(r"\s+in (?:total|all)\.?$")
_SEPARATOR = re.compile(r"[,;|]|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b")
# Numbers side by side; what stands in a subscript or exponent belongs to what is before it.
_APART = re.compile(
    r"(?:(?<![_^0-9.])(?<![_^]\{)[0-9]+(?:\.[0-9]*)?|\\frac\{[^{}]*\}\{[^{}]*\})\s+\.?[0-9]"
)
_SIGNED_APART = re.compile(r"\s*[+-]?[0-9.]+(?:\s+[+-]?[0-9.]+)+\s*")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' ,.-]*[A-Za-z]")
_CHOICE = re.compile(
    r"(?:(?i:option|choice|answer)\s*)?(?:\(\s*([A-Za-z])\s*\)[.:]?|([A-Z])(?:[.):]|(?=$))|([a-z])(?=$))(?:\s+(.*))?"
)
_NO_TAIL = re.compile(
    r"(?i:\b(?:and|or|nor|not|is|isn't|wrong|incorrect|no|none|but)\b)|\b[A-Z]\b|\([A-Za-z]\)"
)
_OPTIONS = "ABCDEFGHIJ"


@dataclass(frozen=True, slots=True)
class Number:
    """An exact value as it was written."""

    value: Fraction
    percent: bool  # value 28 for "28%"
    decimals: int | None  # digits after the point; None for fractions
    significant: int = 0  # digits from the first that is not 0
    unit: str = ""  # in one spelling, if it is a known one


def spelt_out(text: str, gold: str) -> str:
    """`text` as the symbolic engine reads it: without its unit, and `3e8` as a product. Letters are variables where `gold` has any."""
    if number(text) is not None:
        return _SCIENTIFIC.sub(r"\1\\cdot10^{\2}", text)
    return without_unit(text, symbols=has_variables(gold))


def has_variables(text: str) -> bool:
    """Whether letters of a formula stand for something: those of commands, functions, units and the constants e and i aside."""
    text = re.sub(r"\\[A-Za-z]+", " ", TEXT.sub(" ", without_unit(text, symbols=False)))
    return any(
        word.lower() not in FUNCTIONS and word not in ("e", "i")
        for word in re.findall("[A-Za-z]+", text)
    )


def number(text: str) -> Number | None:
    """The value of a normalised plain number with its unit or currency, if it is one."""
    if len(text) > MOST_DIGITS:
        return None
    text = _IN_ALL.sub("", _CURRENCY.sub("", TEXT.sub(r" \1", text).strip(), count=1)).strip()
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    for pattern, value_of in (
        (_REPEATING, _repeating),
        (_MIXED, _mixed),
        (_FRACTION, _fraction),
        (_DECIMAL, _decimal),
    ):
        match = pattern.match(text)
        if match is None:
            continue
        percent = _PERCENT.match(text, match.end())
        end = percent.end() if percent else match.end()
        if is_unit(text[end:]) and (value := value_of(match)) is not None:
            decimals = _decimals(match[0]) if pattern is _DECIMAL else None
            return Number(
                value,
                percent is not None,
                decimals,
                len(re.sub("[^0-9]", "", match[0]).lstrip("0")),
                unit_of(text[end:]),
            )
    return None


def equal_numbers(answer: Number, gold: Number) -> bool:
    """Exactly equal, in the same unit if both name a known one; `28%` also equals 28 and 0.28.

    At least four decimals, with four significant digits, also equal the fraction that they rightly round.
    """
    if answer.unit and gold.unit and answer.unit != gold.unit:
        return False
    if answer.percent != gold.percent:
        percent, other = (answer, gold) if answer.percent else (gold, answer)
        return other.value in (percent.value, percent.value / 100)
    if answer.value == gold.value:
        return True
    # Decimals that never end have no exact spelling but the fraction itself.
    if (
        gold.decimals is None
        and answer.decimals is not None
        and min(answer.decimals, answer.significant) >= ROUNDED_DECIMALS
        and not _ends(gold.value)
    ):
        return abs(answer.value - gold.value) * 2 * 10**answer.decimals <= 1
    return False


def words(text: str) -> str | None:
    """The letters of an answer in words, such as `\\text{no solution}`, in lower case; None when it is something else."""
    text = TEXT.sub(r" \1 ", text).strip(" .")
    if (
        not _WORDS.fullmatch(text)
        or text.lower() in FUNCTIONS
        or not re.search("[A-Za-z]{3}", text)
    ):
        return None
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def choice(text: str) -> str | None:
    """The letter of a chosen option: `C`, `(C)`, `\\text{(C)}`, `C.`, `Option C`, `(C) 34`; None for anything else, or when others are named."""
    match = _CHOICE.fullmatch(TEXT.sub(r" \1 ", text).strip())
    return (
        None
        if match is None or _NO_TAIL.search(match[4] or "")
        else match[1] or match[2] or match[3]
    )


def plain_equal(answer: str, gold: str) -> bool | None:
    """Whether two normalised answers are equal, as far as that is plain; None: ask the symbolic engine."""
    if answer == gold or (
        "".join(answer.split()) == "".join(gold.split()) and not _APART.search(answer + "|" + gold)
    ):
        return True
    if (
        not re.search(r"[0-9A-Za-z]", answer)
        or is_suspicious(answer)
        or not _is_balanced(answer)
        or re.match(r"\s*[+-]\s*[+-]", answer)
    ):
        return False
    gold_number, answer_number = number(gold), number(answer)
    if answer_number is None and (_APART.search(answer) or _SIGNED_APART.fullmatch(answer)):
        return False
    if gold_number is not None:
        return (
            equal_numbers(answer_number, gold_number)
            if answer_number is not None
            else None
            if _may_be_a_number(answer)
            else False
        )
    if (gold_words := words(gold)) is not None:
        answer_words = words(answer)
        return (
            answer_words == gold_words
            if answer_words is not None or answer_number is not None
            else None
        )
    if (gold_choice := choice(gold)) is not None and (
        equal := _equal_choice(answer, gold, gold_choice)
    ) is not None:
        return equal
    return False if _says_more(answer, gold) else None


def _may_be_a_number(answer: str) -> bool:
    """Whether an answer that is no plain number may yet have the value of one: neither words, nor several parts, nor an interval."""
    value = without_unit(answer, symbols=False)
    if (
        re.fullmatch(r"\[[^\[\]]*\]", answer)
        or words_of(value)
        or TEXT.search(value.rpartition("=")[2])
    ):
        return False
    parts = _SEPARATOR.split(re.sub(r"^\\?[{(\[]|\\?[})\]]$", "", answer))
    return len(parts) == 1 or all(number(part.strip()) is None for part in parts)


def _equal_choice(answer: str, gold: str, letter: str) -> bool | None:
    """Whether `answer` chooses the option `letter` of `gold`; None when it may be a formula."""
    chosen = choice(answer)
    if chosen is None:
        bare = TEXT.sub(r" \1 ", answer)
        return (
            None
            if re.search("[0-9=]", bare)
            and not re.search(r"\([A-Za-z]\)|(?i:\b(?:and|or|not|is)\b)|\b[A-J]\s*[.:)]", bare)
            else False
        )
    is_option = letter.upper() in _OPTIONS and (letter.isupper() or "(" in gold)
    return chosen.upper() == letter.upper() if is_option else chosen == letter


def _says_more(answer: str, gold: str) -> bool:
    """Whether `answer` has words that `gold` has not: such as change its meaning, or a sentence."""
    said = words_of(without_unit(answer, symbols=has_variables(gold))) - words_of(gold)
    letters = set(re.findall("[A-Za-z]", gold.lower()))
    return any(
        word in CHANGING
        or (len(word) > 2 and re.search("[aeiouy]", word) and not set(word) <= letters)
        for word in said
    )


def _is_balanced(text: str) -> bool:
    """Whether every brace of LaTeX is closed: what is cut off is no answer."""
    return text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def _integer(digits: str) -> int:
    return int(re.sub("[ ,]", "", digits))


def _decimal(match: re.Match[str]) -> Fraction | None:
    exponent = int(match[3] or 0)
    if abs(exponent) > MOST_EXPONENT:
        return None
    value = Fraction(re.sub("[ ,]", "", match[2]).rstrip(".") or "0") * Fraction(10) ** exponent
    return -value if match[1] == "-" else value


def _decimals(written: str) -> int:
    return len(written.partition(".")[2]) if "e" not in written.lower() else 0


def _fraction(match: re.Match[str]) -> Fraction | None:
    top, bottom = _integer(match[2] or match[5]), _integer(match[3] or match[6])
    if bottom == 0:
        return None
    return Fraction(top, bottom) * (-1 if (match[1] == "-") != (match[4] == "-") else 1)


def _mixed(match: re.Match[str]) -> Fraction | None:
    top, bottom = int(match[3] or match[5]), int(match[4] or match[6])
    if bottom == 0 or top >= bottom:
        return None
    value = int(match[2]) + Fraction(top, bottom)
    return -value if match[1] == "-" else value


def _repeating(match: re.Match[str]) -> Fraction:
    whole, fixed, period = match[2] or "0", match[3], match[4]
    value = Fraction(int(whole + fixed), 10 ** len(fixed)) + Fraction(
        int(period), (10 ** len(period) - 1) * 10 ** len(fixed)
    )
    return -value if match[1] == "-" else value


def _ends(value: Fraction) -> bool:
    """Whether the decimals of `value` end: its denominator has no prime factors but 2 and 5."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
