"""Whole runs on real SGLang servers: two engines, one learner, servers that die and return."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from run_support import (
    TINY,
    Finished,
    check_checkpoint,
    check_conservation,
    check_staleness,
    check_token_flow,
    command,
    finished,
    running,
)
from sglang_run_support import (
    CONFIG,
    SERVERS,
    check_restarts,
    kill,
    replaced,
    server_of,
    starve,
)

from dapo_async import config as knobs

pytestmark = pytest.mark.sglang


KEYS: list[str] = []  # of the first servers of the run `two`, while it lived
LISTENING: set[str] = set()  # addresses that they listened on


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two servers, weights by broadcast, all groups on disk; one server is killed meanwhile."""
    root = tmp_path_factory.mktemp("two") / "run"
    steps = ("train.num_steps=5000", "train.checkpoint_every_steps=500", "train.record=true")
    with running(root, *TINY, *SERVERS, "rollout.num_workers=2", *steps) as live:
        live.wait_for(r"^step +8/")
        for name in ("rollout-0", "rollout-1"):
            server = server_of(root, name)
            words = server.cmdline()
            KEYS.append(json.loads(Path(words[words.index("--config") + 1]).read_text())["api-key"])
            for process in [server, *server.children(recursive=True)]:
                LISTENING.update(
                    each.laddr.ip
                    for each in process.net_connections("tcp")
                    if each.status == psutil.CONN_LISTEN
                )
        session = replaced(live, "rollout-1", kill)
        os.kill(live.driver, signal.SIGTERM)
        run = live.finish(timeout_s=60.0)
        live.seconds_until_nothing_is_left(timeout_s=10.0)
    assert run.exit_code == 143, run.output
    assert not psutil.wait_procs(session, timeout=5.0)[1]
    return run


def test_two_engines_feed_one_learner_and_a_killed_one_is_replaced(two: Finished) -> None:
    summary = two.summary
    assert summary["status"] == "interrupted"
    check_conservation(summary["groups"])
    check_token_flow(summary["token_flow"])
    assert summary["token_flow"]["trained"] == summary["tokens"]
    assert summary["engines"]["rollout-1"]["seconds"]["dead"] > 0
    assert summary["engines"]["rollout-0"]["seconds"]["dead"] == 0
    check_restarts(two, **{"rollout-1": 1})
    (why,) = re.findall(r"^rollout-1 lost its engine: (.*); restarting it", two.output, re.M)
    assert "it ended with code -9" in why
    # No credit and no group was lost with the server: what ran there was generated elsewhere.
    assert (summary["groups"]["failed"], summary["groups"]["evicted"], summary["failures"]) == (
        0,
        0,
        {},
    )
    # The signal may have cut the last step in its midst.
    trained = [row["groups"] for row in two.metrics]
    assert summary["groups"]["trained"] == sum(trained)
    assert {*trained[:-1]} == {4}
    for step in range(summary["steps"]):
        check_staleness(two.rollouts(step), max_staleness=2)
    assert "mismatch" not in summary["handshake"]
    assert summary["handshake"]["passed"] > summary["steps"]
    for name in ("rollout-0", "rollout-1"):
        assert summary["seconds_by_state"][name]["generate"] > 0
        assert summary["seconds_by_state"][name]["sync"] > 0
    check_checkpoint(two.checkpoint)


def test_learner_and_engines_agree_where_the_weights_are_the_same(two: Finished) -> None:
    fresh = [row["mismatch_max"] for row in two.metrics if "mismatch_max" in row]
    assert fresh
    assert 0 < max(fresh) <= 1e-4
    assert all(
        row["mismatch_outside_fraction"] == 0 for row in two.metrics if "mismatch_max" in row
    )


def test_servers_key_is_nowhere_in_the_run_directory(two: Finished) -> None:
    for name in ("rollout-0", "rollout-1"):
        assert "'api_key': '***'" in (two.root / "engines" / f"{name}.log").read_text()
    assert len(set(KEYS)) == 2
    written = [
        two.output.encode(),
        *(path.read_bytes() for path in two.root.rglob("*") if path.is_file()),
    ]
    assert not any(key.encode() in content for key in KEYS for content in written)


def test_servers_of_an_own_ray_listen_on_loopback_only(two: Finished) -> None:
    assert {"127.0.0.1"} == LISTENING


def test_only_engine_rejoins_the_broadcast_and_one_loss_too_many_ends_the_run(
    tmp_path: Path,
) -> None:
    steps = ("train.num_steps=5000", "train.checkpoint_every_steps=2")
    once = "from dapo_async import config; config.MAX_RESTARTS = 1"
    with running(tmp_path / "run", *TINY, *SERVERS, *steps, before=once) as live:
        live.wait_for(r"^step +4/")
        replaced(live, "rollout-0", starve, of=1)
        server = server_of(tmp_path / "run", "rollout-0")
        session = [server, *server.children(recursive=True)]
        os.kill(server.pid, signal.SIGKILL)
        run = live.finish(timeout_s=40.0)
        live.seconds_until_nothing_is_left(timeout_s=10.0)
    assert run.exit_code == 1, run.output
    assert run.summary["reason"].startswith(
        "rollout-0 lost its engine, after 1 restarts in 30 minutes (1 are allowed): http://"
    ), run.summary["reason"]
    check_conservation(run.summary["groups"])
    check_checkpoint(run.checkpoint)
    assert not psutil.wait_procs(session, timeout=5.0)[1]


def test_server_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    run = finished(
        tmp_path / "run", *TINY, *SERVERS, "rollout.server_flags=--no-such-flag", timeout_s=120.0
    )
    assert run.exit_code == 1
    assert "the SGLang server ended with code 2 while it started" in run.summary["reason"]
    assert "--no-such-flag" in run.summary["reason"]


def test_sglang_quickstart_differs_from_the_torch_one_by_engine_slots_and_length() -> None:
    sglang, torch = knobs.load(CONFIG), knobs.load(CONFIG.with_name("quickstart.yaml"))
    names = [name for name, *_ in knobs.knobs()]

    def value(config: object, name: str) -> object:
        for part in name.split("."):
            config = getattr(config, part)
        return config

    assert [name for name in names if value(sglang, name) != value(torch, name)] == [
        "rollout.engine",
        "rollout.num_slots",  # auto
        "train.num_steps",
    ]
    assert command("train", str(CONFIG), "--dry-run").returncode == 0
