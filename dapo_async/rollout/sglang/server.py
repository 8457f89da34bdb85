"""Starts and stops the SGLang server of one engine.

In: the model folder and sizes. Out: a URL and an API key for `client.py`. Called by the rollout
actor. SGLang is a process with an HTTP API; it is never imported.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dapo_async.rollout.engine import EngineFault
from dapo_async.rollout.sglang import supervisor
from dapo_async.rollout.sglang.client import POLL_S, SGLangClient
from dapo_async.utils.network import ANY_PORT, free_ports, join, socket_variables
from dapo_async.utils.readable import is_readable

# Tokens per streamed chunk. A lost server loses at most one chunk of each response; each chunk
# costs time.
STREAM_TOKENS = 8
FP32_HEAD = "--enable-fp32-lm-head"
PORT_ATTEMPTS = 3  # a free port may be taken before the server listens on it
CLOSE_S = 10.0
ENDING_S = 2.0  # from the first broken connection to the exit code
LOG_TAIL_LINES = 3
# Beside the engine's slots, so that the handshake's probe never waits for a response to end.
DUMP_VARIABLE = "SGLANG_CUDA_COREDUMP_BEFORE_CRASH"
SPARE_SLOTS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The settings of one server."""

    model: Path
    dtype: str
    device: Literal["cpu", "cuda"]
    tensor_parallel: int  # GPUs that share one copy of the model
    num_slots: int  # requests that run at once, at most
    max_len: int  # tokens of one sequence, prompt and response
    host: str  # the address that it listens on
    ports: range = ANY_PORT  # that it may listen on
    seed: int
    log: Path
    kv_sequences: int | None = None  # on a CPU: longest sequences with memory; None: num_slots
    overlap: bool = True  # on CUDA: launch a decode step before the last step's tokens are handled
    sleeps: bool = False  # on CUDA: it can release its memory, and keeps its weights meanwhile
    returns_experts: bool = False  # of every token, for routing replay
    extra: tuple[str, ...] = ()  # further flags, which override the flags above

    def command(self, port: int, group_port: int) -> list[str]:
        """The command line. The server needs no tokenizer: token ids go in and come out.

        `port`: for requests. `group_port`: of the rendezvous of its own ranks.
        """
        flags: dict[str, object] = {
            "model-path": self.model,
            "host": self.host,
            "port": port,
            "nccl-port": group_port,
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
            sequences = (self.kv_sequences or self.num_slots) + SPARE_SLOTS
            flags |= {"device": "cpu", "max-total-tokens": sequences * (self.max_len + 1)}
            switches.append("--sleep-on-idle")  # an idle server would keep one core busy
        elif self.sleeps:  # on a CPU there is no memory saver
            switches += ["--enable-memory-saver", "--enable-weights-cpu-backup"]
        if self.dtype != "float32":
            switches.append(FP32_HEAD)  # as the learner, which sums its logits in float32
        if self.returns_experts:
            switches.append("--enable-return-routed-experts")
        if self.device == "cpu" or not self.overlap:
            switches.append("--disable-overlap-schedule")
        options = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", "sglang.launch_server", *options, *switches, *self.extra]

    def environment(self) -> dict[str, str]:
        """Environment variables: the network interface, and on a CPU the cores of the ranks.

        A server that has crashed ends at once: by default it waits a minute for a dump of its GPU.
        """
        wait = os.environ.get(DUMP_VARIABLE, "0")
        variables = {**socket_variables(self.host), DUMP_VARIABLE: wait}
        if self.device != "cpu":
            return variables
        variables |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
        if self.tensor_parallel > 1:  # without a binding SGLang wants a NUMA node for each rank
            cores = sorted(os.sched_getaffinity(0))
            bound = [str(cores[rank % len(cores)]) for rank in range(self.tensor_parallel)]
            variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(bound)
        return variables


def missing_sglang() -> str | None:
    """Why no server can be started here, with the remedy; None where a server can be started."""
    if importlib.util.find_spec("sglang") is not None:
        return None
    return (
        "rollout.engine=sglang needs SGLang, which is not installed; on a GPU machine run "
        "pip install -c constraints.txt 'dapo-async[sglang]', on a CPU machine run "
        "bash cluster/sglang_cpu/install.sh, or name running servers in rollout.servers"
    )


class SGLangServer:
    """One server process under a supervisor. After `start`, use `url` and `api_key`."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._exit_code: int | None = None
        self._reading = threading.Lock()  # several threads may wait for the exit code
        self._log_start = 0  # bytes: servers before this one wrote into the same log
        self.api_key = secrets.token_hex(32)
        self.url = ""

    async def start(self, *, timeout_s: float) -> None:
        """Returns when the server answers.

        Raises EngineFault with the end of its log when it ends instead, TimeoutError when it does
        neither within `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        for attempt in range(PORT_ATTEMPTS):
            self._exit_code = None
            port, group_port = free_ports(self.options.host, self.options.ports, count=2)
            self._launch(port, group_port)
            self.url = f"http://{join(self.options.host, port)}"
            try:
                return await self._wait_until_healthy(deadline_s, timeout_s)
            except EngineFault:
                port_taken = any("address already in use" in line for line in self._log_lines())
                if not port_taken or attempt == PORT_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _launch(self, port: int, group_port: int) -> None:
        options = self.options
        options.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = options.log.stat().st_size if options.log.exists() else 0
        order = {
            "command": options.command(port, group_port),
            "environment": options.environment(),
            "secret": self.api_key,
            "log": str(options.log),
        }
        # In a session of its own: a signal to the actor's process group must not reach it.
        self._supervisor = subprocess.Popen(
            [sys.executable, "-I", supervisor.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.write(json.dumps(order).encode() + b"\n")
        self._supervisor.stdin.flush()
        self._supervisor.wait()  # it forks; the process that goes on is no child of this one

    async def _wait_until_healthy(self, deadline_s: float, timeout_s: float) -> None:
        client = SGLangClient(self.url, api_key=self.api_key)
        try:
            while time.monotonic() < deadline_s:
                if (code := self.exit_code) is not None:
                    raise EngineFault(
                        f"the SGLang server ended with code {code} while it started; "
                        f"{self._log_tail()}"
                    )
                if await client.healthy():
                    return
                await asyncio.sleep(POLL_S)
        finally:
            await client.close()
        await self.close()
        raise TimeoutError(
            f"waited {timeout_s:g} s for the SGLang server to answer; {self._log_tail()}"
        )

    @property
    def exit_code(self) -> int | None:
        """None while the server runs."""
        return self._read_exit_code(wait_s=0.0)

    async def why_ended(self) -> str:
        """The end of a message about a broken connection; empty while the server runs."""
        code = await asyncio.to_thread(self._read_exit_code, wait_s=ENDING_S)
        return "" if code is None else f"; it ended with code {code}, {self._log_tail()}"

    def _read_exit_code(self, *, wait_s: float) -> int | None:
        assert self._supervisor is not None, "a server's exit code before its start"
        output = self._supervisor.stdout
        assert output is not None
        with self._reading:
            if self._exit_code is None and is_readable(output.fileno(), wait_s):
                # Nothing to read: somebody killed the supervisor, and so the server.
                self._exit_code = int(output.readline() or -signal.SIGKILL)
            return self._exit_code

    async def close(self) -> None:
        """Ends the server and everything that it started; returns when all of it is gone."""
        if self._supervisor is None:
            return
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()
        if await asyncio.to_thread(self._read_exit_code, wait_s=CLOSE_S) is None:
            raise TimeoutError(f"waited {CLOSE_S:g} s for the SGLang server at {self.url} to end")

    def _log_tail(self) -> str:
        lines = self._log_lines()[-LOG_TAIL_LINES:]
        return f"{self.options.log} ends with: {' | '.join(lines)}"

    def _log_lines(self) -> list[str]:
        """All lines of the log since this launch: the reason may stand long before the end."""
        if not self.options.log.exists():
            return []
        output = self.options.log.read_bytes()[self._log_start :]
        return output.decode(errors="replace").strip().splitlines()
