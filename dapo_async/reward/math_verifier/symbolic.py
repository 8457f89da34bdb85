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
from sympy import Expr, FiniteSet, MatrixBase

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
_SIGNS = re.compile(rf"{_EQUALS.pattern}|[{{}}]")
# A side of an equation that has a value although it has a single variable: a sum over k, a limit, a
# determinant, a norm, the size of a set, and a variable plus several numbers.
_OPERATOR = re.compile(
    r"\\(?:sum|prod|i{0,3}nt|oint|lim|det|dim|deg|Pr)(?![a-z])|\\\||\\lVert(?![a-z])|\|\s*+[A-Z]\s*+\|"
)
_VARIABLE_PLUS = re.compile(r"\s*+[a-zA-Z](?:\s*+[-+]\s*+[0-9.]++){2,}+\s*+")
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
    rf"(?:(?:{_GREEK}|{_FUNCTION}[A-Za-z]++(?: {_FUNCTION}[A-Za-z]++){{0,3}}"
    rf"|\\(?:text|mathrm|operatorname|mathbf|vec|overline)\s*+\{{[A-Za-z ]++\}})"
    r"(?:_\s*+(?:\{[^{}]*+\}|\w))?'{0,2}(?:\^\{?-1\}?)?(?:\s*+\([^()]*+\))?)"
)
_ONE_NAME = rf"(?:(?:m\s*+)?\\angle\s*+[A-Z]{{1,3}}|\|\s*+[A-Z]{{2}}\s*+\||{_IDENTIFIER})"
_NAME = re.compile(rf"{_ONE_NAME}(?:\s*+[+-]\s*+{_ONE_NAME})*")
_FRACTION = re.compile(r"-?(?:\\[dt]?frac\{[0-9]++\}\{[0-9]++\}|(?<![0-9])[0-9]++/[0-9]++)")
_DECIMAL = re.compile(rf"(?<![0-9.])[0-9]*+\.[0-9]{{{ROUNDED_DECIMALS},20}}(?![0-9])")
_BASE = re.compile(r"(?<![A-Za-z0-9\\])[0-9][0-9A-F]*+\s*+_\s*+(?:\{\s*+)?(?:\\text\{)?([0-9]++)")
_SCIENTIFIC = re.compile(r"(?<![\w.])[0-9]{1,20}(?:\.[0-9]{1,20})?[eE][+-]?[0-9]{1,2}(?![\w.])")
_NUMBER = r"-?[0-9]++(?:\.[0-9]++)?"
_ONE_NUMBER = re.compile(_NUMBER)
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
# A list of numbers, up to the end where group 2 matches.
_LISTED = tuple(
    re.compile(rf"(?<![0-9.,$])({_NUMBER}{others})[\s.)]*+(\Z)?")
    for others in (
        rf"(?:(?:\s*+(?:;|=)\s*+|,?\s++|,?\s*+(?:and|or)\s*+){_NUMBER})++",
        rf"(?:,{_NUMBER}){{2,}}+",
    )
)


def equal_formulas(answer: str, gold: str, *, quantities: bool = False) -> bool:
    """Whether two normalised answers are equal, each read as one whole formula.

    A name such as `x` may stand before the answer and `=`; with `quantities` also one such as
    `a/b` (`_is_quantity`).
    """
    answer = _with_fractions(answer, gold)
    sides = _sides(answer)
    names = all(_is_name(side) or (quantities and _is_quantity(side)) for side in sides[:-1])
    parsed, expected = _readable_part(_formula(answer), sides if names else []), _formula(gold)
    return bool(verify(expected, parsed, timeout_seconds=None)) and _holds(
        answer, gold, literal=False, quantities=quantities
    )


def last_expression(text: str, gold: str) -> tuple[bool, str | None]:
    """Whether the last mathematical expression of `text` equals `gold`, and that expression.

    The expression is None when there is none. `gold` may be a text that contains the answer.
    """
    text, gold = _readable(_with_fractions(text, gold)), _readable(gold)
    parsed, expected = _with_imaginary(parse(text, ANYWHERE, parsing_timeout=None)), _gold(gold)
    if not parsed:
        return False, None
    extracted = str(parsed[-1])
    parsed = _readable_part(parsed, _sides(extracted))
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
        r"\$|\\[(\[]|\\boxed|(?<![A-Za-z])[A-Za-z]++ [A-Za-z]++ ", gold
    )
    return (_formula(normalised(gold)) if bare_formula else None) or _with_imaginary(
        parse(gold, ANYWHERE, parsing_timeout=None)
    )


def _is_part(extracted: str, text: str) -> bool:
    """Whether the number `extracted` is only a part of what `text` ends with.

    The whole may be several numbers side by side, a chain of equations or a formula.
    """
    tail = text[-1000:].strip()
    listed = _final_list(tail)
    if (
        listed is not None
        and parse_number(listed[1]) is None
        and not ("=" in listed[1] and _WORK.search(tail[: listed.start()]))
    ):
        return len(set(_ONE_NUMBER.findall(listed[1]))) > 1
    if "$" in text or parse_number(extracted) is None:
        return False
    before, _, after = text.rpartition(extracted)
    return re.match(
        r"\s*(?:\\(?:sqrt|frac|pi|cdot|times|binom|pm|ln|log|sin|cos|tan)|\^|!|/)", after
    ) is not None or before.endswith("not ")


def _final_list(text: str) -> re.Match[str] | None:
    """The longest list of numbers with which `text` ends."""
    lists = [
        found for pattern in _LISTED for found in pattern.finditer(text) if found[2] is not None
    ]
    return min(lists, key=lambda found: found.start(), default=None)


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
    return _with_imaginary(parse(formula, FORMULA, parsing_timeout=None))


def _readable_part(parsed: list[Any], sides: list[str]) -> list[Any]:
    r"""`parsed`; the last of the `sides` where math-verify could not read the whole.

    For example P(A \cap B) = 1/3.
    """
    unread = all(isinstance(value, str) for value in parsed)
    return _formula(normalised(sides[-1])) if len(sides) > 1 and unread else parsed


def _with_imaginary(parsed: list[Any]) -> list[Any]:
    """`parsed` with the imaginary unit in place of a variable i (`exactness.with_imaginary`)."""
    return [
        exactness.with_imaginary(value)
        if isinstance(value, Expr | FiniteSet | MatrixBase)
        else value
        for value in parsed
    ]


def _holds(answer: str, gold: str, *, literal: bool, quantities: bool = False) -> bool:
    """Whether a match of math-verify passes the checks of this module.

    With `literal` only a chain of plain numbers contradicts itself; a chain with sums shows work.
    """
    if not _EQUALS.search(gold):
        sides = _sides(answer)
        if literal and _is_contradiction(sides, variables=has_variables(gold)):
            return False
        if not literal and any(
            _is_broken_chain(_sides(part), quantities=quantities)
            for part in _SEPARATOR.split(answer)
        ):
            return False
    bases = [[match[1] for match in _BASE.finditer(text)] for text in (answer, gold)]
    if bases[0] and bases[0] != bases[1]:
        return False
    if (gold_words := words(gold)) is not None and (answer_words := words(answer)) is not None:
        return gold_words.replace(" ", "") == answer_words.replace(" ", "")
    return True


def _sides(text: str) -> list[str]:
    """The sides of a chain of equations; the k=1 of a sum is no equation."""
    sides, start, depth = [], 0, 0
    for match in _SIGNS.finditer(text):
        if match[0] == "=" and depth == 0:
            sides.append(text[start : match.start()])
            start = match.end()
        depth += {"{": 1, "}": -1}.get(match[0], 0)
    return [*sides, text[start:]]


def _is_contradiction(sides: list[str], *, variables: bool) -> bool:
    """Whether a chain of equations in a text does not state the value of its last side.

    `variables`: whether the gold answer has variables.
    """
    numbers = [value for side in sides if (value := parse_number(side.strip())) is not None]
    others = [side for side in sides if parse_number(side.strip()) is None and not _is_name(side)]
    if not others:
        return any(not equal_numbers(value, numbers[0]) for value in numbers[1:])
    if len(sides) == 1 or variables:  # the text shows work
        return False
    if any(_OPERATOR.search(side) and _differs(side, sides[-1]) for side in others):
        return True
    derived = len(sides) > 2 and _is_name(sides[0])  # S = bh/2 = 3
    return not derived and any(has_variables(side) and not _is_quantity(side) for side in others)


def _is_quantity(side: str) -> bool:
    """Whether a side with variables has a value of its own, such as a/b.

    An equation of one variable may be unsolved.
    """
    letters = re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", side))
    return (
        len(set(letters) - {"e", "i"}) > 1
        or _OPERATOR.search(side) is not None
        or _VARIABLE_PLUS.fullmatch(side) is not None
    )


def _differs(side: str, last: str) -> bool:
    """Whether a side without free variables has another value than the last side."""
    parsed = _formula(side)
    return any(
        isinstance(value, Expr) and not value.free_symbols for value in parsed
    ) and not verify(_formula(last), parsed, timeout_seconds=None)


def _is_broken_chain(sides: list[str], *, quantities: bool) -> bool:
    """Whether a side that is no name has another value than the last side."""
    last = _formula(sides[-1])
    return any(
        not _is_name(side)
        and not verify(last, _formula(side), timeout_seconds=None)
        and not (quantities and _is_quantity(side) and not _differs(side, sides[-1]))
        for side in sides[:-1]
    )


def _is_name(side: str) -> bool:
    return (
        _NAME.fullmatch(
            side.strip(" ()[]{}\\") if side.count("(") != side.count(")") else side.strip()
        )
        is not None
    )
