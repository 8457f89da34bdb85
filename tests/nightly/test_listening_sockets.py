"""Every socket that listens during a whole run is on loopback, at its part of `network.ports`, and
lets nobody in."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import grpc
import psutil
import pytest
from paths import QUICKSTART
from run_support import MARKER, TINY, Live, check_conservation
from sglang_run_support import SERVERS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
LOOPBACK = "127.0.0.1"
PORTS = range(23_000, 23_300)  # of which Ray has the first two thirds, and the run the rest
OF_RAY, OF_RUN = range(23_000, 23_200), range(23_200, 23_300)
SECONDS = 3.0
METRICS = b"200 OK"  # the one endpoint that everybody on this machine may read
# Calls of Ray's services that would give something away, by the process that has them.
RAY_CALLS = {
    "gcs_server": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "raylet/raylet": "/ray.rpc.NodeManagerService/GetNodeStats",
    "ray::": "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
}
Listening = dict[tuple[str, int], str]  # command line by address


def listening(live: Live) -> Listening:
    """All TCP sockets of the run that listen now."""
    found = {}
    for pid, line in live.processes().items():
        try:
            connections = psutil.Process(pid).net_connections("tcp")
        except psutil.Error:
            continue  # it has ended
        for each in connections:
            if each.status == psutil.CONN_LISTEN:
                found[each.laddr.ip.removeprefix("::ffff:"), each.laddr.port] = line
    return found


def knock(port: int, words: bytes) -> bytes:
    """The first bytes of the answer."""
    with socket.create_connection((LOOPBACK, port), timeout=SECONDS) as connection:
        connection.sendall(words)
        try:
            return connection.recv(400)
        except (TimeoutError, ConnectionError):
            return b""


def call_without_token(port: int, method: str) -> grpc.StatusCode:
    with grpc.insecure_channel(f"{LOOPBACK}:{port}") as channel:
        call = channel.unary_unary(method, lambda sent: sent, lambda got: got)
        try:
            call(b"", timeout=SECONDS)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def check_closed(found: Listening) -> int:
    """Knocks on each socket as somebody without the run's secrets; returns how many spoke gRPC."""
    num_grpc, readable = 0, []
    for (_, port), line in found.items():
        answer = knock(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        if not answer.startswith(b"HTTP/"):
            knock(port, b"\xff" * 64)  # the run must survive it
            for title, method in RAY_CALLS.items():
                if title in line and answer:
                    code = call_without_token(port, method)
                    # A port without this service does not tell whether it asks for the token.
                    refused = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)
                    assert code in refused, f"{line} answers {method} without a token: {code}"
                    num_grpc += code is grpc.StatusCode.UNAUTHENTICATED
        elif METRICS in answer.splitlines()[0]:
            readable.append(line)
        else:
            assert answer.split()[1] in (b"401", b"403", b"404"), f"{line} answers {answer!r}"
        if "sglang" in line:
            words = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
            answer = knock(port, words)
            assert not answer.startswith(b"HTTP/1.1 2"), f"{line} generates without a key"
    assert all("DashboardAgent" in line for line in readable), readable
    return num_grpc


def check_ports(found: Listening) -> None:
    """gloo alone has ports that the kernel chose."""
    for (_, port), line in found.items():
        if any(service in line for service in ("gcs_server", "raylet", "Agent")):
            assert port in OF_RAY, f"{line} listens at {port}"
    for part, who in ((OF_RAY, "Actor"), (OF_RUN, "LearnerActor")):
        assert {port for (_, port), line in found.items() if who in line} & {*part}, who
    of_run = {port: line for (_, port), line in found.items() if port in OF_RUN}
    assert all("LearnerActor" in line or "sglang" in line for line in of_run.values()), of_run
    of_servers = [line for line in found.values() if "sglang" in line]
    assert not of_servers or any("sglang" in line for line in of_run.values()), of_run


@pytest.mark.parametrize("engine", ["torch", pytest.param("sglang", marks=pytest.mark.sglang)])
def test_sockets_of_a_run_are_on_loopback_and_take_nobody(tmp_path: Path, engine: str) -> None:
    root = tmp_path / "run"
    settings = [*TINY, "learner.data_parallel=2", "train.num_steps=5000"]
    settings += [f"network.ports={PORTS.start}-{PORTS.stop - 1}"]
    settings += [*SERVERS, "deadlines.start_s=600"] if engine == "sglang" else []
    live = Live(root, [str(QUICKSTART), *settings, "model.num_cpus=0.5", f"run_dir={root}"])
    seen: Listening = {}
    try:
        while "\nstep   2/" not in live.output:
            seen |= listening(live)
            assert psutil.pid_exists(live.driver), live.output
        num_grpc = check_closed(listening(live))
        secrets = secrets_of(live)
        for line in live.processes().values():
            assert not [each for each in secrets if each in line], "a secret in a process list"
        step = live.wait_for(r"[\s\S]*^step +(\d+)/").group(1)
        live.wait_for(rf"^step +{int(step) + 3}/")  # nobody who knocked has done any harm
        seen |= listening(live)
        psutil.Process(live.driver).terminate()
        run = live.finish(timeout_s=90.0)
    finally:
        live.destroy()
    assert run.exit_code == 143, run.output
    check_conservation(run.summary["groups"])
    open_ones = {place: line for place, line in seen.items() if place[0] != LOOPBACK}
    assert not open_ones, f"sockets on other interfaces: {open_ones}"
    check_ports(seen)
    names = " ".join(seen.values())
    for expected in ("gcs_server", "raylet", "LearnerActor", "RolloutActor", "DashboardAgent"):
        assert expected in names, f"nothing of {expected} listens: {names}"
    assert num_grpc >= 3, "no service of Ray has asked for the token"
    assert secrets, "no token was found in the environment of Ray's processes"
    grep = ["grep", "-rlF", *(word for each in secrets for word in ("-e", each)), str(root)]
    leaks = subprocess.run(grep, capture_output=True, text=True, check=False).stdout
    assert not leaks, f"secrets in files of the run: {leaks}"


def secrets_of(live: Live) -> set[str]:
    """The values of the tokens and keys in the environments of the run's processes."""
    found = set()
    for pid in live.processes():
        try:
            variables = psutil.Process(pid).environ()
        except psutil.Error:
            continue
        found |= {
            value
            for name, value in variables.items()
            if name != MARKER and ("TOKEN" in name or "API_KEY" in name) and len(value) >= 32
        }
    return found
