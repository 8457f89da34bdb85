"""Helpers for the tests of tracking: configs, rows, run directories, ports and MLflow servers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paths import ROOT

from dapo_async.config import Config, TrackingConfig, TrainConfig
from dapo_async.tracking.run_dir import RunDir

if TYPE_CHECKING:  # rollout and reports use these helpers without MLflow
    from mlflow import MlflowClient

PACKAGE = ROOT / "dapo_async"


def config_with(mlflow: str = "local", *, sinks: str = "mlflow", num_steps: int = 4) -> Config:
    return replace(
        Config(),
        tracking=TrackingConfig(sinks=sinks, mlflow=mlflow),
        train=TrainConfig(num_steps=num_steps),
    )


def step_row(step: int, **more: float | None) -> dict[str, Any]:
    """The part of a row of metrics.jsonl that displays and stores read."""
    row: dict[str, Any] = {
        "step": step,
        "version": step + 1,
        "time_s": 1.5 * (step + 1),
        "step_s": 1.5,
        "tokens_per_s": 1000.0,
        "accuracy": 0.25 * step,
        "reward": 0.5,
        "response_tokens": 7.0,
        "entropy": 0.5,
        "staleness": 1.0,
        "group_staleness_max": 2.0,
        "idle.learner": 0.25,
        "idle.rollout": 0.5,
        "slots.idle": 0.5,
        "offered": 8,
        "acceptance": 0.5,
        "rejected.all_wrong": 4,
        "groups.rejected.all_wrong": 4 * (step + 1),
        "groups.rejected.all_equal": 0,
    }
    return row | more


def run_dir_with(root: Path, *, num_steps: int = 4) -> RunDir:
    """A run directory as a run of so many steps leaves it."""
    run_dir = RunDir.create(root)
    run_dir.config.write_text("seed: 0\n")
    run_dir.write_summary({"status": "done"})
    run_dir.picture.write_bytes(b"\x89PNG")
    for step in range(num_steps):
        run_dir.log_step(step_row(step))
        (run_dir.rollouts / f"step_{step:06d}.jsonl").write_text(f'{{"step": {step}}}\n')
    return run_dir


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def silent_port() -> Iterator[int]:
    """A port that accepts every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield int(server.getsockname()[1])


@contextmanager
def mlflow_server(
    folder: Path,
    *,
    command: Sequence[str] = ("server",),
    database: str | None = None,
    timeout_s: float = 120.0,
) -> Iterator[str]:
    """The real tracking server over `database`, by default `folder`/mlflow.db; its URL."""
    port = free_port()
    store = [
        "--backend-store-uri",
        database or f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "served"),
    ]
    with (folder / "server.out").open("w") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlflow",
                *command,
                *store,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--workers",
                "1",
            ],
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + timeout_s
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, (folder / "server.out").read_text()
                assert time.monotonic() < deadline_s, (
                    f"the tracking server did not answer within {timeout_s} s"
                )
                time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its own group: nothing else is in it
        process.wait(10)


def ask(url: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One call of MLflow's REST API."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(
        f"{url}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return dict(json.load(answer))


def documented(file: str) -> dict[str, tuple[str, str]]:
    """The rows of the table on `file` in docs/metrics.md: name -> module and function.

    `<x>` in a name stands for any one part.
    """
    text = (ROOT / "docs" / "metrics.md").read_text()
    section = text.split(f"## {file}\n")[1].split("\n## ")[0]
    row = r"^\| `([^`]+)` \| [^|]*(?:\\\|[^|]*)* \|[^|]*\| `([^`]+)` `([^`]+)` \|$"
    rows = re.findall(row, section, re.MULTILINE)
    assert len(rows) == section.count("\n| `"), "a row of the table has another form"
    return {name: (module, function) for name, module, function in rows}


def check_documented(written: set[str], names: Iterable[str]) -> None:
    """Every written name has a row in the table, and every row names something written."""
    patterns = {
        name: re.compile(
            re.sub(r"<\w+>", "[^.]+", re.escape(name).replace(r"\<", "<").replace(r"\>", ">"))
        )
        for name in names
    }
    missing = {
        name
        for name in written
        if not any(pattern.fullmatch(name) for pattern in patterns.values())
    }
    idle = {
        name
        for name, pattern in patterns.items()
        if not any(pattern.fullmatch(each) for each in written)
    }
    assert not missing, f"written, but not documented: {sorted(missing)}"
    assert not idle, f"documented, but never written: {sorted(idle)}"


# Maps by actor, result or error.
WHOLE = ("seconds_by_state", "handshake", "caught", "failures", "engines", "split", "guards")


def summary_names(summary: Mapping[str, Any]) -> set[str]:
    """The keys of a summary, `a.b` for nested ones. Maps by actor, result or error stay whole."""
    names = set()
    for name, value in summary.items():
        whole = name in WHOLE or not isinstance(value, Mapping)
        names |= {name} if whole else {f"{name}.{part}" for part in summary_names(value)}
    return names


def check_history(
    client: MlflowClient,
    run_id: str,
    rows: Sequence[dict[str, Any]],
    *,
    besides: tuple[str, ...] = ("evaluation/", "system/"),
) -> None:
    """Every number of every row is a metric at its version, named with `/` in place of `.`.

    There is no other metric, except those that begin with `besides`.
    """
    expected = {
        (name.replace(".", "/"), row["version"], float(value))
        for row in rows
        for name, value in row.items()
        if name not in ("step", "version") and value is not None
    }
    names = [name for name in client.get_run(run_id).data.metrics if not name.startswith(besides)]
    logged = {
        (name, point.step, point.value)
        for name in names
        for point in client.get_metric_history(run_id, name)
    }
    assert logged == expected, (
        f"only in MLflow: {logged - expected}; only in the rows: {expected - logged}"
    )
