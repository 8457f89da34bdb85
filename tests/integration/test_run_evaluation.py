"""Evaluations beside training on real processes: each check has a broken twin that fails it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from run_support import (
    Finished,
    Row,
    check_conservation,
    check_staleness,
    check_time_law,
    finished,
    rows_of,
)

pytestmark = pytest.mark.ray
NUM_STEPS, EVERY = 12, 3
# Groups large enough for steps that last longer than an evaluation takes to begin.
SMALL = (
    "replay.groups_per_step=16",
    "replay.group_size=8",
    "replay.dynamic_sampling=false",
    "train.record=true",
    f"train.num_steps={NUM_STEPS}",
    f"train.checkpoint_every_steps={EVERY}",
    f"evaluation.every_steps={EVERY}",
    "evaluation.num_prompts=512",
)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(tmp_path_factory.mktemp("snapshot") / "run", *SMALL)


@pytest.fixture(scope="module")
def dedicated(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(
        tmp_path_factory.mktemp("dedicated") / "run",
        *SMALL,
        "evaluation.engine=dedicated",
        "evaluation.k=2",
        "evaluation.temperature=1",
        "evaluation.top_p=0.7",
        "rollout.num_workers=2",
    )


@pytest.fixture(params=["snapshot", "dedicated"])
def run(request: pytest.FixtureRequest) -> Finished:
    value: Finished = request.getfixturevalue(request.param)
    assert value.exit_code == 0, value.output
    return value


def check_evaluations(rows: Sequence[Mapping[str, Any]], *, engine: str, skipped: int) -> None:
    """Each row has one version; each due version has a row or was skipped; the first and the last
    row are of all engines."""
    for row in rows:
        assert row["weight_versions"] == [row["version"]], (
            f"an evaluation of version {row['version']} is of {row['weight_versions']}"
        )
        assert row["step"] == row["version"]
        assert 0.0 <= row["waited_s"] <= row["wall_s"]
        assert 0.0 <= row["accuracy"] <= 1.0
        assert row["num_prompts"] == 512
    during = [row["version"] for row in rows if row["engine"] == engine]
    due = list(range(EVERY, NUM_STEPS, EVERY))
    assert [(row["version"], row["engine"]) for row in (rows[0], rows[-1])] == [
        (0, "all"),
        (NUM_STEPS, "all"),
    ]
    assert len(rows) == len(during) + 2
    assert len(during) + skipped == len(due)
    assert set(during) <= set(due), f"versions {during} were evaluated, {due} were due"


def overlap_s(row: Row, state: str, windows: Sequence[tuple[float, float]]) -> float:
    """Seconds that an actor spent in `state` within the windows."""
    return sum(
        max(0.0, min(end, until) - max(start, since))
        for name, start, end in row
        if name == state
        for since, until in windows
    )


def check_nobody_waits(rows: Mapping[str, Row]) -> None:
    """While something is evaluated the learner trains and rollout-0 generates."""
    windows = [
        (start, end) for state, start, end in rows["evaluator"] if state in ("load", "evaluate")
    ]
    assert windows, "nothing was evaluated"
    for actor, state in (("learner", "train"), ("rollout-0", "generate")):
        assert overlap_s(rows[actor], state, windows) > 0.0, (
            f"{actor} was never in {state} during {len(windows)} spans of evaluation"
        )


def test_each_evaluation_is_of_one_version_and_none_is_missing(
    run: Finished, request: pytest.FixtureRequest
) -> None:
    check_evaluations(
        run.evaluations,
        engine=request.node.callspec.params["run"],
        skipped=run.summary["evaluations_skipped"],
    )
    files = {path.name for path in run.root.iterdir()}
    assert "evaluated" not in files
    assert run.summary["best_checkpoint"] is not None


def test_evaluation_check_notices_a_mixture_of_versions_and_a_missing_one(
    snapshot: Finished,
) -> None:
    first, second, *rest = snapshot.evaluations
    skipped = snapshot.summary["evaluations_skipped"]
    with pytest.raises(AssertionError, match="an evaluation of version 3 is of"):
        check_evaluations(
            [first, {**second, "weight_versions": [2, 3]}, *rest],
            engine="snapshot",
            skipped=skipped,
        )
    with pytest.raises(AssertionError):
        check_evaluations([first, *rest], engine="snapshot", skipped=skipped)


def test_training_and_generation_go_on_during_evaluations(run: Finished) -> None:
    rows = rows_of(run.trace)
    check_nobody_waits(rows)
    check_time_law(rows)
    assert {"wait", "evaluate"} <= {state for state, _, _ in rows["evaluator"]}


def test_check_notices_a_learner_that_waits_for_the_evaluation(snapshot: Finished) -> None:
    rows = rows_of(snapshot.trace)
    windows = [(start, end) for state, start, end in rows["evaluator"] if state != "wait"]
    waits = [span for span in rows["learner"] if not overlap_s([span], span[0], windows)]
    with pytest.raises(AssertionError, match="learner was never in train"):
        check_nobody_waits({**rows, "learner": waits})


def test_evaluations_lose_no_credit_and_keep_the_staleness_bound(run: Finished) -> None:
    groups = run.summary["groups"]
    check_conservation(groups)
    assert groups["trained"] == NUM_STEPS * 16
    assert groups["evicted"] == groups["failed"] == groups["in_flight"] == 0
    rollouts = [rollout for step in range(NUM_STEPS) for rollout in run.rollouts(step)]
    assert len(rollouts) == NUM_STEPS * 16 * 8
    check_staleness(rollouts, max_staleness=2)
    assert run.metrics[-1]["credits_held"] <= 3 * 16


def test_every_engine_proves_every_version_beside_sampled_evaluations(dedicated: Finished) -> None:
    assert {(row["k"], row["top_p"]) for row in dedicated.evaluations} == {(2, 0.7)}
    assert "mismatch" not in dedicated.summary["handshake"]
    assert sum(dedicated.summary["handshake"].values()) == 2 * (NUM_STEPS + 1)
    assert dedicated.summary["weight_versions"] == NUM_STEPS + 1
