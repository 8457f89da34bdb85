r"""Tables of responses by extraction and gold answer: those that claim the gold answer, in whatever dress, and those that only hold its digits."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from dapo_async.reward.math_verifier.verify import verify, vote_key

# fmt: off
RIGHT = [
    ("marker", "34", ("Q\nA: 34", "A: 34", "so 34\n**A:** 34", "work\nA: $34.", "Answer: $34$", "Answer: The answer is $34$.",
        "Answer: The value of $x$ is $34$ dollars", "Answer: $34$ cm", "Answer: $34$ square units", "Answer: There are $34$ apples",
        "Answer: exactly $34$", "Answer: $x = 34$", "Answer: x = $34$", "Answer: Thus, the total cost equals $34$.", "Answer: **$34$**",
        "Answer: the largest integer is 34 meters", "Answer: 34 apples", "Answer: 34 square feet", "Answer: 34 m/s", "Answer: 34 km/h",
        "Answer: 34 meters per second", "Answer: 34 hours", "Answer: 34 m", "Answer: 34 mm^2", "Answer: 34 people in total",
        r"\boxed{34\text{ m}}", r"\boxed{34 \text{ ways}}", r"\boxed{34^\circ\text{C}}", r"\boxed{34\text{ cm}^2}", r"\boxed{34\text{ in}^2}",
        r"\boxed{34\ \mathrm{m/s}}", r"\boxed{34\text{ ft}}", "Answer:\n$$\n34\n$$", "Answer:\n\\[\n34\n\\]", "Answer: $$\n34\n$$",
        "**Answer:**\n\n\\[\nx = 34\n\\]\nDone.", "Answer:\n\\[ 34 \\]", "Answer:\n34", "Answer:\n\\[\n\\boxed{34}\n\\]",
        "\\boxed{33\nAnswer: 34", "Answer: 34</s>", r"\boxed{\text{The answer is }34}", r"\boxed{=34}", r"\boxed 34")),
    ("marker", "34", (r"\boxed34", r"\boxed{\text{Answer: }34}", r"\boxed{Answer: 34}", r"\boxed{\text{The final answer: } 34}", r"\boxed{\large 34}",
        r"\boxed{\underline{34}}", r"\boxed{\color{red}34}", "Answer: **34** ✅", "Answer: 34 ∎", r"Answer: $34$ $\blacksquare$", r"\boxed{34,}",
        "Answer: 34 (the sum of all)", r"\boxed{34}^\circ", r"- \boxed{34}", "the price of $5$ - \\boxed{34}", r"\boxed{2(17)}")),
    ("marker", "-34", (r"so $-\boxed{34}$", r"$x = -\boxed{34}$")),
    ("marker", "12", (r"\boxed{3(4)}", r"\boxed{(3)(4)}", r"\boxed{3 (4)}", r"\boxed{3\big(4\big)}")),
    ("marker", "1001", (r"\boxed{7(11)(13)}",)),
    ("marker", "55", (r"\boxed{\frac{10(11)}{2}}",)),
    ("marker", "3/2", (r"\boxed{3\left(\frac12\right)}", r"\boxed{1\frac12}")),
    ("marker", "3", (r"\boxed{\log_2(8)}", r"\boxed{\log_{2}(8)}")),
    ("marker", "2x+2", (r"\boxed{2(x+1)}",)),
    ("any", "34", ("So the total is 5 + 29 = 34.", "So 2*17=34.", "We get $2(17)=34$.")),
    ("any", "6", ("She has 10 - 4 = 6.",)),
    ("marker", "1024", (r"\boxed{1,\!024}", r"\boxed{1{,}024}", r"\boxed{1\,024}")),
    ("marker", "28%", ("Answer: $28$ percent", r"Answer: $28$\%")),
    ("any", "34", ("A: 34", "Q\nA: 34", "A: 34.", "#### 34", "5+29=<<5+29=34>>34", "33\n34", "So she has $34 left", "There are 34 apples.",
        "x = 34", "The total is 5 + 29 = 34 dollars.")),
    ("marker", "C", (r"\boxed{C}", r"\boxed{(C)}", r"\boxed{c}", r"\boxed{C.}", r"\boxed{(C) 34}", r"\boxed{C. 34}", r"\boxed{C: 34}",
        r"\boxed{\text{(C)}}", r"\boxed{\textbf{(C)}\ 5}", r"\boxed{Option C}", r"\boxed{(C)\ \frac{1}{2}}", "Answer: C. 34",
        "Answer: Option $C$", "Answer: (C) 34 apples", "Answer: $C$")),
    ("marker", "(a)", (r"\boxed{A}",)),
    ("marker", r"2\sqrt{3}", (r"\boxed{2\sqrt{3}\text{ cm}}", r"\boxed{2\sqrt3\ \text{cm}^2}", r"\boxed{2\sqrt{3} \text{ square units}}",
        r"Answer: $2\sqrt{3}$ square units", r"\boxed{2√3}")),
    ("marker", "x^2-1", (r"\boxed{x^2 -1}",)),
    ("marker", "x^2-5x+6", (r"\boxed{x^2 -5x +6}",)),
    ("marker", "5-3i", (r"\boxed{5 -3i}",)),
    ("marker", "x^2-3", (r"\boxed{y = x^2 -3}",)),
    ("marker", "1023", (r"\boxed{2^10 -1}", r"\boxed{2^{10} -1}")),
    ("marker", r"\log_{2}5", (r"\boxed{\log_2 5}",)),
    ("marker", "3", (r"\boxed{\log_2 8}",)),
    ("marker", r"\frac{\ln3}{\ln2}", (r"\boxed{\log_2 3}",)),
    ("marker", "5", (r"\boxed{x=5}", r"\boxed{x_1 = 5}", r"\boxed{f(2)=5}", r"\boxed{f(x)=5}", r"\boxed{\angle ABC=5^\circ}",
        r"\boxed{m\angle A=5}", r"\boxed{|AB|=5}", r"\boxed{AB = 5}", r"\boxed{m+n=5}", r"\boxed{a+b+c=5}", r"\boxed{\text{Area}=5}",
        r"\boxed{a + b = 2 + 3 = 5}", r"\boxed{P(A)=5}", r"\boxed{\alpha=5}", r"\boxed{BC=5}", r"\boxed{x_{10}=5}", r"\boxed{n = 5}",
        r"\boxed{=5}", r"\boxed{\overline{AB} = 5}", r"\boxed{x=y=5}")),
    ("marker", r"2\sqrt{13}", (r"\boxed{2√13}", r"\boxed{2√(13)}", r"\boxed{2√{13}}")),
    ("marker", "7", (r"\boxed{√49}",)),
    ("marker", "0.5", (r"\boxed{½}",)),
    ("marker", "34.5", (r"\boxed{34½}",)),
    ("marker", "1156", (r"\boxed{34²}",)),
    ("marker", "x^2+2", (r"\boxed{x²+2}",)),
    ("marker", r"\alpha+1", (r"\boxed{α+1}",)),
    ("marker", r"2\theta", (r"\boxed{2θ}",)),
    ("marker", "2t", (r"\boxed{2t}",)),
    ("marker", "2h", (r"\boxed{2h}",)),
    ("marker", "2m", (r"\boxed{2m}",)),
    ("marker", "2g", (r"\boxed{2g}",)),
    ("marker", "2s", (r"\boxed{2s}",)),
    ("marker", "2ab", (r"\boxed{2ab}", r"\boxed{2a*b}", r"\boxed{2ba}", r"\boxed{2a\cdot b}")),
    ("marker", "3m^2", (r"\boxed{3m^2}",)),
    ("marker", "6mn", (r"\boxed{6mn}",)),
    ("marker", "10d", (r"\boxed{10d}",)),
    ("marker", "7h", (r"\boxed{7h}",)),
    ("marker", "2rs", (r"\boxed{2rs}",)),
    ("marker", "2st", (r"\boxed{2st}",)),
    ("marker", "2cd", (r"\boxed{2cd}",)),
    ("marker", "3xy", (r"\boxed{3xy}",)),
    ("marker", "2l", (r"\boxed{2l}",)),
    ("marker", "4c", (r"\boxed{4c}",)),
    ("marker", "5o", (r"\boxed{5o}",)),
    ("marker", "2m+1", (r"\boxed{1+2m}",)),
    ("marker", "12mn", (r"\boxed{12nm}",)),
    ("marker", r"24\text{ cm}", (r"\boxed{24}", r"\boxed{24\text{ centimeters}}", r"\boxed{24 cm}", "Answer: $24$ cm")),
    ("marker", r"24\text{ meters per second}", (r"\boxed{24\text{ m/s}}",)),
    ("marker", r"864\mbox{ inches}^2", (r"\boxed{864\text{ square inches}}", r"\boxed{864}", r"\boxed{864\text{ in}^2}")),
    ("marker", r"\frac{2}{3}", (r"\boxed{0.6667}",)),
    ("marker", "1000, 2000", (r"\boxed{1,000, 2,000}",)),
    ("marker", r"\frac13", (r"\boxed{0.\overline{3}}",)),
    ("marker", r"0.\overline{3}", (r"\boxed{\frac{1}{3}}",)),
    ("marker", r"\frac16", (r"\boxed{0.1\overline{6}}",)),
    ("any", "1000000", ("it is 1e6", "1e6", "so $x = 10^6$")),
]
WRONG = [
    ("marker", "7", (r"\boxed{3(4)}", r"\boxed{3{4}}", r"\boxed{(3)(4)}", r"\boxed{{3}(4)}", r"\boxed{3 (4)}", r"\boxed{3[4]}", r"\boxed{3\{4\}}",
        r"\boxed{\frac{6}{2}(4)}", r"\boxed{3\,(4)}")),
    ("marker", "34", (r"\boxed{17\left(17\right)}", r"\boxed{33\tfrac22}", r"$-\boxed{34}$", r"$\boxed{34}^2$", r"\boxed{34:1}", r"\boxed{34\ldots}",
        r"\boxed{34_{n}}", r"\boxed{4\equiv34}", r"\boxed{34 quadrillion}", r"\boxed{34 \text{ crore}}", "Answer: 34 (wrong)", "Answer: 34 (dozen)")),
    ("marker", "12", (r"\boxed{5+3(4)}",)),
    ("marker", "5", (r"\boxed{3\frac{4}{2}}",)),
    ("any", "34", ("it is $17(17)$", "so x=33=34", "it is 34x", r"so 34 \text{ is wrong}", "34:1", "34 (wrong)", "2 times 34", "34th")),
    ("any", "1024", ("So the answer is 1,024x", r"1,024 \text{ is wrong}")),
    ("marker", "34", ("A: 33", "A: 34\nmore", "A: 34 or 35", "A: minus 34", "Answer: $3$$4$", "Answer: $3$4$", "Answer: 3$4",
        r"Answer: \(3\)\(4\)", r"Answer: \[3\]\[4\]", r"\boxed{3\!4}", r"\boxed{3\text{ }4}", r"\boxed{3\text{}4}",
        r"\boxed{3\displaystyle4}", r"\boxed{3\limits4}", r"\boxed{3\$4}", "Answer: 3'4", r"\boxed{3{}4}", r"\boxed{3\quad 4}",
        r"\boxed{\textbf{3}\textbf{4}}", r"\boxed{{3}{4}}", r"\boxed{\mathbf{3}4}", r"\boxed{3\left4}", "Answer: minus $34$",
        "Answer: negative $34$", "Answer: twice $34$", "Answer: half of $34$", "Answer: the square of $34$", "Answer: a multiple of $34$",
        "Answer: anything but $34$", "Answer: $34$ is wrong", "Answer: it isn't $34$", "Answer: it cannot be $34$",
        "Answer: The number is one less than $34$", "Answer: a number below $34$", "Answer: it is minus $34$", "Answer: it is minus 34",
        "Answer: half of it is $34$", "Answer: it is never $34$", "Answer: the opposite of it is $34$", "Answer: $34$ cannot be",
        "Answer: $34$ or so", "Answer: at most $34$", "Answer: the wrong answer is $34$", r"\boxed{34 \text{ million}}",
        r"\boxed{34 \text{ thousand}}", r"\boxed{34 \text{ billion dollars}}", r"\boxed{34 \text{ squared}}", r"\boxed{34 \text{ or less}}",
        r"\boxed{34 \text{ or more}}", r"\boxed{34 \text{ tenths}}", r"\boxed{34 \text{ hundredths}}", r"\boxed{34 \text{ pi}}",
        r"\boxed{34 \text{ minus one}}", r"\boxed{34 \text{ is wrong}}", r"\boxed{34\text{k}}", r"\boxed{34\text{M}}",
        r"\boxed{34 \text{ million dollars}}", r"\boxed{34\mathrm{k}}", "Answer: 34 bn", "Answer: 34 mln", "Answer: 34 thirty five",
        "Answer: 34 false", "Answer: 34 no", "Answer: 34 gross", "Answer: 34 score", "Answer: 34 pairs", "Answer: 34k", "Answer: 34 dozen",
        "Answer: $34$ million", "Answer: 34 and a half", "Answer: 34 plus one", "Answer:\n$$\n34", "Answer:\n$$\n35\n$$\n34", r"\boxed{34²}",
        "Answer: 34\nLet me double-check: \\boxed{35", "Answer: 34\n\\boxed{", r"\boxed{[34]}", "Answer: 34, 34", r"\boxed{34 \text{ or } 34}")),
    ("marker", "3400", ("Answer: $3$ $400$", r"\boxed{3\quad400}", r"\boxed{3\text{}400}")),
    ("any", "34", ("$3$$4$", r"$3\text{ }4$", "It is not $34$", "It can't be $34$.", "The answer isn't 34", "A: minus 34", "A: negative 34",
        "A: log 34", "A: 34 pi", "A: 33 to 34", "The answer is minus 34", "it was $34$ million", "It is never 34.", "so between 33 and 34",
        "It is at most 34", "below 34", "A: 34 thousand", "the answer is $34$ million", "the answer is 34 thousand",
        r"it is $34\text{ million}$", "34 million")),
    ("any", "5", ("so it is 5.\nA: 5 5", "-x=5", "|x|=5", r"$\sqrt{x}=5$", "$-x=5$", "2x=5")),
    ("any", "8", ("So she earns 8 dollars.\nA: none",)),
    ("marker", "C", (r"\boxed{(C) or (D)}", r"\boxed{(C) and (D)}", r"\boxed{(C) is incorrect}", r"\boxed{C: or D}", r"\boxed{C. D}",
        r"\boxed{CD}", r"\boxed{(C)(D)}", r"\boxed{(D)}", r"\boxed{not C}", r"\boxed{C, D}", r"\boxed{\text{C or D}}",
        r"\boxed{(C)\text{ or }(D)}", r"\boxed{C D}", r"\boxed{C/D}", r"\boxed{neither C}")),
    ("marker", "A", (r"\boxed{(A) or (B) or (C) or (D)}", r"\boxed{(A) (B) (C) (D)}", r"\boxed{(A) is wrong, (B) is right}",
        r"\boxed{A: no, B}", r"\boxed{A B C D}")),
    ("marker", "i", (r"\boxed{I}",)),
    ("marker", "x", (r"\boxed{X}", r"\boxed{y}")),
    ("marker", r"\frac{3}{4}", (r"\boxed{\frac{3}{4}\text{ million}}",)),
    ("marker", "2", (r"\boxed{2\text{ thirds}}", r"\boxed{5 -3}", r"\boxed{2t}", r"\boxed{2a}", r"\boxed{2b}", r"\boxed{2h}", r"\boxed{2g}",
        r"\boxed{2m}", r"\boxed{2s}", r"\boxed{2x}", r"\boxed{2xy}", r"\boxed{2ab}", r"\boxed{2 ab}")),
    ("marker", r"2\sqrt{3}", (r"\boxed{2\sqrt{3}\text{ million}}", r"\boxed{2\sqrt3 \text{ or less}}", r"Answer: minus $2\sqrt{3}$",
        r"Answer: half of $2\sqrt{3}$")),
    ("marker", "0", (r"\boxed{-1 0 1}", r"\boxed{1 -1}")),
    ("marker", "7", (r"\boxed{3 4}", r"\boxed{3 +4}")),
    ("marker", "5", (r"\boxed{-x=5}", r"\boxed{\sqrt{x}=5}", r"\boxed{\log x=5}", r"\boxed{|x|=5}", r"\boxed{\frac{x}{y}=5}",
        r"\boxed{\sin x=5}", r"\boxed{x^2=5}", r"\boxed{2x=5}", r"\boxed{x!=5}", r"\boxed{\ln x = 5}", r"\boxed{1/x=5}", r"\boxed{e^x=5}",
        r"\boxed{6=5}", r"\boxed{x>5}", r"\boxed{\frac{1}{x}=5}", r"\boxed{\{5,5\}}", r"\boxed{(5,5)}")),
    ("marker", "6", (r"\boxed{2√13}", r"\boxed{2\sqrt13}")),
    ("marker", "18", (r"\boxed{√49}",)),
    ("marker", "2t", (r"\boxed{2}", r"\boxed{2\text{ cm}}")),
    ("any", "2t", ("$2$",)),
    ("marker", "2h", (r"\boxed{2}", r"\boxed{2\text{ cm}}")),
    ("any", "2h", ("$2$",)),
    ("marker", "2m", (r"\boxed{2}", r"\boxed{2\text{ cm}}")),
    ("any", "2m", ("$2$",)),
    ("marker", "2g", (r"\boxed{2}", r"\boxed{2\text{ cm}}")),
    ("any", "2g", ("$2$",)),
    ("marker", "2s", (r"\boxed{2}", r"\boxed{2\text{ cm}}")),
    ("any", "2s", ("$2$",)),
    ("marker", "2ab", (r"\boxed{2}", r"\boxed{2\text{ cm}}", r"\boxed{2cd}", r"\boxed{2a}")),
    ("any", "2ab", ("$2$",)),
    ("marker", "3m^2", (r"\boxed{3}", r"\boxed{3\text{ cm}}")),
    ("any", "3m^2", ("$3$",)),
    ("marker", "6mn", (r"\boxed{6}", r"\boxed{6\text{ cm}}")),
    ("any", "6mn", ("$6$",)),
    ("marker", "10d", (r"\boxed{10}", r"\boxed{10\text{ cm}}")),
    ("any", "10d", ("$10$",)),
    ("marker", "7h", (r"\boxed{7}", r"\boxed{7\text{ cm}}")),
    ("any", "7h", ("$7$",)),
    ("marker", "2rs", (r"\boxed{2}", r"\boxed{2\text{ cm}}")),
    ("any", "2rs", ("$2$",)),
    ("marker", "2st", (r"\boxed{2}", r"\boxed{2\text{ cm}}")),
    ("any", "2st", ("$2$",)),
    ("marker", "2cd", (r"\boxed{2}", r"\boxed{2\text{ cm}}")),
    ("any", "2cd", ("$2$",)),
    ("marker", "3xy", (r"\boxed{3}", r"\boxed{3\text{ cm}}")),
    ("any", "3xy", ("$3$",)),
    ("marker", "2l", (r"\boxed{2}", r"\boxed{2\text{ cm}}")),
    ("any", "2l", ("$2$",)),
    ("marker", "4c", (r"\boxed{4}", r"\boxed{4\text{ cm}}")),
    ("any", "4c", ("$4$",)),
    ("marker", "5o", (r"\boxed{5}", r"\boxed{5\text{ cm}}")),
    ("any", "5o", ("$5$",)),
    ("any", "2", ("$2t$", "2t", "it is $2m$")),
    ("marker", r"24\text{ hours}", (r"\boxed{24\text{ minutes}}",)),
    ("marker", r"24\text{ cm}", (r"\boxed{24\text{ m}}", "Answer: 24 m", r"\boxed{24\text{ cm}^2}")),
    ("marker", r"\frac{1}{30000}", (r"\boxed{0.0000}",)),
    ("marker", "3", (r"\boxed{--3}",)),
]
# fmt: on


def judged(table, expected):
    rows = [
        (extraction, gold, response)
        for extraction, gold, responses in table
        for response in responses
    ]
    with ThreadPoolExecutor(2) as threads:
        verdicts = list(
            threads.map(lambda row: verify(row[2], row[1], extraction=row[0], timeout_s=20), rows)
        )
    return [
        (*row, verdict.reason)
        for row, verdict in zip(rows, verdicts, strict=True)
        if verdict.correct != expected
    ]


def test_responses_that_claim_the_gold_answer_are_right() -> None:
    assert judged(RIGHT, True) == []


def test_responses_that_only_look_like_it_are_wrong() -> None:
    assert judged(WRONG, False) == []


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan"), 1e12, 86_401])
def test_a_deadline_that_is_none_is_refused(timeout_s) -> None:
    with pytest.raises(ValueError, match="must be positive and at most 86400, a day"):
        verify("Answer: 3", "3", timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("0.5", r"\frac{1}{2}", True), ("x = 34", "34.0", True), ("1,024", "$1024$", True), ("(C)", "C", True), ("x+1", "x + 1", True),
     ("34", "35", False), ("28%", "28", False), ("x+1", "x+2", False)],
)  # fmt: skip
def test_spellings_of_one_answer_vote_together(one, other, same) -> None:
    assert (vote_key(one) == vote_key(other)) == same
