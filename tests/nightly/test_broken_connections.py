"""A run over connections that lose calls and answers now and then: Ray injects the losses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from run_support import TINY, check_conservation, check_token_flow, running

from dapo_async.replay.group_io import read_groups

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
# In percent of the calls of each process. A call whose answer is lost has been made.
LOSSES = {
    "CoreWorkerService.grpc_client.PushTask": {
        "num_failures": 25,
        "req_failure_prob": 3,
        "resp_failure_prob": 3,
    }
}


def test_a_run_outlasts_lost_calls_and_answers_and_makes_each_call_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_testing_rpc_failure", json.dumps(LOSSES))
    more = ("train.num_steps=60", "rollout.num_workers=2", "train.record=true")
    with running(tmp_path / "run", *TINY, *more) as live:
        run = live.finish(timeout_s=400.0)
    assert run.exit_code == 0, run.output
    assert "lost its process" not in run.output
    assert "lost its engine" not in run.output
    groups = run.summary["groups"]
    check_conservation(groups)
    check_token_flow(run.summary["token_flow"])
    assert (groups["trained"], groups["failed"], groups["evicted"]) == (4 * 60, 0, 0)
    times: Counter[int] = Counter()
    for path in (run.root / "recorded").glob("step_*.safetensors"):
        times.update(group.group_id for group in read_groups(path))
    assert len(times) == times.total() == 4 * 60, "a group was trained twice"
