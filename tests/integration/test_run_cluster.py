"""The same command on a running cluster: two Ray nodes on this machine, a Ray job, a joined driver.

The end of the run too, orderly or not.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray_cluster import NODES, RAY, Cluster, started_cluster, wait_until
from run_support import (
    COMMAND,
    TINY,
    check_checkpoint,
    check_conservation,
    finished,
    read_rows,
    running,
)

from dapo_async.runtime.cluster.environment import RUNS
from dapo_async.runtime.gauges import all_names

TRAIN = ("dapo-async", "train", "configs/quickstart.yaml", *TINY, "rollout.num_workers=2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started_cluster() as started:
        yield started


@pytest.fixture
def joined(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Commands of the test are given what a user of the cluster exports."""
    for name in ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.delenv("RAY_ADDRESS")
    return cluster


@dataclass(frozen=True, slots=True)
class Actor:
    pid: int
    ip: str
    node_id: str


def actors_of(output: str) -> dict[str, Actor]:
    """What a run on a cluster prints of its actors."""
    lines = re.findall(
        r"^(replay|learner|rollout-\d+) +pid (\d+) on (\S+) \(node ([0-9a-f]{56})\)",
        output,
        re.MULTILINE,
    )
    return {name: Actor(int(pid), ip, node_id) for name, pid, ip, node_id in lines}


def assert_gone(actors: dict[str, Actor], *, within_s: float) -> None:
    wait_until(
        lambda: not any(psutil.pid_exists(actor.pid) for actor in actors.values()),
        timeout_s=within_s,
        what=f"the end of {actors}",
    )


def listens_on(actor: Actor) -> set[str]:
    """The interfaces on which the actor's own servers listen; Ray's listens on all of them."""
    listening = [
        each
        for each in psutil.Process(actor.pid).net_connections("tcp4")
        if each.status == psutil.CONN_LISTEN
    ]
    return {each.laddr.ip for each in listening} - {"0.0.0.0"}


def scraped(cluster: Cluster) -> dict[str, dict[str, float]]:
    """The gauges of runs as Prometheus finds and reads them: name → labels → value."""
    found = json.loads((cluster.folder / "ray" / "prom_metrics_service_discovery.json").read_text())
    gauges: dict[str, dict[str, float]] = {}
    for target in (each for group in found for each in group["targets"]):
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError as error:  # a node's agent that starts late
            print(f"{target} gives no metrics: {error}")
            continue
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_dapo_async_"):
                    labels = "/".join(sample.labels[name] for name in ("run", "actor", "engine"))
                    gauges.setdefault(sample.name, {})[labels] = sample.value
    return gauges


def status_of(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`dapo-async status`, which reads the cluster's key-value store."""
    return subprocess.run(
        [COMMAND, "status", *arguments],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=60.0,
        check=False,
    )


def check_placement(actors: dict[str, Actor]) -> None:
    """Rollout workers on all nodes in turn; learner and replay actor on one."""
    assert set(actors) == {"replay", "learner", "rollout-0", "rollout-1"}
    assert actors["rollout-0"].node_id != actors["rollout-1"].node_id
    assert {actors[name].ip for name in ("rollout-0", "rollout-1")} == set(NODES)
    assert actors["learner"].node_id == actors["replay"].node_id


@pytest.mark.ray
def test_job_trains_on_both_nodes_and_leaves_its_files_at_the_printed_path(
    cluster: Cluster,
) -> None:
    environment = ("--runtime-env", "cluster/runtime_env.yaml")
    ended = cluster.submit("trains", *TRAIN, options=environment)
    output = ended.stdout
    assert ended.returncode == 0, output
    assert f"joined the Ray cluster at {cluster.address}: 2 nodes, 4 CPUs (" in output
    check_placement(actors_of(output))
    plan = dict(re.findall(r"^  (127\.0\.0\.\d) +2 of 2 CPUs free: (.+)$", output, re.MULTILINE))
    assert sorted(plan) == sorted(NODES), output
    assert {"learner, rollout-1, replay", "rollout-0"} == set(plan.values())
    match = re.search(r"^run directory (\S+)$", output, re.MULTILINE)
    assert match is not None, output
    root = Path(match[1])
    assert root.parent == cluster.runs
    summary = json.loads((root / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["groups"]["trained"]) == ("done", 6, 24)
    check_conservation(summary["groups"])
    assert summary["checkpoint"] == "checkpoints/step_000006"
    check_checkpoint(root / summary["checkpoint"])
    # What travels with every job: the sources, and nothing that .gitignore names.
    (copy,) = (
        cluster.folder / "ray" / "session_latest" / "runtime_resources" / "working_dir_files"
    ).glob("_ray_pkg_*[0-9a-f]")
    assert (copy / "dapo_async" / "cli" / "main.py").is_file()
    assert not [
        path.name
        for path in copy.iterdir()
        if path.name in ("runs", "build", ".git")
        or path.name.startswith((".venv", ".mypy", ".pytest"))
    ]
    assert sum(path.stat().st_size for path in copy.rglob("*")) < 20 * 2**20


@pytest.mark.ray
def test_job_without_a_place_for_its_files_is_refused_in_one_line(cluster: Cluster) -> None:
    without = ("--runtime-env-json", json.dumps({"env_vars": {RUNS: ""}}))
    ended = cluster.submit("nowhere", *TRAIN, "run_dir=here", options=without)
    assert ended.returncode == 1, ended.stdout
    assert "failed with exit code 2" in ended.stdout
    assert "\ndapo-async: run_dir (here) must be an absolute path in a Ray job, " in ended.stdout
    assert "Traceback" not in ended.stdout


def check_gauges(cluster: Cluster) -> None:
    """Ray's endpoint has the numbers of the run `stopped`, in its words."""
    wait_until(
        lambda: "ray_dapo_async_engine_version" in scraped(cluster),
        timeout_s=30.0,
        what="the gauges of the run",
    )
    gauges = scraped(cluster)
    assert gauges.keys() <= all_names()
    assert gauges["ray_dapo_async_version"]["stopped/driver/"] >= 1
    assert gauges["ray_dapo_async_tokens_per_s_generated"]["stopped/rollout/"] > 0
    for engine in ("rollout-0", "rollout-1"):
        assert gauges["ray_dapo_async_engine_version"][f"stopped/{engine}/{engine}"] >= 0


@pytest.mark.ray
def test_stopped_job_leaves_a_summary_and_a_checkpoint_and_no_actor(cluster: Cluster) -> None:
    submitted = cluster.submit(
        "stops", *TRAIN, "train.num_steps=5000", "run_dir=stopped", options=["--no-wait"]
    )
    assert submitted.returncode == 0, submitted.stdout
    root = cluster.runs / "stopped"
    metrics = root / "metrics.jsonl"
    wait_until(
        lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3,
        timeout_s=90.0,
        what="the third step",
    )
    actors = actors_of(cluster.job("logs", "stops").stdout)
    check_placement(actors)
    # The weight group: the learner's rendezvous and each member's end, on its own node's interface.
    for name in ("learner", "rollout-0", "rollout-1"):
        assert listens_on(actors[name]) == {actors[name].ip}, name
    check_gauges(cluster)
    shown = status_of(cluster, cluster.address, "--json")
    assert shown.returncode == 3, shown.stderr  # running
    status = json.loads(shown.stdout)
    assert (status["root"], status["state"], status["num_steps"]) == (str(root), "running", 5000)
    assert status["step"] >= 3
    assert status["engines"].keys() == {"rollout-0", "rollout-1"}
    (driver,) = [
        each
        for each in psutil.process_iter(["cmdline"])
        if "run_dir=stopped" in (each.info["cmdline"] or ()) and "sh" not in each.name()
    ]
    stop = subprocess.Popen(
        [RAY, "job", "stop", "--address", cluster.dashboard, "stops"],
        env=cluster.environment,
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: (root / "summary.json").exists(), timeout_s=30.0, what="the first summary")
    began_s = time.monotonic()
    wait_until(
        lambda: not driver.is_running() or driver.status() == psutil.STATUS_ZOMBIE,
        timeout_s=30.0,
        what="the driver's end",
    )
    print(f"the driver of a stopped job ended {time.monotonic() - began_s:.1f} s after SIGTERM")
    assert stop.wait(30.0) == 0
    assert_gone(actors, within_s=30.0)
    events = read_rows(root / "events.jsonl")
    told = [(event["event"], event["actor"]) for event in events]
    ready = sorted(actor for name, actor in told if name == "actor_ready")
    assert ready == ["learner", "replay", "rollout-0", "rollout-1"]
    assert told[0] == ("start", "driver")
    assert {"publish", "checkpoint"} <= {name for name, _ in told}
    assert (events[-1]["event"], events[-1]["status"]) == ("end", "interrupted")
    assert status_of(cluster, cluster.address).returncode == 1  # ended
    summary = json.loads((root / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("interrupted", "SIGTERM received")
    assert summary["steps"] == len(read_rows(metrics)) >= 3
    check_conservation(summary["groups"])
    assert summary["checkpoint"] == f"checkpoints/step_{summary['steps']:06d}"
    check_checkpoint(root / summary["checkpoint"])


@pytest.mark.ray
def test_killed_driver_takes_its_actors_along(joined: Cluster, tmp_path: Path) -> None:
    # By the address file alone, as on the head node.
    with running(tmp_path / "run", *TINY, "train.num_steps=5000") as live:
        live.wait_for(rf"^joined the Ray cluster at {re.escape(joined.address)}: ")
        live.wait_for(r"^step +3/")
        actors = actors_of(live.output)
        assert set(actors) == {"replay", "learner", "rollout-0"}
        assert all(psutil.pid_exists(actor.pid) for actor in actors.values())
        os.kill(live.driver, signal.SIGKILL)
        assert_gone(actors, within_s=30.0)


@pytest.mark.ray
def test_own_ray_starts_beside_a_running_cluster(
    joined: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", joined.address)
    run = finished(
        tmp_path / "run",
        *TINY,
        "train.num_steps=1",
        "evaluation.num_prompts=0",
        "ray.address=local",
    )
    assert (run.exit_code, run.summary["status"]) == (0, "done"), run.output
    assert "\nstarted a new Ray\n" in run.output
    assert actors_of(run.output) == {}  # these lines name no node of the cluster


def placed(*node_ids: str) -> dict[str, Actor]:
    names = ("replay", "learner", "rollout-0", "rollout-1")
    ips = dict(zip(sorted(set(node_ids)), NODES, strict=False))
    return {
        name: Actor(1, ips[node_id], str(node_id))
        for name, node_id in zip(names, node_ids, strict=True)
    }


def test_placement_check_notices_workers_on_one_node_and_a_lonely_replay_room() -> None:
    check_placement(placed("a", "a", "a", "b"))
    for wrong in (("a", "a", "b", "b"), ("b", "a", "a", "b")):
        with pytest.raises(AssertionError):
            check_placement(placed(*wrong))


def test_wait_for_the_end_of_actors_notices_one_that_lives() -> None:
    with pytest.raises(AssertionError, match=r"the end of .*learner"):
        assert_gone({"learner": Actor(os.getpid(), NODES[0], "a")}, within_s=0.2)
