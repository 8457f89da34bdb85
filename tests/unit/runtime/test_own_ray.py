"""A machine that can't start an own Ray is refused with one line, before anything is made."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import shutil
import socket
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.cli.main import main
from dapo_async.config import Config, DeadlinesConfig
from dapo_async.runtime.cluster import connect, connection, own_ray
from dapo_async.runtime.cluster.connection import RayConnection
from dapo_async.runtime.cluster.environment import prepare

Usage = namedtuple("Usage", "total used free")


def folder_is_meant(line: str) -> bool:
    return "TMPDIR" in line


def faults_at(folder: object, monkeypatch: pytest.MonkeyPatch, name: str = "RAY_TMPDIR") -> str:
    """The one line about this folder for temporary files; empty where Ray can use it."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, str(folder))
    lines = [line for line in own_ray.faults(Config()) if folder_is_meant(line)]
    assert len(lines) <= 1, lines
    assert all("\n" not in line and "set RAY_TMPDIR to" in line for line in lines)
    return lines[0] if lines else ""


def test_longest_path_of_a_socket_decides_over_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = "/ray/session_2026-11-28_03-27-48_792856_" + str(os.getpid()) + "/sockets/plasma_store"
    longest = "/tmp/" + "a" * (107 - len(rest) - len("/tmp/"))
    for name in ("RAY_TMPDIR", "TMPDIR"):
        assert faults_at(longest, monkeypatch, name) == ""
        line = faults_at(longest + "a", monkeypatch, name)
        assert line.startswith(f"{name} ('{longest}a') has {len(longest) + 1} characters; ")
        assert f"at most {len(longest)}, because the path of a socket has at most 107" in line


def test_folder_that_ray_cannot_use_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Path("/tmp/dapo-async-test-own-ray")
    shutil.rmtree(short, ignore_errors=True)
    assert faults_at(short, monkeypatch) == ""  # Ray makes it
    assert not short.exists()
    assert faults_at(short / "a b#%?'", monkeypatch) == ""
    assert "must be an absolute path" in faults_at("tmp", monkeypatch)
    assert "must have ASCII characters only" in faults_at("/tmp/ü", monkeypatch)
    short.write_text("")
    try:
        assert f"{short} is a file" in faults_at(short, monkeypatch)
        assert f"{short} is a file" in faults_at(short / "below", monkeypatch)
    finally:
        short.unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "/tmp can't be written to" in faults_at(short, monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 2**20))
    assert "has 1.0 MiB free, Ray needs at least 10 MiB" in faults_at(short, monkeypatch)


def test_other_limits_of_a_machine_are_named_with_their_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert list(own_ray.faults(Config())) == []
    with monkeypatch.context() as patch:
        patch.setattr(own_ray, "SHARED_MEMORY", tmp_path / "shm")
        (line,) = own_ray.faults(Config())
    assert "shm is missing or can't be written to" in line
    assert "--shm-size" in line
    with monkeypatch.context() as patch:
        patch.setattr(own_ray, "LOOPBACK", "192.0.2.1")
        (line,) = own_ray.faults(Config())
    assert "ip link set lo up" in line
    with monkeypatch.context() as patch:
        patch.setattr(own_ray, "ANSWER_S", 0.1)
        patch.setattr(socket, "create_connection", refuse)
        (line,) = own_ray.faults(Config())
    assert "(no answer)" in line


def refuse(*_: object, **__: object) -> socket.socket:
    raise TimeoutError


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes"),
            "set RAY_TMPDIR to a short path",
        ),
        (OSError(28, "No space left on device"), "free some space in "),
        (OSError(30, "Read-only file system", "/t/ray"), "RAY_TMPDIR to a folder that can be"),
        (PermissionError(13, "Permission denied", "/t/ray"), "RAY_TMPDIR to a folder of your own"),
        (OSError(24, "Too many open files"), "ulimit -n 8192"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "ulimit -u"),
        (OSError(98, "Address already in use"), "holds the port"),
        (
            ValueError("Attempting to cap object store memory usage at 5 bytes, but the minimum"),
            "more memory",
        ),
        (
            ValueError("The configured object store size (90 GB) exceeds /dev/shm size (1 GB)."),
            "--shm-size",
        ),
        (Exception("The current node timed out\nduring startup."), "Ray's logs are in "),
        (SystemExit(1), "ulimit -a"),
        (UnicodeEncodeError("ascii", "ü", 0, 1, "ordinal"), "ulimit -a"),
    ],
)
def test_error_of_rays_start_is_one_line_with_a_remedy(error: BaseException, remedy: str) -> None:
    line = own_ray.refusal(error)
    assert line.startswith("Ray can't start on this machine: ")
    assert remedy in line
    assert "\n" not in line
    assert len(line) < 700


def test_suspects_are_named_where_ray_gives_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", "{")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**32, 2**32))
    line = own_ray.refusal(Exception("timed out"))
    assert line.endswith(
        "limited to 4.0 GiB (ulimit -v); the environment has RAY_OVERRIDE_RESOURCES"
    )


def test_refused_machine_leaves_nothing_and_a_dry_run_notes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "a" * 80)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ["train", str(QUICKSTART), f"run_dir={tmp_path / 'runs' / 'run'}", "ray.address=local"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "RAY_TMPDIR" in line
    assert not list(tmp_path.iterdir())
    assert main([*words, "--dry-run"]) == 0
    assert "could not start on this machine: RAY_TMPDIR" in capsys.readouterr().out


def test_own_ray_gets_nothing_of_a_cluster_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {
        "RAY_ADDRESS": "10.0.0.1:6379",
        "RAY_USE_TLS": "1",
        "RAY_REDIS_ADDRESS": "10.0.0.1:6379",
        "RAY_TMPDIR": "",
        "TMPDIR": "",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")
    prepare("local")
    assert not given.keys() & os.environ.keys()
    assert own_ray.temp_folder() == "/tmp"


def local_config(*overrides: str, start_s: float = 30.0) -> Config:
    config = knobs.load(QUICKSTART, ["ray.address=local", *overrides])
    return replace(config, deadlines=DeadlinesConfig(start_s=start_s))


@pytest.mark.parametrize("hangs", [False, True])
def test_failed_start_of_ray_is_wrong_input_and_leaves_no_process(
    hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[psutil.Process] = []

    def connect(_: Config) -> str:
        started.append(psutil.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        if hangs:
            time.sleep(1.0)
            return ""
        raise ValueError("Ray can't start on this machine: no reason; no remedy")

    monkeypatch.setattr(connection, "connect", connect)
    monkeypatch.setattr(connection, "disconnect", lambda: None)
    monkeypatch.setattr(connection, "STOP_S", 0.2)

    async def main() -> None:
        ray = RayConnection(local_config(start_s=0.3 if hangs else 30.0))
        why = "not within 0.3 s; if this machine is slow" if hangs else "no reason; no remedy"
        with pytest.raises(ValueError, match=f"Ray can't start on this machine: {why}"):
            await ray.open()
        await ray.close()

    asyncio.run(main())
    assert not started[0].is_running() or started[0].status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("network.interface=ib7", "network.interface (ib7) is no interface with an address on "),
        (
            "network.ports=24000-24009",
            "network.ports (24000-24009) has 10 ports, this run with its own Ray needs 47: 31 for "
            "Ray in the first two thirds, 3 for the run in the last third; set 24000-24046 or a "
            "larger range",
        ),
    ],
)
def test_network_that_this_machine_lacks_is_named_in_one_line(
    override: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    (told,) = own_ray.faults(local_config(override))
    assert told.startswith(line)


def test_nothing_is_collected_while_ray_shuts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle that is dropped in that moment ends the process with exit code 1."""
    seen: list[bool] = []
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(connect, "ray_listens", lambda: True)
    monkeypatch.setattr("ray.shutdown", lambda: seen.append(gc.isenabled()))
    connect.disconnect()
    assert (seen, gc.isenabled()) == ([False], True)
