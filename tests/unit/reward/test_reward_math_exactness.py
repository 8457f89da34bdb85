"""Values without a decimal point are equal exactly, decimals to a relative bound, everywhere."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from dapo_async.reward.math_verifier.verify import verify

Pairs = tuple[tuple[str, str], ...]

# (answer, gold answer)
DIFFERENT: Pairs = (
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
    (r"\frac{1}{100!}", r"\frac{1}{99!}"),
    (r"10^{-20}", r"2 \cdot 10^{-20}"),
    (r"\frac{1}{3 \cdot 2^{2006}}", r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}"),
    (r"(10^{-20}, 1)", r"(2 \cdot 10^{-20}, 1)"),
    (r"\{10^{-20}, 1\}", r"\{2 \cdot 10^{-20}, 1\}"),
    (r"[10^{-20}, 1]", r"[2\cdot 10^{-20}, 1]"),
    (r"(10^{-20}, 1]", r"(2\cdot 10^{-20}, 1]"),
    (
        r"\begin{pmatrix}10^{-20}&1\\0&1\end{pmatrix}",
        r"\begin{pmatrix}2\cdot10^{-20}&1\\0&1\end{pmatrix}",
    ),
    (r"x = 10^{-20}", r"x = 2\cdot10^{-20}"),
    (r"x = 10^{-20}", r"2\cdot10^{-20}"),
    (r"10^{-20}\text{ m}", r"2\cdot10^{-20}\text{ m}"),
    (r"10^{-20}\%", r"2\cdot10^{-20}\%"),
    (r"10^{-20} x", r"2\cdot10^{-20} x"),
    (r"x + 10^{-20}", r"x + 2\cdot 10^{-20}"),
    (r"y = 10^{-20} x", r"y = 2\cdot10^{-20} x"),
    (r"x < 10^{-20}", r"x < 2\cdot10^{-20}"),
    (r"e^{-50}", r"e^{-51}"),
    (r"e^{-100}", r"2e^{-100}"),
    (r"\frac{\pi}{10^{20}}", r"\frac{2\pi}{10^{20}}"),
    (r"\frac{\sqrt{2}}{10^{18}}", r"\frac{\sqrt{3}}{10^{18}}"),
    (r"\sqrt{10^{40}+1}", r"10^{20}"),
    (r"e^{\pi\sqrt{163}}", r"262537412640768744"),
    (r"10^{20}+1", r"10^{20}"),
    (r"2^{100}", r"2^{100}+1"),
    (r"\frac{1}{\binom{200}{100}}", r"\frac{1}{\binom{200}{99}}"),
    (r"1+10^{-20}", r"1"),
    (r"1+10^{-20}i", r"1+2\cdot10^{-20}i"),
    (r"\left(\frac{1}{2}\right)^{100}", r"\left(\frac{1}{2}\right)^{101}"),
    (r"2^{-100}", r"2^{-101}"),
    (r"1-2^{-60}", r"1"),
    (r"0", r"10^{-20}"),
    (r"10^{-20}", r"0"),
    (r"\frac{355}{113}", r"\pi"),
    (r"\sin(10^{-20})", r"10^{-20}"),
    (r"\frac{1}{7^{30}}, \frac{1}{7^{31}}", r"\frac{1}{7^{30}}, \frac{1}{7^{32}}"),
    (r"1.5\cdot 10^{-20}", r"3\cdot10^{-20}"),
    (r"1.414\cdot10^{-10}", r"\sqrt{2}\cdot10^{-10}"),
    (r"(1.5\cdot10^{-20}, 1)", r"(1.6\cdot10^{-20}, 1)"),
    (r"(0.0000001, 1)", r"(0, 1)"),
    (r"(1000000.5, 1)", r"(1000000, 1)"),
    (r"(34.0000001,1)", r"(34,1)"),
    (r"\{0.0000001, 3\}", r"\{0.0000002, 3\}"),
    (r"[0, 0.0000001]", r"[0, 0.0000002]"),
    (r"3.14159", r"\pi"),
    (r"2.71828", r"e"),
    (r"(3.14159, 1)", r"(\pi, 1)"),
    (r"\begin{pmatrix}0.0000001\\1\end{pmatrix}", r"\begin{pmatrix}0.0000002\\1\end{pmatrix}"),
    (r"x=0.0000001", r"x=0.0000002"),
    (r"\ln(1+10^{-20})", r"10^{-20}"),
    (r"\sqrt[3]{10^{60}+1}", r"10^{20}"),
    (r"\log_{10} (10^{20}+1)", r"20"),
    (r"(\sqrt{10^{220}+1}, 1)", r"(10^{110}, 1)"),
    (r"\{\sqrt{10^{220}+1}, 1\}", r"\{10^{110}, 1\}"),
    (r"\frac{1}{2^{98}} - x", r"\frac{1}{2^{99}} - x"),
    (r"1e-400", r"2e-400"),
)
EQUAL: Pairs = (
    (r"\frac{1}{2^{98}}", r"2^{-98}"),
    (r"\frac{2}{100!}", r"\frac{1}{50\cdot 99!}"),
    (r"10^{-20}", r"\frac{1}{10^{20}}"),
    (r"(10^{-20}, 1)", r"(\frac{1}{10^{20}}, 1)"),
    (r"\{1, 10^{-20}\}", r"\{\frac{1}{10^{20}}, 1\}"),
    (r"[10^{-20}, 1]", r"[\frac{1}{10^{20}}, 1]"),
    (r"\begin{pmatrix}10^{-20}&1\end{pmatrix}", r"\begin{pmatrix}\frac{1}{10^{20}}&1\end{pmatrix}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
    (r"\sqrt{2}\sqrt{3}-\sqrt{6}+5", r"5"),
    (r"e^{-100}", r"\frac{1}{e^{100}}"),
    (r"\cos\frac{\pi}{3}", r"\frac12"),
    (r"\log_2 8", r"3"),
    (r"0.5", r"\frac{2}{4}"),
    (r"0.5\cdot 10^{-20}", r"\frac{1}{2\cdot10^{20}}"),
    (r"(0.5, 1)", r"(\frac12, 1)"),
    (r"3.141593", r"\pi"),
    (r"1.4142136", r"\sqrt{2}"),
    (r"(1.414214, 1)", r"(\sqrt2, 1)"),
    (r"\{1.414214, 1\}", r"\{1, \sqrt2\}"),
    (r"1.414214\cdot10^{-10}", r"\sqrt2\cdot10^{-10}"),
    (r"1.414213562\cdot10^{10}", r"10^{10}\sqrt2"),
    (r"14142135623.73", r"10^{10}\sqrt2"),
    (r"1.2676506\cdot10^{30}", r"2^{100}"),
    (r"(0.3333333, 1)", r"(\frac13, 1)"),
    (r"2.593742", r"1.1^{10}"),
    (r"0.1+0.2", r"0.3"),
    (r"0.1x+0.2x", r"0.3x"),
    (r"10^{-20}x", r"\frac{x}{10^{20}}"),
    (r"(\sqrt{3+2\sqrt2})x", r"(1+\sqrt2)x"),
    (r"x=10^{-20}", r"\frac{1}{10^{20}}"),
    (r"28\%", r"0.28"),
    (r"28\%", r"28"),
    (r"(28\%, 1)", r"(0.28, 1)"),
    (r"\frac{50}{3}\%", r"\frac{1}{6}"),
    (r"\binom{200}{100}", r"\frac{200!}{100!\cdot100!}"),
    (r"2^{2008}", r"4^{1004}"),
    (r"\frac{\pi^2}{6}", r"\pi^2/6"),
    (r"\arctan(1)", r"\frac{\pi}{4}"),
    (r"2 + \sqrt{3}", r"\frac{1}{2-\sqrt3}"),
    (r"1-2^{-60}", r"\frac{2^{60}-1}{2^{60}}"),
    (r"6.02\times10^{23}", r"602000000000000000000000"),
)
# Two values that differ, but by less than any absolute tolerance.
TINY: Pairs = (
    (r"2^{-98}", r"2^{-99}"),
    (r"\frac{1}{100!}", r"\frac{1}{99!}"),
    (r"10^{-20}", r"2 \cdot 10^{-20}"),
    (r"\frac{\pi}{10^{30}}", r"\frac{e}{10^{30}}"),
    (r"\frac{\sqrt{2}}{7^{40}}", r"\frac{\sqrt{3}}{7^{40}}"),
    (r"5 + 3^{-60}", r"5 + 3^{-61}"),
    (r"10^{40} + 1", r"10^{40}"),
    (r"1.5 \cdot 10^{-20}", r"1.6 \cdot 10^{-20}"),
    ("0.0000001", "0.0000002"),
)
SAME: Pairs = (
    ("2^{-98}", r"\frac{1}{2^{98}}"),
    (r"\frac{2}{100!}", r"\frac{1}{50 \cdot 99!}"),
    ("10^{-20}", r"\frac{1}{10^{20}}"),
    (r"1.5 \cdot 10^{-20}", r"\frac{3}{2 \cdot 10^{20}}"),
)
PLACES = (
    "%s",
    "x = %s",
    "(%s, 7)",
    "(1, 2, %s)",
    r"\{%s, 7\}",
    "%s, 7",
    "[-3, %s]",
    r"(-\infty, %s)",
    r"\begin{pmatrix} 1 & %s \\ 2 & 3 \end{pmatrix}",
    r"%s \text{ cm}",
    "x < %s",
    "x + %s",
    r"\left(x - (%s)\right)^2",
)


def judged(pairs: Pairs) -> dict[tuple[str, str], str]:
    """The reason of each verdict."""
    with ThreadPoolExecutor(2) as threads:
        return dict(
            zip(
                pairs,
                threads.map(
                    lambda pair: verify(rf"\boxed{{{pair[0]}}}", pair[1], timeout_s=20).reason,
                    pairs,
                ),
                strict=True,
            )
        )


@pytest.mark.slow
def test_values_that_differ_by_little_are_different() -> None:
    assert {pair for pair, reason in judged(DIFFERENT).items() if reason != "wrong"} == set()


@pytest.mark.slow
def test_one_value_in_two_spellings_is_equal() -> None:
    assert {pair for pair, reason in judged(EQUAL).items() if reason != "correct"} == set()


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_values_that_differ_by_little_are_different_in_every_place(place: str) -> None:
    pairs = tuple((place % one, place % other) for one, other in TINY)
    assert {pair for pair, reason in judged(pairs).items() if reason != "wrong"} == set()
    same = tuple((place % one, place % other) for one, other in SAME)
    assert {pair for pair, reason in judged(same).items() if reason != "correct"} == set()
