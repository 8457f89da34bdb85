"""A run that loses a node of its cluster loses what ran on it, and nothing else. A node that is
drained first loses nothing at all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from ray_cluster import NODES, RAY, Cluster, started_cluster, wait_for_node, wait_until
from run_support import TINY, Live, check_conservation, check_token_flow, command, running

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
NEW_NODE = "127.0.0.4"


def raylets(ip: str) -> list[int]:
    """The process of the node's raylet, if it is there."""
    lines = {
        process.pid: " ".join(process.info["cmdline"] or ())
        for process in psutil.process_iter(["cmdline"])
    }
    title, node = "raylet/raylet ", f"--node_ip_address={ip} "
    return [pid for pid, line in lines.items() if title in line and node in line]


def join(patch: pytest.MonkeyPatch, cluster: Cluster) -> str:
    """The setting with which a run joins the cluster."""
    for name in ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        patch.setenv(name, cluster.environment[name])
    return f"ray.address={cluster.address}"


def go_on(live: Live) -> None:
    """Waits for four more steps."""
    before = int(re.findall(r"^step +(\d+)/", live.output, re.MULTILINE)[-1])
    live.wait_for(rf"^step +{before + 4}/")


def test_raylet_of_a_second_node_dies_and_its_worker_starts_on_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("train.num_steps=5000", "rollout.num_workers=2", "train.record=true")
    with started_cluster() as cluster:
        with running(tmp_path / "run", *TINY, *more, join(monkeypatch, cluster)) as live:
            live.wait_for(r"^step +4/")
            (lost,) = re.findall(
                rf"^(rollout-\d) +pid \d+ on {re.escape(NODES[1])} ", live.output, re.M
            )
            began_s = time.monotonic()
            (raylet,) = raylets(NODES[1])
            os.kill(raylet, signal.SIGKILL)
            live.wait_for(rf"^{lost} lost its process", timeout_s=90.0)
            print(f"the loss was noticed after {time.monotonic() - began_s:.1f} s")
            go_on(live)  # with the other worker alone
            node = cluster.start_node("--address", cluster.address, ip=NEW_NODE)
            wait_for_node(cluster.folder, NEW_NODE)
            live.wait_for(rf"^{lost} generates again", timeout_s=180.0)
            os.kill(live.driver, signal.SIGINT)
            run = live.finish(timeout_s=120.0)
        node.terminate()
        node.wait(60.0)
    assert run.exit_code == 130, run.output
    check_conservation(run.summary["groups"])
    assert run.summary["groups"]["failed"] == 0
    assert [row["step"] for row in run.metrics] == [*range(len(run.metrics))]


def test_nodes_that_are_drained_and_workers_that_scale_removes_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a small bound, tokens that are handed back may be too old when another worker takes them.
    bound = "replay.max_staleness=8"
    more = ("train.num_steps=5000", "rollout.num_workers=2", "train.record=true", bound)
    with started_cluster() as cluster:
        with running(tmp_path / "run", *TINY, *more, join(monkeypatch, cluster)) as live:
            live.wait_for(r"^step +4/")
            ((drained, node_id),) = re.findall(
                rf"^(rollout-\d) +pid \d+ on {re.escape(NODES[1])} \(node (\w+)\)",
                live.output,
                re.M,
            )
            node = cluster.start_node("--address", cluster.address, ip=NEW_NODE)
            wait_for_node(cluster.folder, NEW_NODE)
            began_s = time.monotonic()
            reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
            reason += ["--deadline-remaining-seconds", "60"]
            asked = subprocess.run(
                [RAY, "drain-node", "--address", cluster.address, "--node-id", node_id, *reason],
                env=cluster.environment,
                capture_output=True,
                text=True,
                timeout=60.0,
                check=False,
            )
            assert asked.returncode == 0, asked
            live.wait_for(rf"^node {node_id[:12]} is being drained; on it: {drained}$")
            live.wait_for(rf"^{drained} has left the run")
            print(f"the worker had left {time.monotonic() - began_s:.1f} s after the notice")
            # A raylet that is drained ends by itself when nothing runs there.
            wait_until(lambda: not raylets(NODES[1]), timeout_s=60.0, what="the end of the node")
            live.wait_for("^rollout-2 joins the run", timeout_s=180.0)
            assert re.search(rf"^rollout-2 +pid \d+ on {re.escape(NEW_NODE)} ", live.output, re.M)
            go_on(live)
            answer = command("scale", str(live.root), "rollout=1")
            assert answer.returncode == 0, answer
            assert answer.stdout == "rollout.num_workers 2 -> 1: rollout-2 leaves\n"
            live.wait_for("^rollout-2 has left the run")
            go_on(live)
            os.kill(live.driver, signal.SIGINT)
            run = live.finish(timeout_s=120.0)
        node.terminate()
        node.wait(60.0)
    assert run.exit_code == 130, run.output
    check_conservation(run.summary["groups"])
    check_token_flow(run.summary["token_flow"])
    assert run.summary["token_flow"]["repeated"] == 0, "every token is generated once"
    assert (run.summary["groups"]["failed"], run.summary["groups"]["evicted"]) == (0, 0)
    assert "was not drained" not in run.output
    assert "lost its process" not in run.output
    assert [row["step"] for row in run.metrics] == [*range(len(run.metrics))]
