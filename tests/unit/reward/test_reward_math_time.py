"""The plain path has no deadline, so its work is bounded: texts that attack its patterns are fast.

The patterns are found in the modules, so a new one is attacked too.
"""

import re
import time
from collections.abc import Mapping
from typing import Any

import pytest
from pattern_attacks import attacks, growth, patterns, texts, uses

import dapo_async.reward as package
from dapo_async.reward.math_verifier import verify as verifier
from dapo_async.reward.math_verifier.extract import LONGEST_BOX, marked_answer, squeezed
from dapo_async.reward.math_verifier.verify import Extraction, verify
from dapo_async.reward.thinking import conclusion

MOST_S = 0.5  # processor time of one plain verdict; the slowest one takes a tenth of it
FORMS: tuple[tuple[str, str, Extraction], ...] = (
    (r"\boxed{%s", "34", "marker"),
    (r"\boxed{%s}", "34", "marker"),
    ("Answer: %s", "34", "marker"),
    ("%s", "34", "none"),
    ("%s", "34", "any"),
    (r"\boxed{34}", "%s 3", "marker"),
)


class NoEngine:
    """Instead of computer algebra, which has a deadline of its own."""

    def ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, bool]:
        return {"equal": False}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "shared_pool", NoEngine)


def seconds(response: str, gold: str, extraction: Extraction) -> float:
    """Processor time of one verdict."""
    began_s = time.thread_time()
    verify(response, gold, extraction=extraction)
    return time.thread_time() - began_s


@pytest.mark.slow
def test_no_pattern_can_be_made_to_take_long_by_an_answer_of_full_length() -> None:
    found = patterns(package)
    assert len(found) > 90
    assert "extract._LABEL" in found
    texts = {
        prefix + body * ((LONGEST_BOX - 100) // len(body)): name
        for name, pattern in found.items()
        for prefix, body in attacks(pattern, rounds=1)
    }
    slow = [
        (texts[text], text[:40], form, taken_s)
        for text in texts
        for form, gold, extraction in FORMS
        if (taken_s := seconds(form.replace("%s", text), gold.replace("%s", text), extraction))
        > MOST_S
    ]
    assert slow == []


def test_the_time_of_every_pattern_grows_in_proportion_to_the_text() -> None:
    found = uses(package)
    assert len(found) > 140
    assert {"extract._LABEL", "numeric._DECIMAL"} < found.keys()
    grown = [
        (name, method, grows)
        for name, (pattern, methods) in found.items()
        for method in sorted(methods)
        for write in texts(pattern)
        if (grows := growth(pattern, method, write)) is not None
    ]
    assert grown == []


@pytest.mark.parametrize(
    ("written", "method"),
    [(r"\s*x", "search"), (r"(?:a|a)*b", "match"), (r"\s*(?:a\s*)?\s*b", "fullmatch"),
     (r"(?<=7)\s*\*?\s*pi", "search"), (r"is\s+(?!.*not).", "search")],
)  # fmt: skip
def test_the_growth_of_a_slow_pattern_is_found(written: str, method: str) -> None:
    pattern = re.compile(written, re.DOTALL)
    assert any(growth(pattern, method, write) for write in texts(pattern))


@pytest.mark.parametrize("blank", [" ", "\t", "\n", " \n", "\u00a0"])
@pytest.mark.parametrize("form", [r"\boxed{%s", r"\boxed{%s}", "Answer:%s", r"\boxed{the%s4}"])
def test_blanks_take_no_time(form: str, blank: str) -> None:
    for count in (1500, 100_000):
        assert seconds(form.replace("%s", blank * count), "34", "marker") < MOST_S


@pytest.mark.parametrize(
    "unit", [" ", "a", "7", "{", "$", r"\boxed{", r"\boxed", "Answer:", "answer is ", "<think>"]
)
def test_searches_in_a_whole_response_take_linear_time(unit: str) -> None:
    def taken_s(size: int) -> float:
        text = unit * (size // len(unit))
        times = []
        for _ in range(3):
            began_s = time.thread_time()
            conclusion(text, text)
            squeezed(text)
            marked_answer(text)
            times.append(time.thread_time() - began_s)
        return min(times)

    assert taken_s(200_000) < 12 * max(taken_s(50_000), 1e-3)
