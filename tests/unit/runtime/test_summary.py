"""`summary.json` has every fixed point, whatever the run came to."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.evaluate import Evaluation
from dapo_async.runtime.resume import START
from dapo_async.runtime.services import Measured
from dapo_async.runtime.status import RunOutcome, Status
from dapo_async.runtime.step_metrics import Totals
from dapo_async.runtime.summary import RunProgress, summarise_run
from dapo_async.tracking.run_dir import RunDir


def summary_of(record: RunProgress, measured: Measured, root: Path) -> dict[str, object]:
    summary = summarise_run(
        record,
        measured,
        config=knobs.load(QUICKSTART),
        run_dir=RunDir(root),
        incarnation="first",
        resume=START,
        wall_s=2.0,
        mlflow_run_id=None,
        caught=Counter(display=1),
        bottleneck="the learner limits the speed",
        split=None,
    )
    json.dumps(summary)
    return summary


def test_a_run_that_never_started_has_zeros_and_its_reason(tmp_path: Path) -> None:
    record = RunProgress(RunOutcome(Status.FAILED, "Ray did not start", 1))
    summary = summary_of(record, Measured(), tmp_path)
    assert (summary["status"], summary["reason"]) == ("failed", "Ray did not start")
    assert (summary["steps"], summary["weight_versions"], summary["train_s"]) == (0, 0, 0.0)
    assert summary["initial_accuracy"] is summary["best_checkpoint"] is None
    assert summary["idle"] == {"rollout": 0.0, "learner": 0.0}
    assert summary["caught"] == {"display": 1}
    groups = summary["groups"]
    assert isinstance(groups, dict)
    assert {"admitted", "trained", "evicted", "failed", "skipped", "unused"} <= groups.keys()


def test_counts_evaluations_and_caught_errors_are_put_together(tmp_path: Path) -> None:
    evaluation = Evaluation(
        num_prompts=4,
        num_correct=3.0,
        num_response_tokens=20,
        num_truncated=0,
        weight_versions=frozenset({2}),
    )
    record = RunProgress(evaluations={"final": evaluation}, caught=Counter(display=1, end=1))
    measured = Measured(
        totals=Totals(steps=2, tokens=40.0, staleness_sum=30.0, staleness_tokens=20.0),
        counts={"admitted": 5, "trained": 3, "rejected.all_wrong": 2},
    )
    summary = summary_of(record, measured, tmp_path)
    assert (summary["final_accuracy"], summary["final_response_tokens"]) == (0.75, 5.0)
    assert summary["staleness"] == {"mean": 1.5, "max": 0}
    assert summary["groups"] == {"admitted": 5, "trained": 3, "rejected": {"all_wrong": 2}}
    assert summary["caught"] == {"display": 2, "end": 1}
    assert summary["bottleneck"] == "the learner limits the speed"
