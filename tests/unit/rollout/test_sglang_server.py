"""What a client says of its server's end. Python's HTTP server takes the place of SGLang."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dapo_async.rollout.engine import EngineFault
from dapo_async.rollout.sglang.client import SGLangClient
from dapo_async.rollout.sglang.server import ServerOptions, SGLangServer

SCRIPT = """
import http.server, os, sys
os.chdir(sys.argv[2])
print("pid", os.getpid(), flush=True)
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="127.0.0.1")
"""


@dataclass(frozen=True, slots=True)
class FileServer(ServerOptions):
    """A server of the files in its model's folder."""

    def command(self, port: int, group_port: int) -> list[str]:
        return [sys.executable, "-c", SCRIPT, str(port), str(self.model)]


async def fault_of_killed_server(options: ServerOptions) -> str:
    server = SGLangServer(options)
    await server.start(timeout_s=60.0)
    client = SGLangClient(server.url, api_key=server.api_key, why_ended=server.why_ended)
    try:
        with pytest.raises(EngineFault, match="answers /model_info with 404") as refused:
            await client.weight_version()
        assert "it ended" not in str(refused.value)
        log = options.log.read_text()
        os.kill(int(log.split("pid ")[1].split()[0]), signal.SIGKILL)
        faults = await asyncio.gather(
            *(client.weight_version() for _ in range(3)), return_exceptions=True
        )
        assert all(isinstance(fault, EngineFault) for fault in faults)
        assert len({*map(str, faults)}) == 1
        return str(faults[0])
    finally:
        await client.close()
        await server.close()


def test_fault_names_the_exit_code_and_the_end_of_the_log_of_a_server_that_ended(
    tmp_path: Path,
) -> None:
    (tmp_path / "health").touch()
    options = FileServer(
        model=tmp_path,
        dtype="float32",
        device="cpu",
        tensor_parallel=1,
        num_slots=1,
        max_len=8,
        host="127.0.0.1",
        seed=0,
        log=tmp_path / "server.log",
    )
    line = asyncio.run(fault_of_killed_server(options))
    assert "failed to answer /model_info: " in line
    assert f"; it ended with code -9, {tmp_path / 'server.log'} ends with: " in line
    assert "404" in line.split("ends with: ")[1]
