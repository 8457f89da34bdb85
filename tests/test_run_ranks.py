"""Several learner ranks in a real run: they train, keep the laws, and are named when they die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from run_support import TINY, check_conservation, check_time_law, finished, rows_of, running

RANKS = ("learner.num_cpus=0.5", "train.checkpoint_every_steps=2")


@pytest.mark.ray
def test_two_by_two_ranks_train_the_quickstart_and_say_once_what_they_did(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", *TINY, *RANKS, "learner.data_parallel=2", "learner.tensor_parallel=2", "learner.num_minibatches=2")
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
    check_time_law(rows, end_s=max(row[-1][2] for row in rows.values()))


@pytest.mark.ray
def test_death_of_one_rank_ends_the_run_in_its_name_and_one_rank_goes_on_from_the_checkpoint_of_two(tmp_path: Path) -> None:
    with running(tmp_path / "run", *TINY, *RANKS, "learner.tensor_parallel=2", "train.num_steps=5000") as live:
        live.wait_for(r"^step +5/")
        os.kill(live.pid("learner-1"), signal.SIGKILL)
        run = live.finish(timeout_s=20.0)
        live.seconds_until_nothing_is_left(timeout_s=10.0)
    assert run.exit_code == 1
    assert run.summary["reason"].startswith("learner-1 died"), run.summary["reason"]
    checkpoint = Path(run.summary["checkpoint"])
    version = int(checkpoint.name.removeprefix("step_"))
    assert version >= 2
    alone = finished(tmp_path / "run", "learner.tensor_parallel=1", f"train.num_steps={version + 2}", config=None)
    assert alone.exit_code == 0, alone.output
    assert [row["step"] for row in alone.metrics] == list(range(version + 2))
