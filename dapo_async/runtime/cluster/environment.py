"""Environment variables that are read and set before Ray is imported.

`cli` calls it first; this module must not import Ray.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from dapo_async.utils.paths import check_path

LOCAL = "local"  # ray.address of an own Ray
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the command of a job
RUNS = "DAPO_ASYNC_RUNS"


def prepare(address: str) -> None:
    """Sets the environment of this process, which every process of an own Ray inherits.

    Call it before anything imports Ray.
    """
    # No usage statistics leave the machine.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray gives its workers niceness 15, so that any other busy process would starve the actors.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray colours its messages in the log of a job, too.
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    if address == LOCAL:
        # Other users of this machine reach Ray on loopback; only this run has the token.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        # An own Ray has no dashboard: its GCS need not keep the history of all calls of actors.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
        # They belong to a cluster: its address, its certificates and its database; in a Ray job its
        # copy of the working directory.
        for name in ("RAY_ADDRESS", "RAY_USE_TLS", "RAY_REDIS_ADDRESS", JOB):
            os.environ.pop(name, None)
        for name in ("RAY_TMPDIR", "TMPDIR"):  # Ray would take an empty one for the current folder
            if os.environ.get(name) == "":
                del os.environ[name]


def run_root(run_dir: str, *, name: str) -> Path:
    """Where a run writes: `run_dir`, or `name` when that is empty.

    A relative path lies in the folder DAPO_ASYNC_RUNS, else in the current folder. Raises
    ValueError where the current folder is Ray's copy of a job's working directory, which Ray
    deletes after the job.
    """
    if run_dir:
        check_path("run_dir", run_dir)
    try:
        given = Path(run_dir).expanduser()
        return (
            given if given.is_absolute() else _runs(run_dir) / (given if run_dir else name)
        ).resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"run_dir ({run_dir!r}) is no usable path: {error}; give another path"
        ) from error


def _runs(run_dir: str) -> Path:
    if runs := os.environ.get(RUNS):
        if not os.path.isabs(runs):
            raise ValueError(
                f"{RUNS} ({runs}) must be an absolute path; set it to the folder of all runs"
            )
        return Path(runs)
    if JOB in os.environ:
        raise ValueError(
            f"run_dir ({run_dir or 'empty'}) must be an absolute path in a Ray job, because Ray "
            "deletes its copy of the working directory; set run_dir, or "
            f"{RUNS} to the folder of all runs"
        )
    return Path.cwd() if run_dir else Path.cwd() / "runs"
