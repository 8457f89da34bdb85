"""Prompts on which the verifier fails: left out by name, and never all of them."""

from __future__ import annotations

import json

import numpy as np

from dapo_async.replay.quarantine import (
    FAILURES,
    MOST_IN_A_ROW,
    Quarantine,
    VerifierFailures,
)
from dapo_async.types import Prompt


def prompt(row: int, text: str = "1+1=") -> Prompt:
    return Prompt(row, text, np.zeros(2, np.int32), "2")


def test_a_prompt_that_fails_three_times_in_a_row_goes_in_and_is_named() -> None:
    quarantine = Quarantine(10)
    assert not quarantine.counts_failures
    assert [quarantine.failed(prompt(7), "it hangs") for _ in range(FAILURES - 1)] == [None, None]
    assert quarantine.judged(prompt(7))  # one verdict, and the count begins again
    assert not quarantine.counts_failures
    assert [quarantine.failed(prompt(7), "it hangs") for _ in range(FAILURES - 1)] == [None, None]
    assert quarantine.judged(prompt(8))  # ends the row of failures
    assert not quarantine.judged(prompt(8)), "the count of another prompt costs a record each time"
    text = "What is\n" + "9" * 100
    row = quarantine.failed(prompt(7, text), "it hangs")
    assert row == {"row": 7, "source": "", "text": "9" * 60, "why": "it hangs"}
    assert quarantine.holds(prompt(7))
    assert not quarantine.holds(prompt(8))
    assert quarantine.lines == (
        f"prompt of row 7 ({'9' * 60!r}) is left out from now on: the verifier failed on 3 of its "
        "groups; the last time: it hangs",
    )
    assert Quarantine(10, [row]).holds(prompt(7))  # of a resumed run


def test_one_prompt_always_stays_and_a_verifier_that_never_works_is_a_fault() -> None:
    quarantine = Quarantine(3)
    for number in range(MOST_IN_A_ROW - 1):
        quarantine.failed(prompt(number % 3), "")
    assert len(quarantine.rows) == 2
    assert quarantine.fault is None
    quarantine.failed(prompt(2), "my:judge raised KeyError: 3")
    assert quarantine.fault == (
        "the verifier failed on 64 groups in a row; the last time: my:judge raised KeyError: 3; "
        "correct it (reward.verifier)"
    )


def test_failures_before_the_death_of_the_process_count() -> None:
    failures = VerifierFailures()
    quarantine = Quarantine(10, failures=failures)
    for _ in range(FAILURES - 1):
        quarantine.failed(prompt(7), "it hangs")
        quarantine.failed(prompt(3), "it hangs")
    image = json.loads(json.dumps(failures.image()))
    after = Quarantine(10, failures=VerifierFailures.of_image(image))
    assert after.counts_failures
    assert after.failed(prompt(7), "it hangs") is not None
    # Of a prompt that went in just before the death, nothing is left to count.
    held = VerifierFailures.of_image(image)
    Quarantine(10, [{"row": 7, "text": "", "why": ""}], held)
    assert [*held.by_row] == [3]
