"""A thousand adversarial responses are rejected, and none breaks or delays the verifier."""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from adversarial import responses

from dapo_async.reward import Verdict
from dapo_async.reward.math_verifier.pool import GRACE_S, shared_pool
from dapo_async.reward.math_verifier.verify import Extraction, verify
from dapo_async.reward.math_verifier.worker import wall_s


@pytest.fixture(scope="module", autouse=True)
def ready() -> None:
    """The start of the process that is asked first takes seconds and counts in no test."""
    shared_pool().processes[-1].wait_ready()


def judged(pairs: Sequence[tuple[str, str]], extraction: Extraction) -> list[Verdict]:
    with ThreadPoolExecutor(2) as threads:
        return list(
            threads.map(lambda pair: verify(*pair, extraction=extraction, timeout_s=2), pairs)
        )


@pytest.mark.slow
def test_a_thousand_adversarial_responses_are_never_accepted() -> None:
    pairs = list(responses(1000))
    verdicts = judged(pairs, "marker")
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.correct] == []
    reasons = Counter(verdict.reason for verdict in verdicts)
    assert reasons["failed"] == 0
    assert (
        min(reasons["wrong"], reasons["no_answer"], reasons["too_large"]) > 50
    )  # they are of many kinds


@pytest.mark.slow
def test_adversarial_answers_are_never_accepted_as_whole_responses() -> None:
    pairs = list(responses(200, seed=1))
    assert [
        pair
        for pair, verdict in zip(pairs, judged(pairs, "none"), strict=True)
        if verdict.correct or verdict.failed
    ] == []


@pytest.mark.slow
def test_adversarial_last_expressions_are_never_accepted() -> None:
    pairs = [pair for pair in responses(600, seed=2) if "Answer:" in pair[0] or len(pair[0]) < 60]
    # Without a marker the last of several expressions counts; the other tests have contradictions
    # and lists.
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
def test_a_megabyte_is_judged_in_a_moment(unit: str, extraction: Extraction) -> None:
    text = unit * (2**20 // len(unit))
    began_s, plain_s = time.monotonic(), time.thread_time()
    verdict = verify("Answer: " + text, "34", extraction=extraction, timeout_s=1)
    assert not verdict.correct
    assert not verdict.failed
    assert time.thread_time() - plain_s < 2  # of this thread; a process has its deadline
    assert time.monotonic() - began_s < 8 + wall_s(1) + GRACE_S  # on a busy machine
