"""Every mode and transport of weight updates with faults of the SGLang servers.

It takes too long for every change; `.ci/full` runs it.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_support import (
    TINY,
    Finished,
    check_checkpoint,
    check_conservation,
    check_staleness,
    finished,
    running,
)
from sglang_proxy import BREAK_OFF, proxy
from sglang_run_support import (
    CONFIG,
    SERVERS,
    check_restarts,
    hang,
    kill,
    replaced,
    server_of,
    starve,
)

from dapo_async import config as knobs
from dapo_async.rollout.sglang.server import ServerOptions, SGLangServer

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]
FAULTS = (kill, hang, starve)


def largest(run: Finished, name: str) -> float:
    """The largest value of a metric; 0 where no step has it."""
    return max((float(row[name]) for row in run.metrics if name in row), default=0.0)


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
@pytest.mark.parametrize("mode", ["recompute", "keep_kv", "drain"])
def test_faults_lose_nothing_in_any_mode(tmp_path: Path, mode: str, transport: str) -> None:
    steps = ("train.num_steps=5000", "train.checkpoint_every_steps=500", "train.record=true")
    knobs = (
        f"rollout.weight_update={mode}",
        f"weights.transport={transport}",
        "deadlines.answer_s=6",
    )
    session: list[psutil.Process] = []
    with running(tmp_path / "run", *TINY, *SERVERS, *steps, *knobs) as live:
        live.wait_for(r"^step +4/")
        for count, fault in enumerate(FAULTS, 1):
            session += replaced(live, "rollout-0", fault, count=count)
        os.kill(live.driver, signal.SIGTERM)
        run = live.finish(timeout_s=60.0)
        live.seconds_until_nothing_is_left(timeout_s=10.0)
    summary = run.summary
    assert (run.exit_code, summary["status"]) == (143, "interrupted"), run.output
    assert summary["engine_restarts"] == len(FAULTS), run.output
    assert not psutil.wait_procs(session, timeout=5.0)[1]
    check_conservation(summary["groups"])
    assert (summary["groups"]["failed"], summary["groups"]["evicted"]) == (0, 0)
    assert summary["failures"] == {}
    assert summary["groups"]["trained"] == sum(row["groups"] for row in run.metrics)
    assert "mismatch" not in summary["handshake"]
    for step in range(summary["steps"]):
        check_staleness(run.rollouts(step), max_staleness=2)
    assert 0 < largest(run, "mismatch_max") <= 1e-4
    if mode != "keep_kv":  # test_sglang_engine.py checks its gap
        assert largest(run, "kv_gap_max") <= 1e-4
    check_checkpoint(run.checkpoint)


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_two_engines_are_replaced_when_each_fails_in_turn(tmp_path: Path, transport: str) -> None:
    steps = (
        "rollout.num_workers=2",
        "train.num_steps=5000",
        "train.checkpoint_every_steps=500",
        f"weights.transport={transport}",
    )
    with running(tmp_path / "run", *TINY, *SERVERS, *steps, "deadlines.answer_s=6") as live:
        live.wait_for(r"^step +4/")
        for name, fault in (("rollout-0", kill), ("rollout-1", hang)):
            replaced(live, name, fault)
        os.kill(live.driver, signal.SIGTERM)
        run = live.finish(timeout_s=60.0)
        live.seconds_until_nothing_is_left(timeout_s=10.0)
    assert run.exit_code == 143, run.output
    check_restarts(run, **{"rollout-0": 1, "rollout-1": 1})
    check_conservation(run.summary["groups"])
    assert run.summary["groups"]["failed"] == 0


def test_server_without_room_for_all_responses_gives_right_logprobs(tmp_path: Path) -> None:
    """It has a third of the KV memory that its slots may need, so it preempts responses."""
    run = finished(
        tmp_path / "run",
        *TINY,
        *SERVERS,
        "rollout.server_flags=--max-total-tokens 520",
        "train.num_steps=40",
        "learner.lr=1e-5",
    )
    assert run.exit_code == 0, run.output
    assert 0 < largest(run, "mismatch_max") <= 1e-4


def test_run_with_adaptive_slots_adds_up(tmp_path: Path) -> None:
    """`rollout.num_slots=auto` on a server with memory for 10 of the longest sequences."""
    run = finished(
        tmp_path / "run",
        *TINY,
        *SERVERS,
        "rollout.num_slots=auto",
        "rollout.server_flags=--max-total-tokens 520",
        "train.num_steps=60",
        "learner.lr=1e-5",
    )
    assert run.exit_code == 0, run.output
    assert 0 < largest(run, "mismatch_max") <= 1e-4
    for engine in run.summary["engines"].values():
        assert sum(engine["seconds"].values()) >= 0.9 * run.summary["train_s"]
    for row in run.metrics:
        shares = [value for name, value in row.items() if name.startswith("engine_time.")]
        assert abs(sum(shares) - 1.0) < 1e-6
    assert run.metrics[0]["slots_per_engine"] < 32, "it starts with what the memory holds"
    assert 8 <= run.summary["slots_per_engine"] <= 96
    # Each step pauses the server, and a pause is no retraction.
    assert run.summary["kv.retractions"] < len(run.metrics) / 2


def test_quickstart_learns_its_task_on_a_server(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", "tracking.sinks=none", config=CONFIG, timeout_s=400.0)
    assert run.exit_code == 0, run.output
    first, *_, last = run.evaluations
    assert first["accuracy"] < 0.3
    assert last["accuracy"] > 0.9


def test_a_dedicated_evaluator_samples_on_a_server_of_its_own(tmp_path: Path) -> None:
    with running(
        tmp_path / "run",
        *TINY,
        *SERVERS,
        "train.num_steps=5000",
        "train.checkpoint_every_steps=2",
        "evaluation.every_steps=2",
        "evaluation.engine=dedicated",
        "evaluation.num_prompts=8",
        "evaluation.k=4",
        "evaluation.temperature=1",
        "evaluation.top_p=0.7",
    ) as live:
        measured = r"^evaluation of version (\d+): .*8 held-out prompts, avg@4 at temperature 1"
        live.wait_for(measured)
        kill(server_of(tmp_path / "run", "evaluator"))
        live.wait_for(r"^evaluation of version \d+ skipped: the evaluator has lost its engine")
        count = len(re.findall(measured, live.output, re.MULTILINE))
        live.wait_for(rf"(?s)({measured[1:]}.*?){{{count + 1}}}")
        os.kill(live.driver, signal.SIGTERM)
        run = live.finish(timeout_s=60.0)
        live.seconds_until_nothing_is_left(timeout_s=10.0)
    assert run.exit_code == 143, run.output
    row = next(row for row in run.evaluations if row["engine"] == "dedicated")
    assert (row["k"], row["num_prompts"], row["top_p"]) == (4, 8, 0.7)
    assert row["weight_versions"] == [row["version"]]


def test_server_that_runs_already_is_waited_for_when_an_evaluation_loses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test starts the server, behind a proxy that breaks off one response of the first
    evaluation and one of a training step."""
    options = ServerOptions(
        model=Path(knobs.load(CONFIG).model.path),
        dtype="float32",
        device="cpu",
        tensor_parallel=1,
        num_slots=32,
        max_len=64,
        host="127.0.0.1",
        seed=0,
        log=tmp_path / "server.log",
    )
    server, told = SGLangServer(options), Counter[str]()

    def tamper(path: str, answer: Any) -> Any:
        name = (
            answer["meta_info"]["id"].split(".")
            if path == "/generate" and answer != "[DONE]"
            else []
        )
        if len(name) < 3:  # a probe's, or the end of a stream
            return answer
        kind = "of a group" if int(name[2]) >= 0 else "of an evaluation"
        told[kind] += 1
        return (
            BREAK_OFF
            if (kind, told[kind]) in (("of an evaluation", 5), ("of a group", 100))
            else answer
        )

    async def train() -> Finished:
        await server.start(timeout_s=120.0)
        async with proxy(server.url, tamper) as url:
            monkeypatch.setenv("SGLANG_API_KEY", server.api_key)
            flags = (*TINY, *SERVERS, f"rollout.servers={url}", "train.num_steps=12")
            return await asyncio.to_thread(finished, tmp_path / "run", *flags)

    try:
        run = asyncio.run(train())
    finally:
        asyncio.run(server.close())
    assert run.exit_code == 0, run.output
    assert run.summary["engine_restarts"] == 2, run.output
    assert run.summary["groups"]["failed"] == 0
    assert [row["num_prompts"] for row in run.evaluations] == [64, 64]
    check_conservation(run.summary["groups"])
    assert server.api_key not in run.output


def test_server_of_several_ranks_takes_part_with_each_of_them(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", *TINY, *SERVERS, "rollout.tensor_parallel=2")
    assert run.exit_code == 0, run.output
    assert run.summary["handshake"]["passed"] == run.summary["steps"] == 6
    assert "mismatch" not in run.summary["handshake"]
    fresh = [row["mismatch_max"] for row in run.metrics if "mismatch_max" in row]
    assert fresh
    assert 0 < max(fresh) <= 1e-4
