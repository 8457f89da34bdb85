"""Recorded verdicts of math-verify's tests and on GSM8K responses; disagreements are listed."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from paths import ROOT, SHARED

from dapo_async.reward import Verdict
from dapo_async.reward.math_verifier.verify import verify

Row = dict[str, Any]
VECTORS = SHARED / "data" / "grader_vectors"
LISTED = json.loads((ROOT / "benchmarks" / "grader_disagreements.json").read_text())
needs_vectors = pytest.mark.skipif(
    not VECTORS.is_dir(),
    reason="the vectors, shared/data/grader_vectors beside the checkout, are absent",
)


def disagreements(rows: Sequence[Row], judge: Callable[[Row], Verdict]) -> dict[str, bool | float]:
    """The ids of rows that are judged otherwise than expected, with the verdict."""
    with ThreadPoolExecutor(2) as threads:
        verdicts = list(threads.map(judge, rows))
    assert not any(verdict.failed for verdict in verdicts)
    return {
        row["id"]: verdict.correct
        for row, verdict in zip(rows, verdicts, strict=True)
        if verdict.correct != row["expected"]
    }


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in (VECTORS / name).read_text().splitlines()]


@pytest.mark.slow
@needs_vectors
def test_98_percent_of_the_math_verify_vectors_agree_and_the_others_are_listed() -> None:
    rows = read("math_verify.jsonl")
    others = disagreements(
        rows, lambda row: verify(row["prediction"], row["gold"], extraction="any", timeout_s=30)
    )
    portable = {row["id"] for row in rows if row["portable"]}
    assert len(portable) == 262
    assert len(others.keys() & portable) <= 5
    assert others.keys() <= LISTED.keys()
    assert {name for name, accepted in others.items() if accepted} <= {
        name for name, entry in LISTED.items() if entry["kind"] == "false accept"
    }


@needs_vectors
def test_all_recorded_responses_to_gsm8k_are_judged_as_recorded() -> None:
    rows = read("gsm8k_model_outputs.jsonl")
    assert len(rows) == 300
    assert disagreements(rows, lambda row: verify(row["prediction"], row["gold"])) == {}
    assert (
        disagreements(rows, lambda row: verify(row["prediction"], row["gold"], extraction="any"))
        == {}
    )
    assert (
        disagreements(
            rows,
            lambda row: verify(
                row["prediction"].rpartition("A:")[2], row["gold"], extraction="none"
            ),
        )
        == {}
    )


def test_every_listed_disagreement_has_a_reason() -> None:
    assert {entry["kind"] for entry in LISTED.values()} <= {
        "false accept",
        "false reject",
        "not portable",
    }
    assert all(len(entry["reason"]) > 10 for entry in LISTED.values())


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "data" / "math500").is_dir(),
    reason="shared/data/math500 beside the checkout is absent",
)
def test_gold_answers_of_math500_equal_only_themselves_in_every_form() -> None:
    golds = [
        json.loads(line)["answer"]
        for line in (SHARED / "data" / "math500" / "data.jsonl").read_text().splitlines()
    ]
    for form in (r"Thus \boxed{%s}.", "**Answer:** $%s$", r"Answer: \(%s\)."):
        assert [gold for gold in golds if not verify(form.replace("%s", gold), gold).correct] == []
    digits = "0123456789"
    changed = [
        ("".join(digits[(int(each) + 1) % 10] if each in digits else each for each in gold), gold)
        for gold in golds[::4]
    ]
    changed = [(answer, gold) for answer, gold in changed if answer != gold]
    with ThreadPoolExecutor(2) as threads:
        accepted = list(
            threads.map(
                lambda pair: verify(rf"\boxed{{{pair[0]}}}", pair[1], timeout_s=30).correct, changed
            )
        )
    assert [pair for pair, correct in zip(changed, accepted, strict=True) if correct] == []
