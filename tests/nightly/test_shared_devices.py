"""Whole runs in which learner and engines take turns: the guarantees, deaths in any turn, resume.

`.ci/full` runs them.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from rank_layouts import RANKS
from run_support import (
    TINY,
    Finished,
    check_conservation,
    check_time_law,
    check_token_flow,
    finished,
    overlap_share,
    rows_of,
    running,
)
from sglang_run_support import CONFIG, SERVERS, kill, replaced

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
SHARED = ("model.placement=shared", "replay.max_staleness=1")
SHORT = ("rollout.max_response_tokens=24",)  # many steps


def check_turns(run: Finished) -> None:
    """The guarantees of every run, and: nothing is trained while an engine generates."""
    summary = run.summary
    check_conservation(summary["groups"])
    check_token_flow(summary["token_flow"])
    assert summary["groups"]["evicted"] == 0
    assert summary["staleness"]["max"] <= 1
    assert [row["step"] for row in run.metrics] == [*range(len(run.metrics))]
    assert all(row["switch_s"] > 0 for row in run.metrics)
    rows = rows_of(run.trace)
    check_time_law(rows)
    learner = "learner" if "learner" in rows else "learner-0"
    assert overlap_share({**rows, "learner": rows[learner]}) == 0.0
    assert sum(state == "asleep" for state, *_ in rows["rollout-0"]) >= len(run.metrics)


@pytest.mark.parametrize("staleness", [0, 1])
def test_two_ranks_and_two_engines_take_turns(tmp_path: Path, staleness: int) -> None:
    two = ("learner.data_parallel=2", "rollout.num_workers=2", *RANKS)
    bound = f"replay.max_staleness={staleness}"
    run = finished(tmp_path / "run", *TINY, *SHARED, bound, *two)
    assert run.exit_code == 0, run.output
    assert (run.summary["status"], run.summary["steps"]) == ("done", 6)
    assert run.summary["staleness"]["max"] <= staleness
    check_turns(run)


def test_deaths_in_any_turn_are_survived_and_the_run_resumes(tmp_path: Path) -> None:
    often = ("train.num_steps=5000", "train.checkpoint_every_steps=3")
    with running(tmp_path / "run", *TINY, *SHARED, *SHORT, *often) as live:
        live.wait_for(r"^step +3/")
        for number, victim in enumerate(("rollout-0", "learner", "learner", "rollout-0")):
            back = {
                "rollout-0": "rollout-0 generates again",
                "learner": "the learner trains again",
            }[victim]
            before = live.output.count(back)
            os.kill(live.pid(victim), signal.SIGKILL)
            live.wait_for(f"(?s:{'.*'.join([back] * (before + 1))})", timeout_s=120.0)
            steps = [int(step) for step in re.findall(r"^step +(\d+)/", live.output, re.M)]
            live.wait_for(rf"^step +{steps[-1] + 3 + number}/", timeout_s=120.0)
        os.kill(live.driver, signal.SIGINT)
        run = live.finish(timeout_s=60.0)
        live.seconds_until_nothing_is_left(timeout_s=30.0)
    assert run.exit_code == 130, run.output
    assert "Traceback" not in run.output
    check_conservation(run.summary["groups"])
    assert (run.summary["groups"]["evicted"], run.summary["groups"]["failed"]) == (0, 0)
    assert run.summary["staleness"]["max"] <= 1
    num_steps = len(run.metrics) + 4
    with running(run.root, f"train.num_steps={num_steps}", config=None) as live:
        resumed = live.finish(timeout_s=240.0)
    assert resumed.exit_code == 0, resumed.output
    check_conservation(resumed.summary["groups"])
    assert resumed.summary["steps"] == num_steps


@pytest.mark.sglang
def test_a_server_takes_turns_with_the_learner_and_one_that_dies_is_replaced(
    tmp_path: Path,
) -> None:
    """The server keeps its memory: its memory saver needs CUDA. Its calls are those on a GPU."""
    often = ("train.num_steps=5000", "deadlines.start_s=300")
    with running(tmp_path / "run", *TINY, *SERVERS, *SHARED, *often, config=CONFIG) as live:
        live.wait_for(r"^step +3/", timeout_s=300.0)
        replaced(live, "rollout-0", kill)
        os.kill(live.driver, signal.SIGINT)
        run = live.finish(timeout_s=60.0)
        live.seconds_until_nothing_is_left(timeout_s=30.0)
    assert run.exit_code == 130, run.output
    check_turns(run)
    assert run.summary["engine_restarts"] == 1
