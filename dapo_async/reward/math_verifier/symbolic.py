r"""Equality by computer algebra: two answers come in, whether they are equal leaves.

It runs only in the verifier processes (`worker.py`). The algebra is math-verify's, on SymPy.
math-verify accepts too much, so its matches are checked again for:

- chains of equations whose sides differ, such as `41 = 42`
- several numbers side by side
- numerals of different bases
- words that are permutations of each other

`exactness.py` replaces its comparison of values, which takes values that are only close for equal.

math-verify reads `3(4)` as a mixed number and adds; here a number right before a bracket multiplies
it. math-verify's own timeout is off, because it needs SIGALRM; the process has a hard deadline.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from decimal import Decimal
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from dapo_async.reward.math_verifier import exactness
from dapo_async.reward.math_verifier.hedging import claims
from dapo_async.reward.math_verifier.normalize import is_suspicious, normalised
from dapo_async.reward.math_verifier.numeric import (
    ROUNDED_DECIMALS,
    equal_numbers,
    has_variables,
    parse_number,
    words,
)

logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
exactness.install()

# `units.py` has removed the units before; math-verify would take the t of 2t for one.
_NORMALISATION = replace(LatexExtractionConfig().normalization_config, units=False)
FORMULA = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALISATION),)
ANYWHERE = (LatexExtractionConfig(normalization_config=_NORMALISATION), ExprExtractionConfig())
_EQUALS = re.compile(r"(?<![\\<>!:])=(?!=)")
_SUBSCRIPT = re.compile(r"_\{[^{}]*\}")  # the k=1 of a sum is no equation
_SEPARATOR = re.compile(r"[,;]|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b")
# Names that may stand before `=`: x, x_1, \alpha, f(2), \angle ABC, |AB|, \text{total cost}, m+n.
# An expression with a value of its own is no name.
_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|[a-z]*psilon|zeta|eta|theta|iota|kappa|lambda|mu|nu"
    r"|xi|rho|sigma|tau|phi|varphi|chi|psi|omega|ell|[A-Z][a-z]+)"
)
_FUNCTION = (
    r"(?!(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|max|min|gcd|lcm|det|minus|negative|not)\b)"
)
_IDENTIFIER = (
    rf"(?:(?:{_GREEK}|{_FUNCTION}[A-Za-z]+(?: {_FUNCTION}[A-Za-z]+){{0,3}}"
    rf"|\\(?:text|mathrm|operatorname|mathbf|vec|overline)\s*\{{[A-Za-z ]+\}})"
    r"(?:_\s*(?:\{[^{}]*\}|\w))?'{0,2}(?:\^\{?-1\}?)?(?:\s*\([^()]*\))?)"
)
_ONE_NAME = rf"(?:m?\s*\\angle\s*[A-Z]{{1,3}}|\|\s*[A-Z]{{2}}\s*\||{_IDENTIFIER})"
_NAME = re.compile(rf"{_ONE_NAME}(?:\s*[+-]\s*{_ONE_NAME})*")
_FRACTION = re.compile(r"-?(?:\\[dt]?frac\{[0-9]+\}\{[0-9]+\}|[0-9]+/[0-9]+)")
_DECIMAL = re.compile(rf"(?<![0-9.])[0-9]*\.[0-9]{{{ROUNDED_DECIMALS},20}}(?![0-9])")
_BASE = re.compile(r"(?<![A-Za-z0-9\\])[0-9][0-9A-F]*\s*_\s*\{?\s*(?:\\text\{)?([0-9]+)")
_SCIENTIFIC = re.compile(r"(?<![\w.])[0-9]{1,20}(?:\.[0-9]{1,20})?[eE][+-]?[0-9]{1,2}(?![\w.])")
_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
# A number or a closing bracket right before an opening bracket: factors. Not in f_2(8),
# \log_{2}(8) or \frac3{4}.
_OPENS = r"(?:\\(?:left|[bB]igg?l?))?\("
_FACTORS = re.compile(
    rf"(?<![\w.\\_}}^])(?<!_\{{)([0-9]+(?:\.[0-9]+)?)(?={_OPENS}|\{{[0-9]"
    rf"|(?:\[|\\lbrack|\\\{{)\s*-?[0-9.]+\s*(?:\]|\\rbrack|\\\}})|\s+\(\s*-?[0-9])"
    rf"|(?<=\))(?={_OPENS})|(?:(?<![\w\\_^}}\])])\{{[0-9]+\}}|(?<=\}})\{{[0-9]+\}})(?={_OPENS})"
)
_MIXED = re.compile(
    r"(?<![\w.\\_}^])([0-9]+)\s*"
    r"(\\[dt]?frac\s*(?:\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9])\s*([0-9])))"
)
_WORK = re.compile(r"(?:[-+*/×÷%^]|\\(?:times|cdot|div)|\bof)\s*$")
_LISTED = re.compile(
    rf"(?<![0-9.,$])({_NUMBER}(?:(?:(?:\s*;\s*|,?\s+|,?\s*(?:and|or)\s*|\s*=\s*){_NUMBER})+"
    rf"|(?:,{_NUMBER}){{2,}}))[\s.)]*$"
)


def equal_formulas(answer: str, gold: str) -> bool:
    """Whether two normalised answers are equal, each read as one whole formula."""
    answer = _with_fractions(answer, gold)
    parsed, expected = _formula(answer), _formula(gold)
    return bool(verify(expected, parsed, timeout_seconds=None)) and _holds(
        answer, gold, literal=False
    )


def last_expression(text: str, gold: str) -> tuple[bool, str | None]:
    """Whether the last mathematical expression of `text` equals `gold`, and that expression.

    The expression is None when there is none. `gold` may be a text that contains the answer.
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
    return _holds(normalised(extracted), normalised(wanted), literal=True), extracted


def _gold(gold: str) -> list[Any]:
    """The gold answer, parsed: a bare formula as a whole, a text by its last expression."""
    bare_formula = re.search(r"[\\A-Za-z(\[{^]", gold) and not re.search(
        r"\$|\\[(\[]|\\boxed|[A-Za-z]+ [A-Za-z]+ ", gold
    )
    return (_formula(normalised(gold)) if bare_formula else None) or parse(
        gold, ANYWHERE, parsing_timeout=None
    )


def _is_part(extracted: str, text: str) -> bool:
    """Whether the number `extracted` is only a part of what `text` ends with.

    The whole may be several numbers side by side, a chain of equations or a formula.
    """
    tail = text[-1000:].strip()
    listed = _LISTED.search(tail)
    if (
        listed is not None
        and parse_number(listed[1]) is None
        and not ("=" in listed[1] and _WORK.search(tail[: listed.start()]))
    ):
        return len({each.replace(",", "") for each in re.findall(_NUMBER, listed[1])}) > 1
    if "$" in text or parse_number(extracted) is None:
        return False
    before, _, after = text.rpartition(extracted)
    return re.match(
        r"\s*(?:\\(?:sqrt|frac|pi|cdot|times|binom|pm|ln|log|sin|cos|tan)|\^|!|/)", after
    ) is not None or before.endswith("not ")


def _with_fractions(answer: str, gold: str) -> str:
    """`answer` with fractions of `gold` in place of decimals that equal them (`equal_numbers`)."""
    fractions = [
        value for match in _FRACTION.finditer(gold) if (value := parse_number(match[0])) is not None
    ]

    def exact(match: re.Match[str]) -> str:
        decimal = parse_number(match[0])
        same = [
            each.value
            for each in fractions
            if decimal is not None and decimal.value != each.value and equal_numbers(decimal, each)
        ]
        return rf"\frac{{{same[0].numerator}}}{{{same[0].denominator}}}" if same else match[0]

    return _DECIMAL.sub(exact, answer) if fractions else answer


def _readable(text: str) -> str:
    """`text` as math-verify can read it: without exponents such as 1e6 and upright e and i."""
    text = _with_factors(_SCIENTIFIC.sub(lambda match: format(Decimal(match[0]), "f"), text))
    return re.sub(r"\\(?:mathrm|text)\{\s*([ei])\s*\}", r"\1", text)


def _with_factors(text: str) -> str:
    r"""`text` with a \cdot between factors.

    A number multiplies the bracket after it, and a fraction of at least 1; with a smaller fraction
    it makes a mixed number.
    """

    def improper(match: re.Match[str]) -> str:
        top, bottom = int(match[3] or match[5]), int(match[4] or match[6])
        return match[0] if top < bottom else rf"{match[1]}\cdot {match[2]}"

    return _FACTORS.sub(lambda match: rf"{match[0]}\cdot ", _MIXED.sub(improper, text))


def _formula(text: str) -> list[Any]:
    if re.search(r"(?i)answer|\$", text):  # math-verify would read only a part of the text
        return []
    formula = f"${_with_factors(' '.join(text.split()))}$"
    return list(parse(formula, FORMULA, parsing_timeout=None))


def _holds(answer: str, gold: str, *, literal: bool) -> bool:
    """Whether a match of math-verify passes the checks of this module.

    With `literal` only a chain of plain numbers contradicts itself; a chain with sums shows work.
    """
    if not _EQUALS.search(gold) and _contradicts_itself(
        answer, literal=literal, variables=has_variables(gold)
    ):
        return False
    bases = [[match[1] for match in _BASE.finditer(text)] for text in (answer, gold)]
    if bases[0] and bases[0] != bases[1]:
        return False
    if (gold_words := words(gold)) is not None and (answer_words := words(answer)) is not None:
        return gold_words.replace(" ", "") == answer_words.replace(" ", "")
    return True


def _contradicts_itself(text: str, *, literal: bool, variables: bool) -> bool:
    """Whether the sides of a chain of equations, without names, differ from the last side."""
    text = _SUBSCRIPT.sub("", text)
    if literal:
        sides = _EQUALS.split(text)
        numbers = [value for side in sides if (value := parse_number(side.strip())) is not None]
        others = [
            side for side in sides if parse_number(side.strip()) is None and not _is_name(side)
        ]
        if others:  # the text shows work, unless it has a variable that the gold answer lacks
            derived = len(sides) > 2 and _is_name(sides[0])  # S = bh/2 = 3
            return (
                len(sides) > 1
                and not variables
                and not derived
                and any(has_variables(side) and not _is_quantity(side) for side in others)
            )
        return any(not equal_numbers(value, numbers[0]) for value in numbers[1:])
    return any(_is_broken_chain(part) for part in _SEPARATOR.split(text))


def _is_quantity(side: str) -> bool:
    """Whether a side has several variables, such as a/b; an equation of one may be unsolved."""
    letters = re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", side))
    return len(set(letters) - {"e", "i"}) > 1


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
