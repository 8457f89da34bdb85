"""Equality of plain answers: two texts come in; True, False or None (undecided) leaves.

`verify.py` calls it. It compares integers, decimals, simple and mixed fractions, percentages,
units, currencies, words and choices, exactly and without computer algebra.
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
ROUNDED_GOLD = 6  # decimals of a gold answer that may stand for a fraction
ROUNDED_DECIMALS = 4  # this many decimals, correctly rounded, equal a fraction such as 2/3

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
_REPEATING = re.compile(
    r"([+-]?)\s*+([0-9]*+)\.([0-9]*+)\\(?:overline|bar)\s*+\{\s*+([0-9]{1,30})\s*+\}"
)
_DECIMAL = re.compile(rf"([+-]?)\s*+({_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([+-]?[0-9]{{1,3}}))?")
_SCIENTIFIC = re.compile(r"(?<![0-9.])([0-9.]++)[eE]([+-]?[0-9]{1,3})")
_FRACTION = re.compile(
    rf"([+-]?)\s*+(?:({_INTEGER})\s*+/\s*+({_INTEGER})"
    rf"|\\frac\s*+\{{\s*+([+-]?)\s*+({_INTEGER})\s*+\}}\s*+\{{\s*+({_INTEGER})\s*+\}})"
)
_MIXED = re.compile(
    r"([+-]?)\s*+([0-9]++)"
    r"(?: ([0-9]++)/([0-9]++)| ?\\frac\s*+\{\s*+([0-9]++)\s*+\}\s*+\{\s*+([0-9]++)\s*+\})"
)
_PERCENT = re.compile(r"\s*(?:\\?%|(?i:percent|percentage|pct)\b\.?)")
_CURRENCY = re.compile(r"(?:\\\$|[$€£¥₹]|\\(?:euro|pounds)\b|(?:USD|EUR|GBP|Rs\.?)(?= ?[0-9]))\s*")
_IN_ALL = re.compile(r"(?<!\s)\s++in (?:total|all)\.?$")
_SEPARATOR = re.compile(r"[,;|]|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b")
# Numbers side by side, but not a subscript or exponent and the number before it.
_APART = re.compile(
    r"(?:(?<![_^0-9.])(?<![_^]\{)[0-9]++(?:\.[0-9]*+)?|\\frac\{[^{}]*+\}\{[^{}]*+\})\s++\.?[0-9]"
)
_SIGNED_APART = re.compile(r"\s*+[+-]?[0-9.]++(?:\s++[+-]?[0-9.]++)++\s*+")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' ,.-]*[A-Za-z]")
_CHOICE = re.compile(
    r"(?:(?i:option|choice|answer)\s*)?"
    r"(?:\(\s*([A-Za-z])\s*\)[.:]?|([A-Z])(?:[.):]|(?=$))|([a-z])(?=$))(?:\s++(.*))?"
)
_NO_TAIL = re.compile(
    r"(?i:\b(?:and|or|nor|not|is|isn't|wrong|incorrect|no|none|but)\b)|\b[A-Z]\b|\([A-Za-z]\)"
)
_OPTIONS = "ABCDEFGHIJ"


@dataclass(frozen=True, slots=True)
class Number:
    """An exact value and how it was written."""

    value: Fraction
    percent: bool  # value 28 for "28%"
    decimals: int | None  # number of digits after the point; None for fractions
    significant: int = 0  # number of digits from the first one that is not 0
    unit: str = ""  # a known unit in one spelling, else empty


def spelt_out(text: str, gold: str) -> str:
    """`text` for computer algebra: without its unit, and with `3e8` written as a product.

    Letters are variables, not units, where `gold` has variables.
    """
    if parse_number(text) is not None:
        return _SCIENTIFIC.sub(r"\1\\cdot10^{\2}", text)
    return without_unit(text, symbols=has_variables(gold))


def has_variables(text: str) -> bool:
    """Whether a formula has variables: letters other than commands, functions, units, e and i."""
    text = re.sub(r"\\[A-Za-z]+", " ", TEXT.sub(" ", without_unit(text, symbols=False)))
    return any(
        word.lower() not in FUNCTIONS and word not in ("e", "i")
        for word in re.findall("[A-Za-z]+", text)
    )


def parse_number(text: str) -> Number | None:
    """The value of a normalised plain number, with or without a unit; None for any other text."""
    if len(text) > MOST_DIGITS:
        return None
    text = _IN_ALL.sub("", _CURRENCY.sub("", TEXT.sub(r" \1", text).strip(), count=1)).strip()
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    for matched, value_of in (
        (_REPEATING.match, _repeating),
        (_MIXED.match, _mixed),
        (_FRACTION.match, _fraction),
        (_DECIMAL.match, _decimal),
    ):
        match = matched(text)
        if match is None:
            continue
        percent = _PERCENT.match(text, match.end())
        end = percent.end() if percent else match.end()
        if is_unit(text[end:]) and (value := value_of(match)) is not None:
            decimals = _decimals(match[0]) if value_of is _decimal else None
            return Number(
                value,
                percent is not None,
                decimals,
                len(re.sub("[^0-9]", "", match[0]).lstrip("0")),
                unit_of(text[end:]),
            )
    return None


def equal_numbers(answer: Number, gold: Number) -> bool:
    """Whether two numbers are exactly equal, and in the same unit if both have a known one.

    `28%` also equals 28 and 0.28. An answer with at least four decimals and four significant digits
    also equals a fraction with endless decimals which it rounds correctly. A gold answer that is a
    rounded fraction needs six of both.
    """
    if answer.unit and gold.unit and answer.unit != gold.unit:
        return False
    if answer.percent != gold.percent:
        percent, other = (answer, gold) if answer.percent else (gold, answer)
        return other.value in (percent.value, percent.value / 100)
    if answer.value == gold.value:
        return True
    # Endless decimals have no exact spelling as a decimal number.
    if (
        gold.decimals is None
        and answer.decimals is not None
        and min(answer.decimals, answer.significant) >= ROUNDED_DECIMALS
        and not _ends(gold.value)
    ):
        return _rounds(answer, gold)
    return (
        answer.decimals is None
        and gold.decimals is not None
        and min(gold.decimals, gold.significant) >= ROUNDED_GOLD
        and not _ends(answer.value)
        and _rounds(gold, answer)
    )


def _rounds(decimal: Number, exact: Number) -> bool:
    """Whether `decimal` is `exact`, correctly rounded."""
    assert decimal.decimals is not None
    return bool(abs(decimal.value - exact.value) * 2 * 10**decimal.decimals <= 1)


def words(text: str) -> str | None:
    """The words of an answer such as `\\text{no solution}`, in lower case; else None."""
    text = TEXT.sub(r" \1 ", text).strip(" .")
    if (
        not _WORDS.fullmatch(text)
        or text.lower() in FUNCTIONS
        or not re.search("[A-Za-z]{3}", text)
    ):
        return None
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def choice(text: str) -> str | None:
    """The letter of a chosen option: `C`, `(C)`, `\\text{(C)}`, `C.`, `Option C`, `(C) 34`.

    Returns None for other answers and when several options are named.
    """
    match = _CHOICE.fullmatch(TEXT.sub(r" \1 ", text).strip())
    return (
        None
        if match is None or _NO_TAIL.search(match[4] or "")
        else match[1] or match[2] or match[3]
    )


def plain_equal(answer: str, gold: str) -> bool | None:
    """Whether two normalised answers are equal; None: only computer algebra can tell."""
    if answer == gold or (
        "".join(answer.split()) == "".join(gold.split()) and not _APART.search(answer + "|" + gold)
    ):
        return True
    if not _is_readable(answer):
        return False
    gold_number, answer_number = parse_number(gold), parse_number(answer)
    if answer_number is None and (_APART.search(answer) or _SIGNED_APART.fullmatch(answer)):
        return False
    if gold_number is not None:
        if answer_number is not None:
            return equal_numbers(answer_number, gold_number)
        return None if _may_be_a_number(answer) else False
    if (gold_words := words(gold)) is not None:
        answer_words = words(answer)
        if answer_words is None and answer_number is None:
            return None
        return answer_words == gold_words
    if (letter := choice(gold)) is not None:
        equal = _equal_choice(answer, gold, letter)
        if equal is not None:
            return equal
    return False if _says_more(answer, gold) else None


def _is_readable(answer: str) -> bool:
    """Whether an answer has letters or digits, known characters, closed braces and one sign."""
    return (
        re.search(r"[0-9A-Za-z]", answer) is not None
        and not is_suspicious(answer)
        and _is_balanced(answer)
        and re.match(r"\s*[+-]\s*[+-]", answer) is None
    )


def _may_be_a_number(answer: str) -> bool:
    """Whether an answer that is no plain number may still have the value of one.

    Words, answers of several parts and intervals have none.
    """
    value = without_unit(answer, symbols=False)
    if (
        re.fullmatch(r"\[[^\[\]]*\]", answer)
        or words_of(value)
        or TEXT.search(value.rpartition("=")[2])
    ):
        return False
    parts = _SEPARATOR.split(re.sub(r"^\\?[{(\[]|\\?[})\]]$", "", answer))
    return len(parts) == 1 or all(parse_number(part.strip()) is None for part in parts)


def _equal_choice(answer: str, gold: str, letter: str) -> bool | None:
    """Whether `answer` chooses the option `letter` of `gold`; None when it may be a formula."""
    chosen = choice(answer)
    if chosen is None:
        bare = TEXT.sub(r" \1 ", answer)
        is_formula = re.search("[0-9=]", bare) and not re.search(
            r"\([A-Za-z]\)|(?i:\b(?:and|or|not|is)\b)|\b[A-J]\s*[.:)]", bare
        )
        return None if is_formula else False
    is_option = letter.upper() in _OPTIONS and (letter.isupper() or "(" in gold)
    return chosen.upper() == letter.upper() if is_option else chosen == letter


def _says_more(answer: str, gold: str) -> bool:
    """Whether `answer` has words that `gold` lacks: a sentence, or words that change the value."""
    said = words_of(without_unit(answer, symbols=has_variables(gold))) - words_of(gold)
    letters = set(re.findall("[A-Za-z]", gold.lower()))
    return any(
        word in CHANGING
        or (len(word) > 2 and re.search("[aeiouy]", word) and not set(word) <= letters)
        for word in said
    )


def _is_balanced(text: str) -> bool:
    """Whether every LaTeX brace is closed; a text that is cut off is no answer."""
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
    """Whether the decimals of `value` end: 2 and 5 are the only primes of its denominator."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return bool(rest == 1)
