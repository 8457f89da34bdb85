"""Verdicts on literal mathematical answers: their extraction, equal and different answers."""

from collections.abc import Mapping
from typing import Any, Never

import pytest

from dapo_async.reward import Verdict, get_verifier
from dapo_async.reward.math_verifier import verify as verifier
from dapo_async.reward.math_verifier.verify import verify


class NoEngine:
    """A pool that fails on every question."""

    def ask(self, question: Mapping[str, Any], timeout_s: float) -> Never:
        raise AssertionError(f"computer algebra was asked {question}")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without computer algebra: every question to it fails."""
    monkeypatch.setattr(verifier, "shared_pool", NoEngine)


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        ("Answer: 34", "34"),
        ("so it is\nAnswer: 34\n", "34"),
        ("Answer: 33\nno, wait\nAnswer: 34", "34"),
        ("**Answer:** 34", "34"),
        ("**Answer: 34**", "34"),
        ("### Answer: `34`", "34"),
        ("Final Answer: $34$.", "34"),
        ("**Final Answer:**\n\n34", "34"),
        ("ANSWER : 34", "34"),
        ("Answer is: 34", "34"),
        (r"\boxed{34}", "34"),
        (r"thus $x = \boxed{34}$ apples.", "34"),
        (r"\boxed{33}, no: \boxed{34}", "34"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {34}", "34"),
        (r"Answer: 33 and then \boxed{34}", "34"),
        ("Answer: \\boxed{33}\nAnswer: 34", "34"),
        ("Answer: The final answer is $34$. I hope it is correct.", "34"),
        ("Answer: The largest $n$ is 34.", "34"),
        ("Answer: 34 <|im_end|>", "34"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"\boxed{-2} \quad \text{or} \quad \boxed{1}", "-2, 1"),
        (r"\boxed{1} nonono no no \boxed{2}", "2"),
        (r"\boxed{\boxed{4}}", "4"),
        ("<think>Answer: 33</think>Answer: 34", "34"),
        (r"<think>\boxed{33}</think> I say \boxed{34}", "34"),
        ("Answer: 1 Answer: 34", "1 Answer: 34"),
    ],
)
def test_the_last_marker_after_the_thinking_holds_the_answer(
    response: str, extracted: str | None
) -> None:
    assert verify(response, "7,8,9", timeout_s=5).extracted == extracted


@pytest.mark.parametrize(
    "response",
    ["", " \n", "34", "The answer is 34.",
     r"\boxed{34", r"\boxed{\frac{3", r"\boxed{}", "Answer:", "Answer:\n ", "Answer: **",
     "<think>Answer: 34", "answer 34",
     "<think>a</think><think>Answer: 34", "Answer: 34</think>", "\\boxed"],
)  # fmt: skip
def test_without_a_whole_marker_there_is_no_answer(plain: None, response: str) -> None:
    assert verify(response, "34") == Verdict(correct=False, extracted=None, reason="no_answer")


def test_a_truncated_response_has_no_answer(plain: None) -> None:
    assert (
        verify("Let me see: 30 + 4 = 34, so the answer must be 34" * 50, "34").reason == "no_answer"
    )


@pytest.mark.parametrize(
    ("gold", "answers"),
    [
        ("34", ("34", "34.", "34.0", "3.4e1", r"34^\circ", "+34", "034", "**34**", "$34$",
                r"\(34\)", "34 apples", r"34\text{ cm}^2", "34 cm", r"\$34", "$34.00", "34%")),
        ("73", ("073", "146/2", r"\frac{146}{2}", "73 degrees")),
        ("1,024", ("1024", "1 024", r"1\,024", "1{,}024", r"1,\!024", "1,024.0")),
        ("0.5", ("1/2", r"\frac12", r"\dfrac{1}{2}", ".5", "0.50", r"50\%", "50 percent")),
        ("-7/2", ("-3.5", r"-\frac{7}{2}", r"\frac{-7}{2}", r"-3\frac12", "-3 1/2", "−3.5")),
        (r"\frac{2}{3}", ("0.6667", "0.66666667", "4/6")),
        ("C", ("(C)", r"\text{C}", r"\textbf{(C)}", "c", "C.", "(C) 34", "C: 34")),
        (r"\text{Evelyn}", ("Evelyn", "evelyn", r"\mathrm{Evelyn}", "Evelyn.")),
        (r"\text{no solution}", ("No solution",)),
    ],
)  # fmt: skip
def test_plain_answers_are_equal_in_every_spelling(
    plain: None, gold: str, answers: tuple[str, ...]
) -> None:
    wrong = [answer for answer in answers if not verify(answer, gold, extraction="none").correct]
    assert wrong == []


@pytest.mark.parametrize(
    ("gold", "answers"),
    [
        ("34", ("3 4", "1 2 3 4", "-34", "35", "3,4, 34", "34, 35", "34 or 35",
            r"33 \text{ and } 34", "34 35",
                "thirty", "٣٤", "３４", "3\u200b4", "34\x00",
                "\x0c34", "33 34", "34.0000001", "1 34", "{34", "34e1", "340%")),
        ("7", ("3 4", "0.07")),
        ("32349", ("32, 349", "32 3 49")),
        (r"\frac{2}{3}", ("0.667", "0.66", "0.6666", "3/2")),
        ("0.3333", ("1/3", "0.333")),
        ("0", ("1e-9", "0.0000001")),
        ("C", ("D", "(D)")),
        (r"\text{east}", ("seat", "west", "34")),
    ],
)  # fmt: skip
def test_plain_answers_that_only_look_alike_are_wrong(
    plain: None, gold: str, answers: tuple[str, ...]
) -> None:
    accepted = [answer for answer in answers if verify(answer, gold, extraction="none").correct]
    assert accepted == []


EQUAL = [
    ("42", "x = 42"), ("5", "2+3=5"), ("12", "x=y=12"), ("12", r"|AB| = 12"), ("1024", "2^{10}"),
        (r"3\times10^{8}", "3e8"),
    (r"2\sqrt{2}", r"\sqrt{8}"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"), (r"\frac{\pi}{2}",
    "π/2"), ("x^2+2x+1", "(x+1)**2"),
    (r"\tan^2(y)+1", r"\sec^2(y)"), ("(3,4)", "3, 4"), ("1, 2", "2 and 1"), (r"\{1,2\}",
    r"\{2,1\}"), ("(1,9/2)", "(1,4.5)"),
    (r"(-\infty,3)", "(-∞, 3)"), ("2<x<5", "(2,5)"), (r"x\ge 3", "x >= 3"), ("2x+1", "y=2x+1"),
    ("x=5,y=2", "5,2"),
    (r"1\pm\sqrt5", r"1-\sqrt{5}, 1+\sqrt5"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1 & 2\\ 3 & 4\end{bmatrix}"),
    (r"(\frac{3}{5},\frac{8}{3}]", "(0.6,2.6667]"),
    ("34x+45y=100", "-34x-45y=-100"), (r"1-\frac{1}{\mathrm{e}}", r"1-\frac1e"), ("204_5", "204"),
        ("120", "5!"), ("2^{2008}", "4^{1004}"),
]  # fmt: skip
DIFFERENT = [
    ("34", "1=2=34"), ("42", "x=41=42"), ("42", "40+1=42"), ("5", "3=5"), ("C", "175=C"), ("34",
        "709=x=34"), ("10", "2x=10"), ("5", "x>5"),
    ("34", "34 million"), ("7", "6+"), ("C", "CD"),

    ("34", r"x\ne 34"), ("34", "34x"), ("34", "34!"), ("34", r"34 \text{ or } x"), ("7",
        r"3\quad 4"), ("2", r"\pm2"),
    ("3", "11_2"), ("204_5", "204_6"),
    (r"\sqrt{2}", "1.414"), (r"\pi", "3.14159"), (r"\frac{1}{10^7}", "0.0000002"), ("(1,2)",
    "(2,1)"), ("[1,2]", "(1,2)"), ("(1,2)", "(1,2,3)"),
    (r"1-\frac{1}{\mathrm{e}}", r"1+\frac{1}{\mathrm{e}}"), ("x^2", "x^3"), ("x=5", "y=5"),
    (r"\frac{3}{7}", r"5, \frac{3}{7}"), ("2x+1", "y=2x+2"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_answers_are_equal_by_algebra(gold: str, answer: str) -> None:
    assert verify(rf"So \boxed{{{answer}}}.", gold).correct


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_answers_differ_by_algebra_that_math_verify_may_take_for_equal(
    gold: str, answer: str
) -> None:
    verdict = verify(rf"So \boxed{{{answer}}}.", gold)
    assert (verdict.correct, verdict.reason) == (False, "wrong")


@pytest.mark.parametrize(
    ("text", "gold", "correct"),
    [
        ("the total is 1,000.99€", "1000.99", True),
        ("so $x = 3$ and then $y = \\frac{1}{2}$", "1/2", True),
        ("we need 34 apples", "34", True),
        ("The answer is 34.", "34", True),
        ("AZYUK2A", "2", False),
        ("1 2 3 34", "34", False),
        ("it is 33 or 34", "34", False),
        ("33=34", "34", False),
        ("Answer: 1 2 34", "34", False),
        (r"it is 2\sqrt{3}", "2", False),
        ("2", r"2\sqrt{3}", False),
        (r"so it is $\boxed{34", "34", False),
    ],
)
def test_any_falls_back_to_the_last_expression(text: str, gold: str, correct: bool) -> None:
    assert verify(text, gold, extraction="any").correct == correct


def test_the_same_question_has_the_same_verdict() -> None:
    questions = [
        (r"\boxed{\frac{x}{7}+\frac{2}{7}}", r"\frac{x+2}{7}"),
        (r"\boxed{\{b,a\}}", r"\{a,b\}"),
        (r"\boxed{x+1}", "x+2"),
    ]
    assert len({tuple(verify(*question) for question in questions) for _ in range(3)}) == 1


def test_an_empty_gold_an_unknown_extraction_and_no_deadline_are_refused() -> None:
    with pytest.raises(ValueError, match="the gold answer is empty"):
        verify("Answer: 3", " \n")
    with pytest.raises(ValueError, match=r"extraction \('all'\) must be one of marker, any, none"):
        verify("Answer: 3", "3", extraction="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"timeout_s \(0\) must be positive"):
        verify("Answer: 3", "3", timeout_s=0)


def test_the_verifier_named_math_passes_its_deadline_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    class Late:
        def ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, str]:
            asked.append(timeout_s)
            return {"reason": "timeout"}

    monkeypatch.setattr(verifier, "shared_pool", Late)
    assert get_verifier("math", timeout_s=1.5)("Answer: x+1", "x").reason == "timeout"
    assert asked == [1.5]
