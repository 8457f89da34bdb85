r"""Formulas that are too large for computer algebra. `verify.py` calls it.

Examples: `9^{9^{9^9}}`, `100000000!`, `\binom{10^6}{5\cdot10^5}`, thousands of brackets. Formulas
that pass still have a deadline and a memory limit.
"""

from __future__ import annotations

import math
import re

MOST_CHARACTERS, MOST_DEPTH = 1000, 30
MOST_DIGITS, MOST_FACTORIAL = 5000, 2000
_POWER = re.compile(
    r"(?<![0-9.])([0-9]{1,400})\s*(?:\^|\*\*)\s*(?:\{\s*([0-9]+)\s*\}|\(\s*([0-9]+)\s*\)|([0-9]+))"
)
_PRODUCT = re.compile(r"(?<![0-9.^])([0-9]{1,12})\s*\\(?:cdot|times)\s*([0-9]{1,12})(?![0-9^.])")
_GROUPED = re.compile(r"[{(]\s*([0-9]+)\s*[})](?=\s*!)")
_FACTORIAL = re.compile(r"(?<![0-9])([0-9]++)\s*+(!++)")
_BINOMIAL = re.compile(r"\\[dt]?binom\s*+(?:\{\s*+)?([0-9]++)(?:\s*+\}\s*+\{)?")
_BIG_OPERATOR = re.compile(r"\\(?:sum|prod|int|oint|iint|lim)(?![a-z])")
_NUMBER = re.compile(r"[0-9]+")
_POWER_OF_ANYTHING = re.compile(r"(?:\^|\*\*)\s*(?:\{\s*|\(\s*)?([0-9]+)")
_GROWING = re.compile(r"(?:\^|\*\*|!|\\binom|\\sum|\\prod)[^$\n]{0,100}")
_END_OF_FORMULA = re.compile(r"[\s$]")
AROUND = 100  # characters before and after an operator that may belong to its formula
ROUNDS = 20


def is_too_large(text: str) -> bool:
    """Whether a normalised answer is too long, too deep, or has too large numbers.

    Too large is a number, power, factorial, binomial or sum beyond what an answer has.
    """
    if (
        len(text) > MOST_CHARACTERS
        or depth(text) > MOST_DEPTH
        or any(len(digits) > MOST_DIGITS for digits in _NUMBER.findall(text))
    ):
        return True
    if _BIG_OPERATOR.search(text) and any(len(digits) > 4 for digits in _NUMBER.findall(text)):
        return True
    for _ in range(ROUNDS):
        before = text
        try:
            text = _PRODUCT.sub(lambda match: str(int(match[1]) * int(match[2])), text)
            text = _POWER.sub(_power, text)
        except OverflowError:
            return True
        text = _GROUPED.sub(r"\1", text)
        if before == text:
            break
    else:
        return True
    if any(
        len(match[2]) > 2 or len(match[1]) > 6 or int(match[1]) > MOST_FACTORIAL
        for match in _FACTORIAL.finditer(text)
    ):
        return True
    if re.search(r"!\s*+(?:[)}]++\s*+)?!", text) or any(
        len(match[1]) > 6 or int(match[1]) > 2 * MOST_FACTORIAL
        for match in _BINOMIAL.finditer(text)
    ):
        return True
    # A power whose base is no plain number, such as (x+1)^{100000}, or whose exponent is a power.
    return any(len(match[1]) > 4 for match in _POWER_OF_ANYTHING.finditer(text)) or bool(
        re.search(r"\^\s*+(?:\{\s*+)?[0-9]++\s*+[\^!]", text)
    )


def has_too_large(text: str) -> bool:
    """Whether a text has a formula that is too large.

    Formulas are the text around a power, factorial, binomial, sum or product.
    """
    return depth(text) > MOST_DEPTH or any(
        is_too_large(
            _END_OF_FORMULA.split(text[max(0, found.start() - AROUND) : found.start()])[-1]
            + found[0]
        )
        for found in _GROWING.finditer(text)
    )


def _power(match: re.Match[str]) -> str:
    """The value of a power of two plain numbers; raises OverflowError for too many digits."""
    base, exponent = match[1], match[2] or match[3] or match[4]
    if len(exponent) > 5 or int(exponent) * math.log10(max(1, int(base))) > MOST_DIGITS:
        if int(base) in (0, 1):
            return base
        raise OverflowError
    # A number with more digits than Python prints becomes another of the same size.
    size = int(int(exponent) * math.log10(max(1, int(base))))
    return str(int(base) ** int(exponent)) if size < 300 else "9" * size


def depth(text: str) -> int:
    """The largest number of brackets that are open at once."""
    deepest = level = 0
    for bracket in re.findall(r"[{}()\[\]]", text):
        level += 1 if bracket in "{([" else -1
        deepest = max(deepest, level)
    return deepest
