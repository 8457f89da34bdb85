"""Several learner ranks in a real run: they train, keep the laws, and are named when they die."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rank_layouts import RANKS
from run_support import (
    TINY,
    Finished,
    check_conservation,
    check_time_law,
    command,
    finished,
    rows_of,
)

from dapo_async import config as knobs
from dapo_async.learner.rerun import rerun

REL = 1e-3  # over the run's six steps, in float32


def check_same_as_one_rank(run: Finished, *, rel: float) -> None:
    """Token-mean exactness on a run's own batches: one rank alone computes the same loss and
    gradient norm as the ranks did, step by step."""
    rows = {row["step"]: row for row in run.metrics}
    for compared in rerun(knobs.load(run.root / "config.yaml"), run.root / "recorded", rows=rows):
        for name in ("loss", "grad_norm"):
            was, alone = rows[compared.step][name], compared.values[name]
            assert was == pytest.approx(alone, rel=rel, abs=rel), (
                f"{name} of step {compared.step}: {was} on several ranks, {alone} on one"
            )


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    mesh = ("learner.data_parallel=2", "learner.tensor_parallel=2")
    return finished(
        tmp_path_factory.mktemp("ranks") / "run",
        *TINY,
        *RANKS,
        *mesh,
        "learner.num_minibatches=2",
        "train.record=true",
        "learner.profile=true",
    )


@pytest.mark.ray
def test_two_by_two_ranks_train_the_quickstart_and_say_once_what_they_did(
    two_by_two: Finished,
) -> None:
    run = two_by_two
    assert run.exit_code == 0, run.output
    for rank in range(4):
        assert f"learner-{rank} " in run.output
    check_conservation(run.summary["groups"])
    assert run.summary["groups"]["trained"] == 6 * 4
    assert run.summary["handshake"]["passed"] >= 6  # each publish had all shards, whole
    for row in run.metrics:
        assert (row["groups"], row["rollouts"], row["skipped"], row["non_finite"]) == (4, 32, 0, 0)
        assert row["tokens"] == row["response_tokens"] * 32
        assert row["grad_norm"] > 0
    rows = rows_of(run.trace)
    assert {f"learner-{rank}" for rank in range(4)} <= rows.keys()
    check_time_law(rows)


@pytest.mark.ray
def test_profile_of_each_rank_has_its_steps_three_to_five(two_by_two: Finished) -> None:
    folder = two_by_two.root / "profile"
    assert {path.name for path in folder.iterdir()} == {
        f"learner-{rank}_step_{step:06d}_update_{update}.json.gz"
        for rank in range(4)
        for step in (3, 4, 5)
        for update in range(2)
    }
    with gzip.open(folder / "learner-3_step_000004_update_1.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"proximal pass", "minibatch", "aten::mm", "optimizer"} <= names


@pytest.mark.ray
def test_two_by_two_ranks_have_the_losses_and_gradient_norms_of_one(two_by_two: Finished) -> None:
    check_same_as_one_rank(two_by_two, rel=REL)
    said = command("rerun", str(two_by_two.root))
    assert (said.returncode, "all 6 steps are equal, to 0.05 of each number" in said.stdout) == (
        0,
        True,
    ), said.stdout + said.stderr


@pytest.mark.ray
def test_comparison_with_one_rank_notices_a_batch_that_was_not_the_runs(
    two_by_two: Finished, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(two_by_two.root, tmp_path / "run"))
    shutil.copyfile(
        root / "recorded" / "step_000001.safetensors", root / "recorded" / "step_000000.safetensors"
    )
    with pytest.raises(AssertionError, match=r"of step 0: .* on several ranks, .* on one"):
        check_same_as_one_rank(replace(two_by_two, root=root), rel=REL)
