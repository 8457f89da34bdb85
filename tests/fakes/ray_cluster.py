"""Ray clusters of several nodes on this machine, started by `ray start`."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
from paths import ROOT
from run_support import COMMAND, MARKER, processes_of

from dapo_async.runtime.cluster.environment import RUNS
from dapo_async.utils.network import join, split

RAY = str(Path(sys.executable).with_name("ray"))
NODES = ("127.0.0.2", "127.0.0.3")  # each node has an interface of its own, as on two machines


def free_port(host: str) -> str:
    with socket.socket() as free:
        free.bind((host, 0))
        return str(free.getsockname()[1])


def wait_until(done: Callable[[], Any], *, timeout_s: float, what: str) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (value := done()):
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)
    return value


@dataclass(frozen=True, slots=True)
class Cluster:
    """Its nodes, started by `ray start`; every command needs `environment`."""

    folder: Path
    address: str
    dashboard: str
    environment: dict[str, str]
    num_cpus: int  # of each node
    # The words before a command that has to run on the host with this address.
    inside: Callable[[str], Sequence[str]] = lambda _: ()

    @property
    def head(self) -> str:
        """The address of the head's host."""
        return split(self.address)[0]

    def start_node(self, *arguments: str, ip: str) -> subprocess.Popen[bytes]:
        node = (
            "--node-ip-address",
            ip,
            "--num-cpus",
            str(self.num_cpus),
            "--memory",
            str(2 * 10**9),
            "--object-store-memory",
            str(10**8),
            "--disable-usage-stats",
            # Ray's default is one port per machine. The node that loses it takes no jobs.
            "--dashboard-agent-listen-port",
            free_port("127.0.0.1"),
        )
        with (self.folder / f"{ip}.log").open("w") as log:
            return subprocess.Popen(
                [*self.inside(ip), RAY, "start", "--block", *node, *arguments],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def job(
        self, command: str, *arguments: str, timeout_s: float = 90.0
    ) -> subprocess.CompletedProcess[str]:
        """`ray job COMMAND` in the repository."""
        words = (RAY, "job", command, "--address", self.dashboard, *arguments)
        line = [*self.inside(self.head), *words]
        return subprocess.run(
            line,
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def submit(
        self, name: str, *command: str, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Runs `command` as the job `name` in Ray's copy of the repository."""
        return self.job(
            "submit", "--submission-id", name, "--working-dir", ".", *options, "--", *command
        )

    def run(self, *words: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        """`dapo-async WORDS` in the repository, as a user of the cluster."""
        return subprocess.run(
            [*self.inside(self.head), COMMAND, *words],
            env=self.environment | {"RAY_API_SERVER_ADDRESS": self.dashboard},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def kill(self) -> None:
        """Kills every process of every node and job at once, as a power failure does."""
        wait_until(self._killed, timeout_s=30.0, what="the end of all processes")

    def _killed(self) -> bool:
        left = processes_of(self.environment[MARKER], session=-1)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    @property
    def runs(self) -> Path:
        """The folder of all runs, as the cluster's nodes know it."""
        return Path(self.environment[RUNS])


def wait_for_node(folder: Path, ip: str) -> None:
    log = folder / f"{ip}.log"
    wait_until(
        lambda: "Ray runtime started" in log.read_text(), timeout_s=300.0, what=f"the node {ip}"
    )


@contextmanager
def started_cluster(
    *,
    ips: Sequence[str] = NODES,
    num_cpus: int = 2,
    runs: Path | None = None,
    inside: Callable[[str], Sequence[str]] = lambda _: (),
    flags: Mapping[str, Sequence[str]] = MappingProxyType({}),
    port: str | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Cluster]:
    """A node at each of `ips`, the head first. `runs`: a folder that outlives the cluster.

    `inside`: see `Cluster`. `flags`: further flags of `ray start`, by address. `port`: of the GCS.
    `variables`: of every process.
    """
    folder = Path(
        tempfile.mkdtemp(prefix="dapo-", dir="/tmp")
    )  # short: a Unix socket's path has at most 107 characters
    mark, (head, *others) = uuid.uuid4().hex, ips
    port, dashboard = port or free_port("127.0.0.1"), free_port("127.0.0.1")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    } | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        MARKER: mark,
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
        "RAY_metrics_report_interval_ms": "1000",  # else gauges are exported every 10 s
        RUNS: str(runs or folder / "runs"),
        **variables,
    }
    address, url = join(head, port), f"http://127.0.0.1:{dashboard}"
    started = Cluster(folder, address, url, environment, num_cpus, inside)
    ports = (
        "--port",
        port,
        "--dashboard-host",
        "127.0.0.1",
        "--dashboard-port",
        dashboard,
        "--ray-client-server-port",
        free_port("127.0.0.1"),
    )
    of_head = ("--head", *ports, "--temp-dir", str(folder / "ray"), *flags.get(head, ()))
    nodes = [started.start_node(*of_head, ip=head)]
    try:
        wait_for_node(folder, head)
        for ip in others:
            nodes.append(started.start_node("--address", address, *flags.get(ip, ()), ip=ip))
            wait_for_node(folder, ip)
        # The nodes are up before their agents take jobs.
        deadline_s = time.monotonic() + 120.0
        while (first := started.job("submit", "--", "true")).returncode != 0:
            assert time.monotonic() < deadline_s, f"no job starts within 120 s: {first.stdout}"
        yield started
    finally:
        for node in reversed(nodes):
            node.terminate()  # it ends its own processes, in order
        for node in nodes:
            with suppress(subprocess.TimeoutExpired):  # on a busy machine
                node.wait(30.0)
            for pid in processes_of(mark, session=node.pid):
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).kill()
        shutil.rmtree(folder, ignore_errors=True)
