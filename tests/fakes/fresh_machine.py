"""Runs blocks of the documentation that start a Ray cluster, without Ray settings of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from run_support import MARKER, processes_of
from snippets import Snippet

SHORT = "configs/quickstart.yaml train.num_steps=1 evaluation.num_prompts=0 tracking.sinks=none"
PORTS = (6379, 8265)  # of `ray start --head`: the GCS and the dashboard


@contextlib.contextmanager
def fresh_machine() -> Iterator[dict[str, str]]:
    """An environment without Ray settings and with an empty HOME; its processes end with it."""
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port} is in use, probably by a Ray cluster")
    # Short: the path of a Unix socket has at most 107 characters.
    home, mark = tempfile.mkdtemp(prefix="dapo-", dir="/tmp"), uuid.uuid4().hex
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    try:
        yield kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": home,
            "RAY_TMPDIR": home,
            MARKER: mark,
        }
    finally:
        deadline_s = time.monotonic() + 30.0
        while (left := processes_of(mark, session=-1)) and time.monotonic() < deadline_s:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        assert not left, f"processes are left behind: {left}"
        shutil.rmtree(home, ignore_errors=True)


def trains(
    snippet: Snippet,
    machine: dict[str, str],
    *changes: tuple[str, str],
    before: str = "",
    after: str = "",
) -> str:
    """Runs a block, with one step instead of a whole run. It must train. Its output.

    `before` and `after`: commands that the page has elsewhere.
    """
    code = f"{before}\n{snippet.code}\n{after}".replace("/shared", machine["HOME"])
    for old, new in (("configs/quickstart.yaml", SHORT), *changes):
        assert old in code, f"{snippet.where} has no {old}"
        code = code.replace(old, new)
    if "export RAY_AUTH_MODE" not in code:  # the page has said it above
        code = f"export RAY_AUTH_MODE=token DAPO_ASYNC_RUNS=$HOME/runs\n{code}"
    if "get-auth-token" not in code:
        code = f"ray get-auth-token --generate\n{code}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=ROOT,
        env=machine,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{snippet.where}:\n{done.stdout[-4000:]}"
    assert "done: all steps trained" in done.stdout, done.stdout[-4000:]
    return done.stdout
