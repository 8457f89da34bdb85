"""For runs on real SGLang servers: finds a server's processes and harms them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
from paths import CONFIGS
from run_support import Finished, Live, read_rows

CONFIG = CONFIGS / "quickstart_sglang.yaml"
SERVERS = (
    "rollout.engine=sglang",
    "rollout.num_slots=32",
    "model.num_cpus=0.5",
)


def kill(server: psutil.Process) -> None:
    server.kill()


def hang(server: psutil.Process) -> None:
    for process in [server, *server.children(recursive=True)]:
        process.suspend()


def starve(server: psutil.Process) -> None:
    """Limits the memory of its processes; the next allocation of some size fails."""
    for process in [server, *server.children(recursive=True)]:
        process.rlimit(psutil.RLIMIT_AS, (2**20, 2**20))


def server_of(root: Path, name: str) -> psutil.Process:
    """The main process of an engine's server.

    It is the child of the supervisor, which is the only process that writes the server's log.
    """
    log = str(root / "engines" / f"{name}.log")
    for process in psutil.process_iter():
        try:
            if any(file.path == log for file in process.open_files()):
                return process.children()[0]
        except psutil.Error:
            continue
    raise AssertionError(f"no process writes {log}")


def replaced(
    live: Live, name: str, harm: Callable[[psutil.Process], None], *, count: int = 1, of: int = 3
) -> list[psutil.Process]:
    """Harms an engine's server and waits until the run has replaced it and goes on training.

    Returns the processes of the server that was harmed.
    """
    server = server_of(live.root, name)
    session = [server, *server.children(recursive=True)]
    harm(server)
    lost = rf"^{name} lost its engine: .*; restarting it(?: in \d+ s)? \({count} of {of}\)$"
    live.wait_for(lost, timeout_s=60.0)
    live.wait_for(rf"{lost}[\s\S]*?^{name} generates again$", timeout_s=120.0)
    steps = len(read_rows(live.root / "metrics.jsonl"))
    live.wait_for(rf"^step +{steps + 4}/", timeout_s=60.0)
    assert server_of(live.root, name).pid != server.pid
    return session


def check_restarts(run: Finished, **harmed: int) -> None:
    """Each engine was lost as often as it was harmed, also where that broke off a broadcast."""
    pattern = r"^(rollout-\d) lost its engine: .*; restarting it"
    lost = Counter(re.findall(pattern, run.output, re.MULTILINE))
    assert lost == Counter(harmed), run.output
    assert run.summary["engine_restarts"] == lost.total(), run.output
