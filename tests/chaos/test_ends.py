"""Runs that can't go on: they end soon, say why, and leave no process behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from run_ends import LONG, check_end, end_after
from run_support import TINY, check_checkpoint, command, running

from dapo_async.runtime.signals import SAME_S

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_second_sigint_ends_at_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    # A learner that hangs: the orderly end would wait deadlines.work_s for its checkpoint.
    with running(tmp_path / "run", *TINY, *LONG) as live:
        live.wait_for(r"^step +5/")
        os.kill(live.pid("learner"), signal.SIGSTOP)
        os.kill(live.driver, signal.SIGINT)
        live.wait_for("^SIGINT: the run ends with a checkpoint")
        while not (live.root / "summary.json").exists():  # it comes right after the line
            time.sleep(0.02)
        assert json.loads((live.root / "summary.json").read_text())["reason"] == "SIGINT received"
        time.sleep(2 * SAME_S)
        os.kill(live.driver, signal.SIGINT)
        run = live.finish(timeout_s=5.0)
        live.seconds_until_nothing_is_left(timeout_s=30.0)
    assert run.exit_code == 130, run.output
    assert "Traceback" not in run.output, run.output
    assert run.summary["status"] == "interrupted"
    assert (
        run.summary["reason"]
        == "SIGINT received while the run was ending: the steps after its newest checkpoint "
        "are lost"
    )
    check_checkpoint(run.checkpoint)


def test_nothing_outlives_a_killed_driver_by_30_seconds(tmp_path: Path) -> None:
    with running(tmp_path / "run", *TINY, *LONG) as live:
        live.wait_for(r"^step +2/")
        assert len(live.processes()) > 5
        os.kill(live.driver, signal.SIGKILL)
        lasted_s = live.seconds_until_nothing_is_left(timeout_s=30.0)
    print(f"everything was gone {lasted_s:.1f} s after the driver")


def test_hanging_worker_is_named_by_the_passed_deadline(tmp_path: Path) -> None:
    # Staleness 0 and few slots: after a step the learner can only wait for the worker.
    slow = (
        "replay.max_staleness=0",
        "replay.groups_per_step=16",
        "rollout.num_slots=8",
        "deadlines.work_s=5",
    )
    soon = "from dapo_async import config; config.STOP_S = 5.0"
    with running(tmp_path / "run", *TINY, *LONG, *slow, before=soon) as live:
        live.wait_for(r"^step +3/")
        on_request = command("dump", str(live.root))
        run = end_after(live, lambda: os.kill(live.pid("rollout-0"), signal.SIGSTOP), within_s=30.0)
    check_end(run, exit_code=1, status="failed")
    reason = run.summary["reason"]
    assert reason.startswith("take waited 5 s: take at version "), reason
    assert "of 8 groups finished" in reason, reason  # a minibatch
    assert "rollout-0" in reason, reason
    assert on_request.returncode == 0, on_request
    first, at_end = sorted((run.root / "dumps").iterdir())
    assert str(first) in on_request.stdout
    for name in ("driver", "replay", "learner", "rollout-0"):
        assert f"=== {name}\npid " in first.read_text(), f"{name} did not answer"
    assert at_end.read_text().startswith("why: take waited 5 s")
    assert "=== rollout-0\nno answer: the driver waited 3 s" in at_end.read_text()
    assert run.summary["groups"]["in_flight"] == 0, (
        "the other actors' last counts were lost with the worker's"
    )
    caught = run.summary["caught"]
    # The row of a step that was cut in its midst waits for the worker, too.
    caught.pop("the last rows of metrics", None)
    caught.pop("the picture", None)  # on a busy machine, with 5 s
    assert caught == {"TimeoutError": 1, "the last reports": 1}
