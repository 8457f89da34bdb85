"""The SGLang server of one engine: its command line, its start, its end (L2). SGLang is never imported: it is a process with an HTTP API.

In: the model folder and sizes. Out: a URL and a key. Called by the rollout actor, which talks to it through `sglang_client.py`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from dapo_async.rollout.engine import EngineFault
from dapo_async.rollout.sglang import supervisor as leash
from dapo_async.rollout.sglang.client import POLL_S, SGLangClient

STREAM_TOKENS = 8  # tokens per streamed chunk: what a lost server can lose of each response, against the cost of a chunk
PORT_ATTEMPTS = 3  # a free port may be taken before the server listens on it
CLOSE_S = 10.0
LOG_TAIL_LINES = 3
SPARE_SLOTS = (
    1  # beside the engine's slots: the handshake's probe never waits for a response to end
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What one server is started with."""

    model: Path
    dtype: str
    device: Literal["cpu", "cuda"]
    tensor_parallel: int  # GPUs that share one copy of the model
    num_slots: int
    max_len: int  # tokens of one sequence, prompt and response
    host: str  # the interface that it listens on
    seed: int
    log: Path
    overlap: bool = (
        True  # on CUDA: the next decode step is launched before the last one's tokens are booked
    )
    extra: tuple[str, ...] = ()  # further flags, which win over these

    def command(self, port: int) -> list[str]:
        """What starts it. It needs no tokenizer: ids go in and come out."""
        flags: dict[str, object] = {
            "model-path": self.model,
            "host": self.host,
            "port": port,
            "dtype": self.dtype,
            "tensor-parallel-size": self.tensor_parallel,
            "max-running-requests": self.num_slots + SPARE_SLOTS,
            "random-seed": self.seed,
            "stream-interval": STREAM_TOKENS,
            "log-level-http": "warning",
        }
        switches = [
            "--skip-server-warmup",
            "--skip-tokenizer-init",
            "--incremental-streaming-output",
        ]
        if self.device == "cpu":
            flags |= {
                "device": "cpu",
                "max-total-tokens": (self.num_slots + SPARE_SLOTS) * (self.max_len + 1),
            }
            switches.append("--sleep-on-idle")  # an idle server would keep one core busy
        if self.device == "cpu" or not self.overlap:
            switches.append("--disable-overlap-schedule")
        options = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", "sglang.launch_server", *options, *switches, *self.extra]

    def environment(self) -> dict[str, str]:
        """What it needs beside its flags: the network interface, and on a CPU the cores of its ranks."""
        interface = interface_of(self.host)
        network = (
            {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
        )
        if self.device != "cpu":
            return network
        cores = sorted(os.sched_getaffinity(0))
        binding = "|".join(str(cores[rank % len(cores)]) for rank in range(self.tensor_parallel))
        bound = (
            {"SGLANG_CPU_OMP_THREADS_BIND": binding} if self.tensor_parallel > 1 else {}
        )  # else it wants a NUMA node for each rank
        return network | bound | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}


def interface_of(host: str) -> str | None:
    """The name of the network interface that has the address `host`: torch's process groups are told by name where to listen."""
    return next(
        (
            name
            for name, addresses in psutil.net_if_addrs().items()
            for each in addresses
            if each.address == host
        ),
        None,
    )


def sglang_lack() -> str | None:
    """Why no server can be started here, with the remedy; None where one can."""
    if importlib.util.find_spec("sglang") is not None:
        return None
    return (
        "rollout.engine=sglang needs SGLang, which is not installed; pip install 'dapo-async[sglang]' on a GPU machine, run "
        "cluster/sglang_cpu/install.sh on a CPU machine, or name running servers in rollout.servers"
    )


class SGLangServer:
    """One server process on a leash. `start`, then `url` and `api_key` are its own; `close` ends it."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._leash: subprocess.Popen[bytes] | None = None
        self._exit_code: int | None = None
        self._log_begins = 0  # bytes; lives before this one wrote into the same log
        self.api_key = secrets.token_hex(32)
        self.url = ""

    async def start(self, *, timeout_s: float) -> None:
        """Returns when it answers. Raises EngineFault with the end of its log when it ends instead, TimeoutError when it does neither."""
        deadline_s = time.monotonic() + timeout_s
        for attempt in range(PORT_ATTEMPTS):
            self._exit_code = None
            port = free_port(self.options.host)
            self._launch(port)
            self.url = f"http://{self.options.host}:{port}"
            try:
                return await self._wait_until_healthy(deadline_s, timeout_s)
            except EngineFault:
                if (
                    not any("address already in use" in line for line in self._said())
                    or attempt == PORT_ATTEMPTS - 1
                ):
                    raise
        raise AssertionError("unreachable")

    def _launch(self, port: int) -> None:
        options = self.options
        options.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_begins = options.log.stat().st_size if options.log.exists() else 0
        order = {
            "command": options.command(port),
            "environment": options.environment(),
            "secret": self.api_key,
            "log": str(options.log),
        }
        # A session of its own: what ends the actor's process group must not end the leash before the server.
        self._leash = subprocess.Popen(
            [sys.executable, "-I", leash.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._leash.stdin is not None
        self._leash.stdin.write(json.dumps(order).encode() + b"\n")
        self._leash.stdin.flush()
        self._leash.wait()  # what goes on is nobody's child

    async def _wait_until_healthy(self, deadline_s: float, timeout_s: float) -> None:
        client = SGLangClient(self.url, api_key=self.api_key)
        try:
            while time.monotonic() < deadline_s:
                if (code := self.exit_code) is not None:
                    raise EngineFault(
                        f"the SGLang server ended with code {code} while it started; {self.options.log} ends with: {self._log_tail()}"
                    )
                if await client.healthy():
                    return
                await asyncio.sleep(POLL_S)
        finally:
            await client.close()
        await self.close()
        raise TimeoutError(
            f"waited {timeout_s:g} s for the SGLang server to answer; {self.options.log} ends with: {self._log_tail()}"
        )

    @property
    def exit_code(self) -> int | None:
        """None while it lives."""
        return self._read_exit_code(wait_s=0.0)

    def _read_exit_code(self, *, wait_s: float) -> int | None:
        assert self._leash is not None, "a server's exit code before its start"
        assert self._leash.stdout is not None
        if self._exit_code is None and select.select([self._leash.stdout], [], [], wait_s)[0]:
            self._exit_code = int(
                self._leash.stdout.readline() or -signal.SIGKILL
            )  # nothing: somebody killed the leash
        return self._exit_code

    async def close(self) -> None:
        """Ends the server and everything that it started; returns when all is gone."""
        if self._leash is None:
            return
        assert self._leash.stdin is not None
        self._leash.stdin.close()
        if await asyncio.to_thread(self._read_exit_code, wait_s=CLOSE_S) is None:
            raise TimeoutError(f"waited {CLOSE_S:g} s for the SGLang server at {self.url} to end")

    def _log_tail(self) -> str:
        return " | ".join(self._said()[-LOG_TAIL_LINES:])

    def _said(self) -> list[str]:
        """Lines of the log since the server was launched: an end may be told long before its last line."""
        if not self.options.log.exists():
            return []
        return (
            self.options.log.read_bytes()[self._log_begins :]
            .decode(errors="replace")
            .strip()
            .splitlines()
        )


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on just now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
