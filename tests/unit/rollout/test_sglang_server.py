"""The start of a server whose port is taken, and the end of one that is killed.

The stand-in fails as SGLang does: it names the reason long before the end of its log.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tracking_world import free_port

from dapo_async.rollout import EngineFault
from dapo_async.rollout.sglang import server as sglang_server
from dapo_async.rollout.sglang.client import SGLangClient
from dapo_async.rollout.sglang.server import ServerOptions, SGLangServer

STAND_IN = """
import http.server, os, sys

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

http.server.HTTPServer.allow_reuse_address = False
try:
    server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy)
except OSError as error:
    print(f"[Errno 98] error while attempting to bind on address: {error}".lower())
    print("a line of a traceback\\n" * 100)
    sys.exit(3)
print(f"pid {os.getpid()}")
print("the last words", flush=True)
server.serve_forever()
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SGLangServer:
    monkeypatch.setattr(
        ServerOptions, "command", lambda _, port, __: [sys.executable, "-c", STAND_IN, str(port)]
    )
    return SGLangServer(options_at(tmp_path))


def options_at(folder: Path) -> ServerOptions:
    return ServerOptions(
        model=folder,
        dtype="float32",
        device="cpu",
        tensor_parallel=1,
        num_slots=1,
        max_len=8,
        host="127.0.0.1",
        seed=0,
        log=folder / "log",
    )


def started(server: SGLangServer, ports: list[int]) -> str:
    """Starts the server, which tries these ports in turn; returns the URL at which it answers."""

    async def start() -> str:
        try:
            await server.start(timeout_s=30.0)
            return server.url
        finally:
            await server.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sglang_server, "free_ports", lambda *_, count: [ports.pop(0)] * count)
        return asyncio.run(start())


def test_server_whose_port_is_taken_starts_on_another_port(server: SGLangServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken, free = other.getsockname()[1], free_port()
        assert started(server, [taken, free]) == f"http://127.0.0.1:{free}"


def test_log_lines_of_an_earlier_server_cause_no_retry(server: SGLangServer) -> None:
    server.options.log.write_text("address already in use\n")
    with pytest.raises(EngineFault, match="ended with code 1 while it started"):
        started(server, [-1, -1, -1])


def test_server_gets_its_two_ports_and_an_ipv6_address(
    tmp_path: Path,
) -> None:
    options = replace(options_at(tmp_path), host="::1", ports=range(21_000, 21_100))
    words = options.command(21_007, 21_008)
    assert words[words.index("--host") + 1] == "::1"
    assert words[words.index("--port") + 1] == "21007"
    assert words[words.index("--nccl-port") + 1] == "21008"
    assert options.environment()["NCCL_SOCKET_FAMILY"] == "AF_INET6"


def test_server_that_crashed_waits_for_no_dump_unless_the_user_wants_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "SGLANG_CUDA_COREDUMP_BEFORE_CRASH"
    assert options_at(tmp_path).environment()[name] == "0"
    monkeypatch.setenv(name, "1")
    assert options_at(tmp_path).environment()[name] == "1"


def test_server_below_float32_sums_its_logits_in_float32_as_the_learner_does(
    tmp_path: Path,
) -> None:
    flag, options = "--enable-fp32-lm-head", options_at(tmp_path)
    assert flag not in options.command(1, 2)
    assert flag in replace(options, dtype="bfloat16").command(1, 2)


async def faults_of_a_killed_server(server: SGLangServer) -> list[str]:
    """What three calls say that are made when the server has just been killed."""
    await server.start(timeout_s=30.0)
    client = SGLangClient(server.url, api_key=server.api_key, why_ended=server.why_ended)
    try:
        assert await client.healthy()
        (pid,) = re.findall(r"^pid (\d+)$", server.options.log.read_text(), re.M)
        os.kill(int(pid), signal.SIGKILL)
        calls = (client.weight_version() for _ in range(3))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(answer, EngineFault) for answer in answers)
        return [*map(str, answers)]
    finally:
        await client.close()
        await server.close()


def test_faults_name_the_exit_code_and_the_last_words_of_a_server_that_ended(
    server: SGLangServer,
) -> None:
    for line in asyncio.run(faults_of_a_killed_server(server)):
        assert line.startswith(f"{server.url} failed to answer /model_info: ")
        assert "it ended with code -9, " in line
        assert line.endswith("| the last words")
