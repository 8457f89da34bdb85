"""`dapo-async submit` on real clusters: stop, failure, resume as a job and on another cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import Cluster, started_cluster, wait_until
from run_support import (
    MARKER,
    TINY,
    check_checkpoint,
    check_conservation,
    processes_of,
    read_rows,
)

from dapo_async.utils.checkpoint_dir import CheckpointFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
SUBMIT = ("submit", "configs/quickstart.yaml", *TINY, "train.checkpoint_every_steps=2")
LONG = ("train.num_steps=5000", "rollout.num_workers=1")
NO_CONTROL = re.compile(r"[^\n\x20-\x7e→…·×≥≤–—]")  # carriage returns, colours, cursor moves


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started_cluster() as started:
        yield started


def wait_for_step(root: Path, count: int) -> None:
    metrics = root / "metrics.jsonl"
    wait_until(
        lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= count,
        timeout_s=120.0,
        what=f"step {count} in {root}",
    )


def summary_of(root: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((root / "summary.json").read_text())
    return summary


def log_of(cluster: Cluster, job: str) -> str:
    """What `ray job logs` prints after the two lines of its own."""
    lines = cluster.job("logs", job).stdout.splitlines()
    began = next(n for n, line in enumerate(lines) if line.startswith("Running entrypoint for"))
    return "\n".join(lines[began:])


def pid_of(cluster: Cluster, job: str, actor: str) -> int:
    """As the job has printed it."""
    match = re.search(rf"^{actor} +pid (\d+) ", log_of(cluster, job), re.MULTILINE)
    assert match is not None
    return int(match[1])


def is_gone(cluster: Cluster, text: str) -> bool:
    """Whether no process of the cluster has `text` in its command line."""
    left = processes_of(cluster.environment[MARKER], session=-1).values()
    return not any(text in line or "Actor" in line for line in left)


@pytest.mark.parametrize("supervise", [(), ("--supervise",)], ids=["plain", "supervised"])
def test_a_stopped_job_saves_its_newest_step_and_is_resumed_as_a_job(
    cluster: Cluster, supervise: tuple[str, ...]
) -> None:
    name = f"stops{len(supervise)}"
    root = cluster.runs / name
    submitted = cluster.run(*SUBMIT, *LONG, f"run_dir={name}", "--detach", *supervise)
    assert submitted.returncode == 0, submitted.stdout
    wait_for_step(root, 3)
    assert cluster.run("submit", "--status", name).returncode == 3
    stopped = cluster.run("submit", "--stop", name)
    assert stopped.returncode == 0, stopped.stdout
    assert f"job {name} (run {name}, " in stopped.stdout.splitlines()[-1]
    assert "STOPPED after" in stopped.stdout
    assert is_gone(cluster, f"run_dir={name}")
    log = log_of(cluster, name)
    assert "Traceback" not in log
    assert [line for line in log.splitlines() if NO_CONTROL.search(line)] == []
    summary = summary_of(root)
    assert (summary["status"], summary["reason"]) == ("interrupted", "SIGTERM received")
    assert summary["checkpoint"] == f"checkpoints/step_{summary['steps']:06d}"
    steps = summary["steps"] + 2
    resumed = cluster.run("submit", "--resume", str(root), f"train.num_steps={steps}", *supervise)
    assert resumed.returncode == 0, resumed.stdout
    assert f"job {name}-2 submitted to " in resumed.stdout
    assert f"resuming at step {steps - 2} from " in resumed.stdout
    assert [row["step"] for row in read_rows(root / "metrics.jsonl")] == list(range(steps))
    assert "state      done" in resumed.stdout
    assert resumed.stdout.splitlines()[-1].endswith("exit code 0")


def test_a_failed_job_ends_with_the_reason_and_the_exit_code(cluster: Cluster) -> None:
    submitted = cluster.run(*SUBMIT, *LONG, "run_dir=fails", "--detach")
    assert submitted.returncode == 0, submitted.stdout
    wait_for_step(cluster.runs / "fails", 1)
    replay = pid_of(cluster, "fails", "replay")
    os.kill(replay, signal.SIGSTOP)  # else it would write its journal anew
    # Without its journal a replay actor can't come back.
    shutil.rmtree(cluster.runs / "fails" / "journal")
    os.kill(replay, signal.SIGKILL)
    ended = cluster.run("submit", "--status", "fails", "--follow")
    assert ended.returncode == 1, ended.stdout
    assert "FAILED" in ended.stdout.splitlines()[-1]
    assert ": failed: replay lost its process" in ended.stdout.splitlines()[-1]
    log = log_of(cluster, "fails")
    assert log.rstrip().splitlines()[-1].startswith("failed: replay lost its process")
    assert [line for line in log.splitlines() if NO_CONTROL.search(line)] == []


def test_a_job_has_the_runtime_environment_of_the_file(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "environment.yaml"
    file.write_text("env_vars: {DAPO_ASYNC_RUNS: ''}\nexcludes: [/benchmarks/]\n")
    ended = cluster.run(*SUBMIT, "run_dir=here", "--runtime-env", str(file), "--wait")
    assert ended.returncode == 2, ended.stdout
    line = ended.stdout.splitlines()[-1]
    assert "run_dir (here) must be an absolute path in a Ray job" in line
    copies = cluster.folder / "ray" / "session_latest" / "runtime_resources" / "working_dir_files"
    folders = [copy for copy in copies.glob("_ray_pkg_*") if copy.is_dir()]
    assert [copy for copy in folders if not (copy / "benchmarks").exists()], "it is excluded"


def test_a_job_with_wrong_input_ends_with_its_line(cluster: Cluster) -> None:
    ended = cluster.run(*SUBMIT, "data.prompt_key=nothing", "--wait")
    assert ended.returncode == 2, ended.stdout
    assert "dapo-async: " in ended.stdout.splitlines()[-1]
    assert "has no column 'nothing'" in ended.stdout.splitlines()[-1]


def test_a_run_of_a_killed_cluster_continues_on_another_one(tmp_path: Path) -> None:
    command = (*SUBMIT, "run_dir=moves", "train.resume=auto")
    with started_cluster(runs=tmp_path / "runs") as first:
        submitted = first.run(*command, *LONG, "--detach")
        assert submitted.returncode == 0, submitted.stdout
        root = first.runs / "moves"
        saved = CheckpointFolder(root / "checkpoints")
        wait_until(lambda: len(saved.versions()) >= 2, timeout_s=120.0, what="a checkpoint")
        first.kill()
    version = saved.versions()[-1]
    assert not (root / "summary.json").exists()
    steps = version + 4
    layout = ("rollout.num_workers=2", "learner.data_parallel=2", f"train.num_steps={steps}")
    with started_cluster(ips=["127.0.0.1"], num_cpus=4, runs=tmp_path / "runs") as second:
        ended = second.run(*command, *layout)
        assert ended.returncode == 0, ended.stdout
        assert f"resuming at step {version} from " in ended.stdout
        for actor in ("learner-0", "learner-1", "rollout-0", "rollout-1"):
            assert re.search(rf"^{actor} +pid \d+ ", ended.stdout, re.MULTILINE), ended.stdout
        summary = summary_of(root)
        assert (summary["status"], summary["steps"]) == ("done", steps)
        check_conservation(summary["groups"])
        assert [row["step"] for row in read_rows(root / "metrics.jsonl")] == list(range(steps))
        check_checkpoint(root / summary["checkpoint"])
        again = second.run(*command, *layout)
        assert again.returncode == 0, again.stdout
        assert f"the run in {root} is complete: all {steps} steps" in again.stdout
        assert "job moves-2 " in again.stdout.splitlines()[-1]
