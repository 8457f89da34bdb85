"""Checkpoints on a local S3 server: a run loses its machine and continues from the copy, also with
more ranks and engines."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from run_support import (
    TINY,
    check_checkpoint,
    check_conservation,
    command,
    finished,
    read_rows,
    running,
)

from dapo_async.runtime.mirror import Mirror

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
BASE = "s3://checkpoints/runs"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedMotoServer]:
    """An S3 server with the bucket `checkpoints`; the environment names it and its credentials."""
    import boto3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "very-secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="checkpoints")
    yield server
    server.stop()


def test_a_run_that_lost_its_machine_continues_from_the_object_store(
    bucket: ThreadedMotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = ("train.checkpoint_every_steps=2", f"train.checkpoint_mirror={BASE}")
    mirror, root = Mirror(f"{BASE}/moved"), tmp_path / "moved"
    with running(root, *TINY, *often, "train.num_steps=5000") as live:
        live.wait_for(r"^step +6/")
        live.wait_for_checkpoint()
        while not mirror.versions():
            assert live.processes()
        os.kill(live.driver, signal.SIGKILL)
    versions = mirror.versions()
    shutil.rmtree(root)
    num_steps = versions[-1] + 4
    auto = (*often, f"train.num_steps={num_steps}", "train.resume=auto")
    ended = finished(root, *TINY, *auto)
    assert ended.exit_code == 0, ended.output
    assert f"downloaded step_{versions[-1]:06d} from {BASE}/moved in " in ended.output
    assert f"resuming at step {versions[-1]} from " in ended.output
    assert "very-secret" not in ended.output
    assert [row["step"] for row in ended.metrics] == list(range(num_steps))
    check_conservation(ended.summary["groups"])
    assert mirror.versions()[-1] == num_steps
    copies = ended.summary["checkpoints"]
    assert (copies["not_uploaded"], copies["uploaded"]) == (0, copies["saved"])

    root.rename(tmp_path / "gone")
    monkeypatch.setenv("DAPO_ASYNC_RUNS", str(tmp_path / "again"))
    larger = ("learner.data_parallel=2", "rollout.num_workers=2")
    more = (f"train.num_steps={num_steps + 2}", *larger)
    resumed = command("train", "--resume", f"{BASE}/moved", *more)
    assert resumed.returncode == 0, resumed
    assert f"downloaded step_{num_steps:06d} from {BASE}/moved in " in resumed.stdout
    again = tmp_path / "again" / "moved"
    assert len(read_rows(again / "metrics.jsonl")) == num_steps + 2
    check_checkpoint(again / "checkpoints" / f"step_{num_steps + 2:06d}")

    # Back on the first machine, whose checkpoints are older than those of the store.
    (tmp_path / "gone").rename(root)
    monkeypatch.delenv("DAPO_ASYNC_RUNS")
    auto = (*often, f"train.num_steps={num_steps + 4}", "train.resume=auto")
    back = finished(root, *TINY, *auto)
    assert back.exit_code == 0, back.output
    assert f"; this machine has step_{num_steps:06d}\n" in back.output
    assert f"resuming at step {num_steps + 2} from " in back.output
    assert [row["step"] for row in back.metrics] == list(range(num_steps + 4))
    assert mirror.versions()[-1] == num_steps + 4


def test_a_server_that_is_gone_costs_the_copies_and_not_the_run(
    bucket: ThreadedMotoServer, tmp_path: Path
) -> None:
    mirror = (f"train.checkpoint_mirror={BASE}", "deadlines.work_s=60", "train.num_steps=30")
    with running(tmp_path / "alone", *TINY, *mirror, "train.checkpoint_every_steps=2") as live:
        live.wait_for(r"^step +2/")
        bucket.stop()
        ended = live.finish(timeout_s=300.0)
    assert ended.exit_code == 0, ended.output
    assert " is not copied to s3://checkpoints/runs/alone: " in ended.output
    assert ended.summary["checkpoints"]["not_uploaded"] >= 1
    check_checkpoint(ended.checkpoint)
