"""The quickstart as it is learns that thinking longer pays, in its time; its controls do not."""

from __future__ import annotations

import pytest
from learning_checks import check_learning
from run_support import Finished, check_conservation, finished

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="session")
def without_learning_rate(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(
        tmp_path_factory.mktemp("still") / "run",
        "seed=0",
        "learner.lr=0",
        "learner.weight_decay=0",
        "train.num_steps=8",
    )


def test_quickstart_learns(quickstart: Finished) -> None:
    assert quickstart.exit_code == 0, quickstart.output
    check_learning(quickstart.summary)


def test_quickstart_keeps_the_laws_from_start_to_end(quickstart: Finished) -> None:
    summary = quickstart.summary
    check_conservation(summary["groups"])
    assert (
        summary["groups"]["evicted"]
        == summary["groups"]["failed"]
        == summary["groups"]["skipped"]
        == 0
    )
    assert 0 < summary["staleness"]["max"] <= 2
    assert "mismatch" not in summary["handshake"]
    assert summary["weight_versions"] == summary["steps"] + 1


def test_quickstart_shows_a_curve_and_solved_problems(quickstart: Finished) -> None:
    summary, rows = quickstart.summary, quickstart.metrics
    assert summary["steps"] >= 30
    assert summary["groups"]["rejected"]["all_correct"] > 0
    third = len(rows) // 3
    first, last = ([row["accuracy"] for row in part] for part in (rows[:third], rows[-third:]))
    assert sum(last) / third > sum(first) / third + 0.3


def test_quickstart_trains_within_its_time(quickstart: Finished) -> None:
    assert quickstart.summary["train_s"] <= 90.0


def test_nothing_changes_without_a_learning_rate(without_learning_rate: Finished) -> None:
    summary = without_learning_rate.summary
    assert without_learning_rate.exit_code == 0, without_learning_rate.output
    assert summary["final_accuracy"] == summary["initial_accuracy"] < 0.4
    assert summary["final_response_tokens"] == summary["initial_response_tokens"]
    with pytest.raises(AssertionError):
        check_learning(summary)
