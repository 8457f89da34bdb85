"""The leash of an engine's server: who lets go of it, or dies, takes the server and everything of its session along. With shells for servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dapo_async.rollout.sglang import supervisor as leash
from dapo_async.rollout.sglang.server import interface_of

SECRET = "0123456789abcdef"


def hold(folder: Path, script: str) -> subprocess.Popen[bytes]:
    """A leash with a shell as the server, which gets the leash's own flags as $@."""
    order = {
        "command": ["bash", "-c", script, "server"],
        "environment": {"MARK": "yes"},
        "secret": SECRET,
        "log": str(folder / "log"),
    }
    process = subprocess.Popen(
        [sys.executable, "-I", leash.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    process.stdin.write(json.dumps(order).encode() + b"\n")
    process.stdin.flush()
    process.wait(10)
    return process


def wait_for(folder: Path, name: str) -> str:
    deadline_s = time.monotonic() + 10.0
    while not (folder / name).exists() or not (folder / name).read_text().endswith("\n"):
        assert time.monotonic() < deadline_s, f"no {name} after 10 s"
        time.sleep(0.01)
    return (folder / name).read_text()


def assert_gone(pids: list[int]) -> None:
    _, alive = psutil.wait_procs(
        [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5.0
    )
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_server_and_what_it_started_end_when_they_are_let_go(tmp_path: Path) -> None:
    held = hold(tmp_path, f"sleep 100 & echo $$ $! > {tmp_path}/pids; wait")
    pids = [int(pid) for pid in wait_for(tmp_path, "pids").split()]
    held.stdin.close()
    assert held.stdout.read() == b"-9\n"
    assert_gone(pids)


def test_server_ends_with_whoever_held_it(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}; import test_supervisor, pathlib, time; "
        f"held = test_supervisor.hold(pathlib.Path({str(tmp_path)!r}), 'sleep 100 & echo $$ $! > {tmp_path}/pids; wait'); time.sleep(100)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    pids = [int(pid) for pid in wait_for(tmp_path, "pids").split()]
    leashes = [psutil.Process(pids[0]).ppid()]
    assert leashes[0] != holder.pid, (
        "a child of its holder would be killed before the server, by Ray"
    )
    holder.send_signal(signal.SIGKILL)
    holder.wait(10)
    assert_gone(pids + leashes)


def test_end_of_the_server_is_told_with_its_code_and_leaves_nothing(tmp_path: Path) -> None:
    held = hold(tmp_path, f"sleep 100 & echo $! > {tmp_path}/pids; exit 7")
    assert held.stdout.read() == b"7\n"
    assert_gone([int(wait_for(tmp_path, "pids"))])


def test_secret_is_in_a_private_file_for_the_server_and_nowhere_else(tmp_path: Path) -> None:
    held = hold(
        tmp_path,
        f'echo "$@" > {tmp_path}/flags; stat -c %a $2; cat $2; echo; echo $MARK; sleep 0.2; tr "\\0" " " < /proc/$$/cmdline; echo',
    )
    assert held.stdout.read() == b"0\n"
    flag, file = wait_for(tmp_path, "flags").split()
    assert flag == "--config"
    assert not os.path.exists(file), "the file goes with the server"
    log = (tmp_path / "log").read_text()
    assert log.startswith('600\n{"api-key": "***"}\nyes\n'), log
    assert SECRET not in log


@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "lo"), ("192.0.2.254", None)])
def test_interface_is_found_by_its_address(host, name) -> None:
    assert interface_of(host) == name


def test_server_ends_with_its_leash(tmp_path: Path) -> None:
    held = hold(tmp_path, f"echo $$ > {tmp_path}/pids; sleep 100")
    server = int(wait_for(tmp_path, "pids"))
    psutil.Process(psutil.Process(server).ppid()).kill()
    assert held.stdout.read() == b""
    assert_gone([server])
