"""Resume, on real processes: a killed run continues from its newest checkpoint.

In lockstep it equals a run that never stopped, bit for bit.
"""

from __future__ import annotations

import math
import os
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from paths import QUICKSTART
from run_support import (
    TINY,
    Finished,
    check_checkpoint,
    check_conservation,
    check_token_flow,
    command,
    finished,
    read_rows,
    running,
    write_rows,
)
from tracking_world import check_history

from dapo_async import config as knobs
from dapo_async.learner import read_whole_state
from dapo_async.replay.group_io import read_groups

LOCKSTEP = (
    *TINY,
    "replay.dynamic_sampling=true",
    "replay.admission=lockstep",
    "replay.max_staleness=0",
    "rollout.num_slots=32",
    "train.num_steps=28",
    "train.checkpoint_every_steps=3",
    "train.record=true",
    "learner.num_minibatches=2",
)
MORE = 8  # steps of the second life
# What depends on the clock, or on the moment at which an actor was asked for its counts.
BY_THE_CLOCK = (
    "time_s",
    "step_s",
    "tokens_per_s",
    "groups_per_s",
    "token_flow.",
    "idle.",
    "engine_time.",
    "slots.",
    "slots_per_engine",
    "kv.",
    "prefix.",
    "decode.",
    "efficiency.",
    "mfu.",
    "mbu.",
    "publish_s",
    "publish_pause_s",
    "checkpoint_pause_s",
    "handshake.",
    "probe_gap",
    "groups.",
    "buffered",
    "credits",
)


def same_steps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith(BY_THE_CLOCK)}
        for row in rows
    ]


def assert_same_course(run: Finished, other: Finished, *, num_steps: int) -> None:
    """Weights, optimizer, replay state, metrics and every token, bit for bit."""
    ours, theirs = (
        each.root / "checkpoints" / f"step_{num_steps:06d}" / "state" for each in (run, other)
    )
    first, second = read_whole_state(ours / "learner"), read_whole_state(theirs / "learner")
    assert (ours / "learner" / "learner.json").read_text() == (
        theirs / "learner" / "learner.json"
    ).read_text()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert (ours / "replay.json").read_text() == (theirs / "replay.json").read_text()
    assert same_steps(run.metrics) == same_steps(other.metrics)
    for step in range(num_steps):
        assert run.rollouts(step) == other.rollouts(step)
        for group, twin in zip(
            *(
                read_groups(each.root / "recorded" / f"step_{step:06d}.safetensors")
                for each in (run, other)
            ),
            strict=True,
        ):
            for rollout, copy in zip(group.rollouts, twin.rollouts, strict=True):
                assert (
                    rollout.completion.behaviour_logprobs == copy.completion.behaviour_logprobs
                ).all()


@pytest.mark.ray
@pytest.mark.slow
def test_run_in_lockstep_that_was_killed_equals_the_one_that_was_not(
    tmp_path: Path,
) -> None:
    whole = finished(tmp_path / "whole", *LOCKSTEP)
    assert whole.exit_code == 0, whole.output
    assert sum(row.get("refill_waves", 0) for row in whole.metrics) > 0, (
        "no group was rejected: the waves were not put to the test"
    )
    rng = random.Random(time.time_ns())
    # The kill may come before the first checkpoint.
    with running(tmp_path / "killed", *LOCKSTEP) as live:
        live.wait_for(rf"^step +{rng.randint(1, 19)}/")
        time.sleep(rng.random() * 0.2)
        os.kill(live.driver, signal.SIGKILL)
        live.seconds_until_nothing_is_left(timeout_s=30.0)
    killed_at = len(read_rows(tmp_path / "killed" / "metrics.jsonl"))
    # As `train --resume RUN | true`: a closed output changes nothing.
    resumed = finished(tmp_path / "killed", config=None, reader=False)
    print(f"killed after {killed_at} steps")
    assert resumed.exit_code == 0, resumed.output
    assert resumed.summary["groups"] == whole.summary["groups"]
    check_conservation(resumed.summary["groups"])
    assert resumed.summary["status"] == "done"
    assert_same_course(resumed, whole, num_steps=28)
    check_whole(resumed)
    # The learner alone repeats every number of the resumed run; one changed digit is noticed.
    again = command("rerun", str(resumed.root))
    assert (again.returncode, again.stdout.splitlines()[-1]) == (
        0,
        "all 28 steps are equal, bit for bit",
    ), again.stdout + again.stderr
    rows = resumed.metrics
    rows[7]["loss"] = math.nextafter(rows[7]["loss"], 1.0)
    write_rows(resumed.root / "metrics.jsonl", rows)
    changed = command("rerun", str(resumed.root))
    assert (changed.returncode, changed.stdout.splitlines()[-1]) == (1, "1 of 28 steps differ")
    assert [line[:9] for line in changed.stdout.splitlines() if "DIFFERS" in line] == ["step    8"]


def check_whole(run: Finished) -> None:
    """Every file has its checksum, and every admission ended once."""
    verified = command("verify", str(run.root))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert verified.stdout.splitlines()[-1] == "everything is whole"


@dataclass(frozen=True)
class Lives:
    """A run that was interrupted, and what it came to after it was resumed for `MORE` steps."""

    interrupted: Finished
    summary: dict[str, Any]  # of the interrupted one: the resumed one writes its own
    trained: int
    resumed: Finished


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    root = tmp_path_factory.mktemp("lives") / "run"
    often = ("train.checkpoint_every_steps=5", "evaluation.every_steps=5", "tracking.sinks=mlflow")
    with running(root, *TINY, "train.num_steps=200", *often) as live:
        live.wait_for(r"^step +9/")
        began_s = time.monotonic()
        os.kill(live.driver, signal.SIGINT)
        interrupted = live.finish(timeout_s=30.0)
        print(f"the process ended {time.monotonic() - began_s:.2f} s after SIGINT")
        live.seconds_until_nothing_is_left(timeout_s=20.0)
    summary, trained = interrupted.summary, len(interrupted.metrics)
    assert (root / "dynamics.png").exists()
    # Here, for the second life deletes it when it has newer ones.
    check_checkpoint(interrupted.checkpoint)
    return Lives(
        interrupted,
        summary,
        trained,
        finished(root, f"train.num_steps={trained + MORE}", config=None),
    )


@pytest.mark.ray
def test_sigint_ends_with_130_and_a_checkpoint(lives: Lives) -> None:
    run, summary = lives.interrupted, lives.summary
    assert run.exit_code == 130, run.output
    assert "Traceback" not in run.output, run.output
    assert (summary["status"], summary["reason"]) == ("interrupted", "SIGINT received")
    assert summary["steps"] == lives.trained >= 9
    assert summary["checkpoint"] == f"checkpoints/step_{lives.trained:06d}"
    check_conservation(summary["groups"])
    check_token_flow(summary["token_flow"])
    assert summary["groups"]["in_flight"] == 0
    assert f"train --resume {run.root}" in run.output


@pytest.mark.ray
def test_asynchronous_run_goes_on_without_a_burst_and_without_losing_a_group(lives: Lives) -> None:
    # Groups in flight at the end are part of the checkpoint: only that summary counts them unused.
    run, summary, steps = lives.resumed, lives.summary, lives.trained + MORE
    assert run.exit_code == 0, run.output
    assert f"resuming at step {lives.trained} from {run.root / summary['checkpoint']}" in run.output
    assert [row["step"] for row in run.metrics] == list(range(steps))
    assert max(row["group_staleness_max"] for row in run.metrics) <= 2
    assert re.search(rf"step_{lives.trained:06d} is whole: \d+ files, .* checked in ", run.output)
    check_whole(run)
    groups = run.summary["groups"]
    check_conservation(groups)
    check_token_flow(run.summary["token_flow"])
    assert groups["trained"] == sum(row["groups"] for row in run.metrics)
    missing = 4 * steps - groups["trained"]  # the signal may have cut a step in its midst
    assert missing in (0, 2)
    assert groups["failed"] == 0
    assert groups["evicted"] <= missing
    assert groups["admitted"] <= summary["groups"]["admitted"] + 4 * MORE + groups["evicted"]
    assert run.summary["initial_accuracy"] == summary["initial_accuracy"]
    assert run.summary["tokens"] == sum(row["tokens"] for row in run.metrics)
    assert run.summary["train_s"] > summary["train_s"]
    assert run.summary["resumed_from"] == summary["checkpoint"]
    shown = command("status", str(run.root))
    assert (shown.returncode, "all steps trained" in shown.stdout) == (0, True), shown.stdout
    ended = command("train", "--resume", str(run.root))
    assert ended.returncode == 2
    assert f"all {steps} steps (train.num_steps) are trained" in ended.stderr


@pytest.mark.ray
def test_a_resumed_run_goes_on_evaluating_and_tells_nothing_twice(lives: Lives) -> None:
    steps, versions = lives.trained + MORE, [row["version"] for row in lives.resumed.evaluations]
    assert versions == sorted(set(versions))
    assert {0, steps} <= set(versions) <= {*range(0, steps, 5), steps}


@pytest.mark.ray
def test_resumed_run_goes_on_in_its_mlflow_run(lives: Lives) -> None:
    run, steps = lives.resumed, lives.trained + MORE
    assert run.summary["mlflow_run_id"] == lives.summary["mlflow_run_id"]
    client = MlflowClient(f"sqlite:///{run.root.parent}/mlflow.db")
    check_history(client, run.summary["mlflow_run_id"], run.metrics)
    assert client.get_run(run.summary["mlflow_run_id"]).data.tags["resumed.train.num_steps"] == str(
        steps
    )
    assert f"mlflow ui --backend-store-uri sqlite:///{run.root.parent}/mlflow.db" in run.output


@pytest.mark.ray
def test_run_ends_in_time_for_a_batch_queue_and_refuses_a_second_process(tmp_path: Path) -> None:
    limits = ("train.num_steps=5000", "train.max_wall_s=34")
    with running(tmp_path / "run", *TINY, *limits) as live:
        began_s = time.monotonic()
        live.wait_for(r"^step +2/")
        second = command("train", "--resume", str(tmp_path / "run"))
        assert second.returncode == 2
        assert "is still running in another process" in second.stderr
        run = live.finish(timeout_s=60.0)
        assert time.monotonic() - began_s < 34.0, run.output
    summary = run.summary
    assert (run.exit_code, summary["status"]) == (0, "out_of_time"), run.output
    assert f"train --resume {tmp_path / 'run'}" in summary["reason"]
    assert run.checkpoint.name == f"step_{summary['steps']:06d}"
    assert summary["steps"] == len(run.metrics) > 2


def test_what_can_not_be_resumed_says_so_in_one_line(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    refused = command("train", "--resume", str(root))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "this is no run directory" in refused.stderr
    (root / "config.yaml").write_text(knobs.to_yaml(knobs.load(QUICKSTART)))
    refused = command("rerun", str(root))
    assert refused.returncode == 2
    assert "no recorded batch; train with train.record=true" in refused.stderr
    refused = command("train", "--resume", str(root), "learner.lr=0.1")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "learner.lr can't change from 0.0003 to 0.1 when a run is resumed" in refused.stderr
    allowed = command("train", "--resume", str(root), "train.num_steps=50", "--dry-run")
    assert allowed.returncode == 0, allowed.stderr
    assert "would train 50 steps" in allowed.stdout
