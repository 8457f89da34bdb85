"""A run that loses a node of its cluster loses what ran on it, and nothing else."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from ray_cluster import NODES, started_cluster, wait_for_node
from run_support import TINY, check_conservation, running

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
NEW_NODE = "127.0.0.4"


def raylet_of(ip: str) -> int:
    """The process of the node's raylet."""
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "raylet/raylet " in line and f"--node_ip_address={ip} " in line:
            return process.pid
    raise AssertionError(f"no raylet of {ip}")


def test_raylet_of_a_second_node_dies_and_its_worker_starts_on_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("train.num_steps=5000", "rollout.num_workers=2", "train.record=true")
    with started_cluster() as cluster:
        for name in ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            monkeypatch.setenv(name, cluster.environment[name])
        address = f"ray.address={cluster.address}"
        with running(tmp_path / "run", *TINY, *more, address) as live:
            live.wait_for(r"^step +4/")
            (lost,) = re.findall(
                rf"^(rollout-\d) +pid \d+ on {re.escape(NODES[1])} ", live.output, re.M
            )
            began_s = time.monotonic()
            os.kill(raylet_of(NODES[1]), signal.SIGKILL)
            live.wait_for(rf"^{lost} lost its process", timeout_s=90.0)
            print(f"the loss was noticed after {time.monotonic() - began_s:.1f} s")
            before = int(re.findall(r"^step +(\d+)/", live.output, re.MULTILINE)[-1])
            live.wait_for(rf"^step +{before + 4}/")  # the other worker goes on alone
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
