"""Rollout workers join and leave a running run: `dapo-async scale`, and nodes that come and go."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from run_support import (
    TINY,
    Live,
    check_checkpoint,
    check_conservation,
    check_token_flow,
    command,
    read_rows,
    running,
)

from dapo_async import config as knobs
from dapo_async.replay.group_io import read_groups

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
LONG = ("train.num_steps=5000", "train.checkpoint_every_steps=5")


def steps_on(live: Live, count: int) -> None:
    """Waits for so many further steps."""
    before = [int(step) for step in re.findall(r"^step +(\d+)/", live.output, re.MULTILINE)]
    live.wait_for(rf"^step +{(before or [0])[-1] + count}/")


def scaled(live: Live, count: int) -> str:
    ended = command("scale", str(live.root), f"rollout={count}")
    assert ended.returncode == 0, (ended, live.output)
    return ended.stdout.strip()


def test_workers_join_and_leave_while_the_run_trains(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with running(root, *TINY, *LONG, "rollout.num_workers=2", "train.record=true") as live:
        live.wait_for(r"^step +3/")
        refused = command("scale", str(root), "rollout=0")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused
        assert "rollout.num_workers (0) must be at least 1" in refused.stderr
        assert scaled(live, 3) == "rollout.num_workers 2 -> 3: rollout-2 starts"
        live.wait_for("^rollout-2 joins the run")
        steps_on(live, 3)
        assert scaled(live, 1) == "rollout.num_workers 3 -> 1: rollout-1 leaves, rollout-2 leaves"
        for name in ("rollout-1", "rollout-2"):
            live.wait_for(f"^{name} has left the run")
        steps_on(live, 3)
        assert scaled(live, 2) == "rollout.num_workers 1 -> 2: rollout-1 starts"
        live.wait_for("^rollout-1 joins the run")
        steps_on(live, 3)
        status = json.loads(command("status", str(root), "--json").stdout)
        assert status["engines"].keys() == {"rollout-0", "rollout-1"}
        assert (status["workers"]["wanted"], status["workers"]["here"]) == (2, 2)
        os.kill(live.driver, signal.SIGINT)
        run = live.finish(timeout_s=30.0)
        live.seconds_until_nothing_is_left(timeout_s=30.0)
    assert run.exit_code == 130, run.output
    assert "Traceback" not in run.output, run.output
    summary = run.summary
    check_conservation(summary["groups"])
    check_token_flow(summary["token_flow"])
    assert (summary["groups"]["failed"], summary["groups"]["evicted"]) == (0, 0)
    assert summary["handshake"].get("mismatch", 0) == 0
    assert summary["token_flow"]["repeated"] == 0, "a worker that leaves loses no token"
    assert summary["rollout_workers"] == {"asked_for": 2, "here": 2, "joined": 2, "left": 2}
    assert summary["staleness"]["max"] <= knobs.load(root / "config.yaml").replay.max_staleness
    assert "was not drained" not in run.output
    assert {row["rollout_workers"] for row in run.metrics} == {1, 2, 3}
    check_checkpoint(run.checkpoint)
    trained = [
        group.group_id
        for path in (root / "recorded").glob("step_*.safetensors")
        for group in read_groups(path)
    ]
    assert len(set(trained)) == len(trained) == summary["groups"]["trained"]
    told = [(row["event"], row["actor"]) for row in read_rows(root / "events.jsonl")]
    assert ("worker_joined", "rollout-2") in told
    assert ("worker_left", "rollout-1") in told
    ended = command("scale", str(root), "rollout=3")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended
    assert f"train --resume {root} rollout.num_workers=3" in ended.stderr
    assert knobs.load(root / "config.yaml").rollout.num_workers == 2, "a resume keeps the number"
