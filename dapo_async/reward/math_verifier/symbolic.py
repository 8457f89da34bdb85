r"""Equality by computer algebra: two answers come in, whether they are the same leaves. Runs in verifier processes only (`verifier_process.py`).

The algebra is math-verify's (on SymPy). What it accepts too easily is looked at once more: chains of equations whose sides differ (`41 = 42`),
several numbers side by side, floats that only round alike, numerals of different bases, words of the same letters. A number right before a bracket
is told to multiply it: math-verify takes `3(4)` for a mixed number and adds. Its own timeout would need SIGALRM and is off: the process has a hard
deadline instead.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from decimal import Decimal
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Basic, Float, preorder_traversal

from dapo_async.reward.math_verifier.hedging import claims
from dapo_async.reward.math_verifier.normalize import is_suspicious, normalised
from dapo_async.reward.math_verifier.numeric import (
    ROUNDED_DECIMALS,
    equal_numbers,
    has_variables,
    number,
    words,
)

logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)

# Units are taken away before (`units.py`): the engine takes the t of 2t for one.
_NORMALISATION = replace(LatexExtractionConfig().normalization_config, units=False)
FORMULA = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALISATION),)
ANYWHERE = (LatexExtractionConfig(normalization_config=_NORMALISATION), ExprExtractionConfig())
RELATIVE = 1e-6  # floats that differ by more are different, however small they are
_EQUALS = re.compile(r"(?<![\\<>!:])=(?!=)")
_SEPARATOR = re.compile(r"[,;]|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b")
# What is said to have a value: x, x_1, \alpha, f(2), \angle ABC, |AB|, \text{total cost}, m+n; no expression that has another value.
_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|[a-z]*psilon|zeta|eta|theta|iota|kappa|lambda|mu|nu"
    r"|xi|rho|sigma|tau|phi|varphi|chi|psi|omega|ell|[A-Z][a-z]+)"
)
_FUNCTION = (
    r"(?!(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|max|min|gcd|lcm|det|minus|negative|not)\b)"
)
_IDENTIFIER = (
    rf"(?:(?:{_GREEK}|{_FUNCTION}[A-Za-z]+(?: {_FUNCTION}[A-Za-z]+){{0,3}}|\\(?:text|mathrm|operatorname|mathbf|vec|overline)\s*\{{[A-Za-z ]+\}})"
    r"(?:_\s*(?:\{[^{}]*\}|\w))?'{0,2}(?:\^\{?-1\}?)?(?:\s*\([^()]*\))?)"
)
_ONE_NAME = rf"(?:m?\s*\\angle\s*[A-Z]{{1,3}}|\|\s*[A-Z]{{2}}\s*\||{_IDENTIFIER})"
_NAME = re.compile(rf"{_ONE_NAME}(?:\s*[+-]\s*{_ONE_NAME})*")
_FRACTION = re.compile(r"-?(?:\\[dt]?frac\{[0-9]+\}\{[0-9]+\}|[0-9]+/[0-9]+)")
_DECIMAL = re.compile(rf"(?<![0-9.])[0-9]*\.[0-9]{{{ROUNDED_DECIMALS},20}}(?![0-9])")
_BASE = re.compile(r"(?<![A-Za-z0-9\\])[0-9][0-9A-F]*\s*_\s*\{?\s*(?:\\text\{)?([0-9]+)")
_SCIENTIFIC = re.compile(r"(?<![\w.])[0-9]{1,20}(?:\.[0-9]{1,20})?[eE][+-]?[0-9]{1,2}(?![\w.])")
_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
# A number, or a bracket that closes, right before one that opens: factors. Not f_2(8), \log_{2}(8), \frac3{4}.
_OPENS = r"(?:\\(?:left|[bB]igg?l?))?\("
_FACTORS = re.compile(
    rf"(?<![\w.\\_}}^])(?<!_\{{)([0-9]+(?:\.[0-9]+)?)(?={_OPENS}|\{{[0-9]|(?:\[|\\lbrack|\\\{{)\s*-?[0-9.]+\s*(?:\]|\\rbrack|\\\}})|\s+\(\s*-?[0-9])"
    rf"|(?<=\))(?={_OPENS})|(?:(?<![\w\\_^}}\])])\{{[0-9]+\}}|(?<=\}})\{{[0-9]+\}})(?={_OPENS})"
)
_MIXED = re.compile(
    r"(?<![\w.\\_}^])([0-9]+)\s*(\\[dt]?frac\s*(?:\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9])\s*([0-9])))"
)
_WORK = re.compile(r"(?:[-+*/×÷%^]|\\(?:times|cdot|div)|\bof)\s*$")
_LISTED = re.compile(
    rf"(?<![0-9.,$])({_NUMBER}(?:(?:(?:\s*;\s*|,?\s+|,?\s*(?:and|or)\s*|\s*=\s*){_NUMBER})+|(?:,{_NUMBER}){{2,}}))[\s.)]*$"
)


def equal_formulas(answer: str, gold: str) -> bool:
    """Whether two normalised answers are equal, each read as one formula from end to end."""
    answer = _with_fractions(answer, gold)
    parsed, expected = _formula(answer), _formula(gold)
    return bool(verify(expected, parsed, timeout_seconds=None)) and _holds(
        answer, gold, parsed, expected, literal=False
    )


def last_expression(text: str, gold: str) -> tuple[bool, str | None]:
    """Whether the last mathematical expression of `text` equals `gold`, and that expression; None when there is none.

    The gold answer may be a text with an answer in it as well.
    """
    text, gold = _readable(_with_fractions(text, gold)), _readable(gold)
    parsed, expected = parse(text, ANYWHERE, parsing_timeout=None), _gold(gold)
    if not parsed:
        return False, None
    extracted = str(parsed[-1])
    if (
        is_suspicious(extracted)
        or _is_part(extracted, text)
        or not claims(text, extracted)
        or not verify(expected, parsed, timeout_seconds=None)
    ):
        return False, extracted
    wanted = str(expected[-1]) if expected else gold
    return _holds(
        normalised(extracted), normalised(wanted), parsed, expected, literal=True
    ), extracted


def _gold(gold: str) -> list[Any]:
    """A bare formula is read as a whole; a text is searched for its last expression."""
    bare_formula = re.search(r"[\\A-Za-z(\[{^]", gold) and not re.search(
        r"\$|\\[(\[]|\\boxed|[A-Za-z]+ [A-Za-z]+ ", gold
    )
    return (_formula(normalised(gold)) if bare_formula else None) or parse(
        gold, ANYWHERE, parsing_timeout=None
    )


def _is_part(extracted: str, text: str) -> bool:
    """Whether a number was read out of something larger at the end of a text: several numbers side by side, a chain of equations, a formula."""
    tail = text[-1000:].strip()
    listed = _LISTED.search(tail)
    if (
        listed is not None
        and number(listed[1]) is None
        and not ("=" in listed[1] and _WORK.search(tail[: listed.start()]))
    ):
        return len({each.replace(",", "") for each in re.findall(_NUMBER, listed[1])}) > 1
    if "$" in text or number(extracted) is None:
        return False
    before, _, after = text.rpartition(extracted)
    return re.match(
        r"\s*(?:\\(?:sqrt|frac|pi|cdot|times|binom|pm|ln|log|sin|cos|tan)|\^|!|/)", after
    ) is not None or before.endswith("not ")


def _with_fractions(answer: str, gold: str) -> str:
    """`answer` with the fractions of `gold` in the place of the decimals that rightly round them (`plain.equal_numbers`)."""
    fractions = [
        value for match in _FRACTION.finditer(gold) if (value := number(match[0])) is not None
    ]

    def exact(match: re.Match[str]) -> str:
        decimal = number(match[0])
        same = [
            each.value
            for each in fractions
            if decimal is not None and decimal.value != each.value and equal_numbers(decimal, each)
        ]
        return rf"\frac{{{same[0].numerator}}}{{{same[0].denominator}}}" if same else match[0]

    return _DECIMAL.sub(exact, answer) if fractions else answer


def _readable(text: str) -> str:
    """Roman letters for constants, and exponents such as 1e6, cut math-verify's reading short."""
    text = _with_factors(_SCIENTIFIC.sub(lambda match: format(Decimal(match[0]), "f"), text))
    return re.sub(r"\\(?:mathrm|text)\{\s*([ei])\s*\}", r"\1", text)


def _with_factors(text: str) -> str:
    r"""`text` with a \cdot where a number multiplies a bracket, or a fraction that is none of a mixed number (which is less than 1)."""

    def improper(match: re.Match[str]) -> str:
        top, bottom = int(match[3] or match[5]), int(match[4] or match[6])
        return match[0] if top < bottom else rf"{match[1]}\cdot {match[2]}"

    return _FACTORS.sub(lambda match: rf"{match[0]}\cdot ", _MIXED.sub(improper, text))


def _formula(text: str) -> list[Any]:
    if re.search(r"(?i)answer|\$", text):  # words that make math-verify look for a part of the text
        return []
    return parse(f"${_with_factors(' '.join(text.split()))}$", FORMULA, parsing_timeout=None)


def _holds(
    answer: str, gold: str, parsed: list[Any], expected: list[Any], *, literal: bool
) -> bool:
    """A second look at what math-verify has accepted. `literal`: only a chain of plain numbers can contradict itself,
    one with sums in it is read as work shown."""
    if not _EQUALS.search(gold) and _contradicts_itself(
        answer, literal=literal, variables=has_variables(gold)
    ):
        return False
    bases = [[match[1] for match in _BASE.finditer(text)] for text in (answer, gold)]
    if bases[0] and bases[0] != bases[1]:
        return False
    if (gold_words := words(gold)) is not None and (answer_words := words(answer)) is not None:
        return gold_words.replace(" ", "") == answer_words.replace(" ", "")
    values = [
        next((each for each in side if isinstance(each, Basic)), None)
        for side in (parsed, expected)
    ]
    return not any(
        isinstance(part, Float)
        for value in values
        if value is not None
        for part in preorder_traversal(value)
    ) or _close(*values)


def _contradicts_itself(text: str, *, literal: bool, variables: bool) -> bool:
    """Whether a chain of equations is no answer: its sides, but for names, are not all equal to the last one."""
    if literal:
        sides = _EQUALS.split(text)
        numbers = [value for side in sides if (value := number(side.strip())) is not None]
        others = [side for side in sides if number(side.strip()) is None and not _is_name(side)]
        if others:  # work shown, unless it has a variable that the gold answer has not
            return len(sides) > 1 and not variables and any(has_variables(side) for side in others)
        return any(not equal_numbers(value, numbers[0]) for value in numbers[1:])
    return any(_is_broken_chain(part) for part in _SEPARATOR.split(text))


def _is_broken_chain(part: str) -> bool:
    first, *others = _EQUALS.split(part)
    if not others:
        return False
    last = _formula(others[-1])
    sides = [side for side in (first, *others[:-1]) if not _is_name(side)]
    return any(not verify(last, _formula(side), timeout_seconds=None) for side in sides)


def _is_name(side: str) -> bool:
    return (
        _NAME.fullmatch(
            side.strip(" ()[]{}\\") if side.count("(") != side.count(")") else side.strip()
        )
        is not None
    )


def _close(one: Any, other: Any) -> bool:
    """Whether two numbers agree to `RELATIVE` of the larger one; whatever is no number is left to math-verify."""
    if one is None or other is None:
        return True
    try:
        first, second = (complex(side.evalf(20)) for side in (one, other))
    except (TypeError, ValueError, OverflowError, AttributeError):
        return True
    largest = max(abs(first), abs(second))
    return abs(first - second) <= RELATIVE * largest or any(
        abs(100 * a - b) <= RELATIVE * largest for a, b in ((first, second), (second, first))
    )
