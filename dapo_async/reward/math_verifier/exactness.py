r"""Equality of two values: numbers without a decimal point exactly, decimals to a relative bound.

`install` puts `equal_values` in the place of math-verify's own comparison, whose tolerance is
absolute: it takes 2^{-98} and 2^{-99} for equal. math-verify compares tuples, sets, intervals,
matrices and equations part by part, so the rule holds inside all of them. Runs only in the verifier
processes, where the deadline of a verdict protects it.

A decimal is close to another value if they differ by at most

    min(1e-6 · m, max(5e-7, 1e-7 · m))      m: the larger absolute value

So π is 3.141593 but not 3.14159. A plain decimal such as 34.0000001 is close only to values with
endless decimals: it equals 34 or another plain decimal only exactly.
"""

from __future__ import annotations

from typing import Any

from math_verify import grader
from sympy import (
    Abs,
    Expr,
    Float,
    I,
    Integer,
    Integral,
    MatrixBase,
    MatrixExpr,
    Pow,
    Rational,
    UnevaluatedExpr,
    ordered,
)

SMALL, ABSOLUTE, LARGE = 1e-6, 5e-7, 1e-7  # the three bounds of a close decimal
LEAST_DIGITS, MOST_DIGITS = 100, 20_000  # decimals to which two exact numbers are compared
POINTS = ((37, 41), (53, 29))  # values of the first variable as fractions


def install() -> None:
    """Lets math-verify compare values with `equal_values`."""
    assert callable(grader.sympy_numeric_eq), "math-verify compares values somewhere else"
    grader.sympy_numeric_eq = equal_values


def equal_values(gold: Any, answer: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Whether two values of SymPy are equal; the last two parameters are math-verify's, not used.

    `28%` also equals 28 and 0.28. False means that only `simplify` can tell, which math-verify
    tries next.
    """
    if isinstance(gold, MatrixBase | MatrixExpr) and isinstance(answer, MatrixBase | MatrixExpr):
        gold, answer = (grader.safe_sympy_doit(matrix) for matrix in (gold, answer))
        return (
            isinstance(gold, MatrixBase)
            and isinstance(answer, MatrixBase)
            and gold.shape == answer.shape
            and all(
                equal_values(*pair, float_rounding, numeric_precision)
                for pair in zip(gold.flat(), answer.flat(), strict=True)
            )
        )
    if not isinstance(gold, Expr) or not isinstance(answer, Expr):
        return False
    gold, answer = with_imaginary(gold), with_imaginary(answer)
    percents = [grader.get_pct_val(value) for value in (gold, answer)]
    if (percents[0] is None) == (percents[1] is None):
        return _equal(percents[0] or gold, percents[1] or answer)
    percent, other = (percents[0], answer) if percents[1] is None else (percents[1], gold)
    return _equal(percent, other) or _equal(percent / 100, other)


def with_imaginary(value: Any) -> Any:
    """`value` with the imaginary unit in place of a variable i.

    Beside j or k it is a variable or a unit vector. In a sum over i it stays the index.
    """
    symbols = {symbol.name: symbol for symbol in value.free_symbols}
    if "i" not in symbols or not {"j", "k"}.isdisjoint(symbols):
        return value
    return value.subs(symbols["i"], I)


def _equal(gold: Expr, answer: Expr) -> bool:
    symbols = list(ordered(gold.free_symbols | answer.free_symbols))
    if symbols:
        return _equal_functions(gold, answer, symbols)
    exact_gold, exact_answer = _exact(gold), _exact(answer)
    if _are_one(exact_gold, exact_answer):
        return True
    decimals = [bool(value.atoms(Float)) for value in (gold, answer)]
    if not any(decimals) or (all(decimals) and _is_literal(gold) and _is_literal(answer)):
        return False
    if not all(decimals):
        decimal, other = (gold, exact_answer) if decimals[0] else (answer, exact_gold)
        if _is_literal(decimal) and isinstance(other, Rational) and _ends(other):
            return False
    return _are_close(exact_gold, exact_answer)


def _equal_functions(gold: Expr, answer: Expr, symbols: list[Any]) -> bool:
    """Whether two terms with variables have equal values at two points, without any tolerance.

    Only terms whose difference vanishes to 15 digits are tried, so that |x| is not x.
    """
    gold, answer = _exact(gold), _exact(answer)
    if (gold - answer).evalf(15, chop=True) != 0:
        return False
    for top, bottom in POINTS:
        point = {
            symbol: Rational(top + 6 * number, bottom + 10 * number)
            for number, symbol in enumerate(symbols)
        }
        if not _are_one(gold.subs(point), answer.subs(point)):
            return False
    return True


def _exact(value: Expr) -> Expr:
    """`value`, evaluated, with a fraction in place of each decimal."""
    decimals = {decimal: Rational(str(decimal)) for decimal in value.atoms(Float)}
    evaluated: Expr = grader.safe_sympy_doit(value.xreplace(decimals) if decimals else value)
    return evaluated


def _are_one(one: Expr, other: Expr) -> bool:
    """Whether two exact numbers are equal, to more digits than unequal ones of their size share.

    Two rationals are compared as such. Else their difference is evaluated: a digit of it shows that
    they differ.
    """
    if one == other:
        return True
    if isinstance(one, Rational) and isinstance(other, Rational):
        return False
    difference = one - other
    if difference == 0:
        return True
    value = difference.evalf(2, maxn=_digits(difference))
    parts = [part for part in value.as_real_imag() if part != 0]
    # SymPy marks a number of which no digit is certain with the precision of one bit.
    return all(isinstance(part, Float) and part._prec == 1 for part in parts)


def _digits(difference: Expr) -> int:
    """The decimals by which unequal numbers with such integers and roots differ."""
    if difference.has(Integral):
        return LEAST_DIGITS // 3
    size = sum(
        int(number.p).bit_length() + int(number.q).bit_length()
        for number in difference.atoms(Rational)
    )
    roots = sum(not isinstance(power.exp, Integer) for power in difference.atoms(Pow))
    return min(MOST_DIGITS, LEAST_DIGITS + size * (1 + roots))


def _are_close(one: Expr, other: Expr) -> bool:
    """Whether two numbers differ by no more than the bound in the docstring of this module."""
    difference, first, second = (Abs(value).evalf(15) for value in (one - other, one, other))
    if not all(isinstance(value, Float | Integer) for value in (difference, first, second)):
        return False
    largest = max(first, second)
    return bool(difference <= min(SMALL * largest, max(ABSOLUTE, LARGE * largest)))


def _is_literal(value: Expr) -> bool:
    """Whether `value` is one decimal, without arithmetic except for its sign."""
    if isinstance(value, UnevaluatedExpr):
        value = value.args[0]
    return isinstance(value, Float) or (
        value.is_Mul and len(value.args) == 2 and value.args[0] == -1 and _is_literal(value.args[1])
    )


def _ends(value: Rational) -> bool:
    """Whether the decimals of `value` end: 2 and 5 are the only primes of its denominator."""
    rest = int(value.q)
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
