"""The supervisor of an SGLang server: it ends the server when its owner closes it or dies.

Shells take the place of servers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from dapo_async.rollout.sglang import supervisor

SECRET = "0123456789abcdef"
OWNER = """
import pathlib, sys, time
sys.path.insert(0, {tests!r})
import test_supervisor
supervised = test_supervisor.supervise(pathlib.Path({folder!r}), {script!r})
time.sleep(100)
"""


def supervise(folder: Path, script: str) -> subprocess.Popen[bytes]:
    """A supervisor whose server is a shell; the flags that the supervisor adds are its $@."""
    order = {
        "command": ["bash", "-c", script, "server"],
        "environment": {"MARK": "yes"},
        "secret": SECRET,
        "log": str(folder / "log"),
    }
    process = subprocess.Popen(
        [sys.executable, "-I", supervisor.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(order).encode() + b"\n")
    process.stdin.flush()
    process.wait(60)
    return process


def release(supervised: subprocess.Popen[bytes]) -> None:
    assert supervised.stdin is not None
    supervised.stdin.close()


def output_of(supervised: subprocess.Popen[bytes]) -> bytes:
    """All that the supervisor writes until it ends."""
    assert supervised.stdout is not None
    return supervised.stdout.read()


def wait_for(folder: Path, name: str) -> str:
    deadline_s = time.monotonic() + 60.0
    while not (folder / name).exists() or not (folder / name).read_text().endswith("\n"):
        assert time.monotonic() < deadline_s, f"no {name} after 60 s"
        time.sleep(0.01)
    return (folder / name).read_text()


def assert_gone(pids: list[int]) -> None:
    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(processes, timeout=30.0)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_server_and_its_children_end_when_the_owner_closes_it(tmp_path: Path) -> None:
    supervised = supervise(tmp_path, f"sleep 100 & echo $$ $! > {tmp_path}/pids; wait")
    pids = [int(pid) for pid in wait_for(tmp_path, "pids").split()]
    release(supervised)
    assert output_of(supervised) == b"-9\n"
    assert_gone(pids)


def test_server_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    script = f"sleep 100 & echo $$ $! > {tmp_path}/pids; wait"
    program = OWNER.format(tests=str(Path(__file__).parent), folder=str(tmp_path), script=script)
    owner = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    pids = [int(pid) for pid in wait_for(tmp_path, "pids").split()]
    supervisor_pid = psutil.Process(pids[0]).ppid()
    parent = psutil.Process(supervisor_pid).ppid()
    assert owner.pid not in (supervisor_pid, parent), "Ray kills the children of its workers"
    owner.send_signal(signal.SIGKILL)
    owner.wait(60)
    assert_gone([*pids, supervisor_pid])


def test_exit_code_of_the_server_is_reported_and_its_children_are_killed(tmp_path: Path) -> None:
    supervised = supervise(tmp_path, f"sleep 100 & echo $! > {tmp_path}/pids; exit 7")
    assert output_of(supervised) == b"7\n"
    assert_gone([int(wait_for(tmp_path, "pids"))])


def test_secret_is_in_a_private_file_and_nowhere_else(tmp_path: Path) -> None:
    show_flags = f'echo "$@" > {tmp_path}/flags; stat -c %a $2; cat $2; echo; echo $MARK'
    show_command_line = 'sleep 0.2; tr "\\0" " " < /proc/$$/cmdline; echo'
    supervised = supervise(tmp_path, f"{show_flags}; {show_command_line}")
    assert output_of(supervised) == b"0\n"
    flag, file = wait_for(tmp_path, "flags").split()
    assert flag == "--config"
    assert not os.path.exists(file), "the file is removed with the server"
    log = (tmp_path / "log").read_text()
    assert log.startswith('600\n{"api-key": "***"}\nyes\n'), log
    assert SECRET not in log


def test_server_ends_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    supervised = supervise(tmp_path, f"echo $$ > {tmp_path}/pids; sleep 100")
    server = int(wait_for(tmp_path, "pids"))
    psutil.Process(psutil.Process(server).ppid()).kill()
    assert output_of(supervised) == b""
    assert_gone([server])
