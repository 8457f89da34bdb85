"""A thousand responses that must not be accepted are not, and none of them breaks or holds up the verifier."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from adversarial import responses

from dapo_async.reward.math_verifier.verify import verify


def judged(pairs, extraction):
    with ThreadPoolExecutor(2) as threads:
        return list(
            threads.map(lambda pair: verify(*pair, extraction=extraction, timeout_s=2), pairs)
        )


def test_a_thousand_adversarial_responses_are_never_accepted() -> None:
    pairs = list(responses(1000))
    verdicts = judged(pairs, "marker")
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.correct] == []
    reasons = Counter(verdict.reason for verdict in verdicts)
    assert reasons["failed"] == 0
    assert (
        min(reasons["wrong"], reasons["no_answer"], reasons["too_large"]) > 50
    )  # they are of many kinds


def test_nor_where_the_whole_response_is_taken_for_the_answer() -> None:
    pairs = list(responses(200, seed=1))
    assert [
        pair
        for pair, verdict in zip(pairs, judged(pairs, "none"), strict=True)
        if verdict.correct or verdict.failed
    ] == []


def test_nor_where_the_last_expression_is_looked_for() -> None:
    pairs = [pair for pair in responses(600, seed=2) if "Answer:" in pair[0] or len(pair[0]) < 60]
    # Unmarked, the last of several expressions is taken at its word; contradictions and lists are for the other two.
    verdicts = judged(pairs, "any")
    assert not any(verdict.failed for verdict in verdicts)
    taken = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.correct]
    assert [pair for pair in taken if "=" not in pair[0] and "\n" not in pair[0]] == []


@pytest.mark.parametrize("extraction", ["marker", "any", "none"])
@pytest.mark.parametrize(
    "unit",
    [
        "9",
        "x",
        "a b ",
        "(",
        "{",
        r"\boxed{",
        "Answer:",
        "Answer: 1\n",
        "answer ",
        "<think>",
        "$",
        r"\frac{",
        "1 ",
        "=",
        "**",
        "\\",
        " ",
        "is ",
    ],
)
def test_a_megabyte_is_judged_in_a_moment(unit, extraction) -> None:
    text = unit * (2**20 // len(unit))
    began_s = time.monotonic()
    verdict = verify("Answer: " + text, "34", extraction=extraction, timeout_s=1)
    assert not verdict.correct
    assert not verdict.failed
    assert time.monotonic() - began_s < 8  # a start of a process included
