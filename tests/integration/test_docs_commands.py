"""The commands of README.md and docs/ run as they stand."""

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
from run_support import MARKER, Finished, processes_of
from snippets import PAGES, Snippet, run, snippets, workplace, write_file

pytestmark = pytest.mark.timeout(600)
ALL = [snippet for page in PAGES for snippet in snippets(page)]
CLUSTER = [snippet for snippet in ALL if snippet.how == "cluster"]
SHORT = "configs/quickstart.yaml train.num_steps=1 evaluation.num_prompts=0 tracking.sinks=none"
PORTS = (6379, 8265)  # of `ray start --head`: the GCS and the dashboard


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_that_needs_no_ray_runs_as_it_stands(page: Path, tmp_path: Path) -> None:
    folder = workplace(tmp_path / "checkout")
    for snippet in snippets(page):
        if snippet.file:
            write_file(snippet, folder)
        elif snippet.how in ("run", "dry-run"):
            run(snippet, folder)


@pytest.mark.ray
@pytest.mark.parametrize(
    "page",
    sorted({snippet.page for snippet in ALL if snippet.how == "ray"}),
    ids=lambda page: page.name,
)
def test_every_block_that_needs_ray_or_a_run_runs(
    page: Path, tmp_path: Path, quickstart: Finished
) -> None:
    folder = workplace(tmp_path / "checkout")
    (folder / "runs" / "quickstart").symlink_to(quickstart.root)
    for snippet in snippets(page):
        if snippet.file:
            write_file(snippet, folder)
        elif snippet.how == "ray":
            run(snippet, folder)


@pytest.fixture
def fresh_machine() -> Iterator[dict[str, str]]:
    """An environment without Ray settings and with an empty HOME; its processes end with it."""
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port} is in use, probably by a Ray cluster")
    # Short: the path of a Unix socket has at most 107 characters.
    home, mark = Path(tempfile.mkdtemp(prefix="dapo-", dir="/tmp")), uuid.uuid4().hex
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "RAY_TMPDIR": str(home),
        MARKER: mark,
    }
    deadline_s = time.monotonic() + 30.0
    while (left := processes_of(mark, session=-1)) and time.monotonic() < deadline_s:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    assert not left, f"processes are left behind: {left}"
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.parametrize("snippet", CLUSTER, ids=lambda snippet: snippet.where)
def test_cluster_commands_work_on_a_fresh_machine(
    snippet: Snippet, fresh_machine: dict[str, str]
) -> None:
    code = snippet.code.replace("/shared/runs", f"{fresh_machine['HOME']}/runs")
    code = code.replace("configs/quickstart.yaml", SHORT)
    if "export RAY_AUTH_MODE" not in code:  # the page has said it above
        code = f"export RAY_AUTH_MODE=token DAPO_ASYNC_RUNS=$HOME/runs\n{code}"
    if "get-auth-token" not in code:
        code = f"ray get-auth-token --generate\n{code}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=ROOT,
        env=fresh_machine,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{snippet.where}:\n{done.stdout[-4000:]}"
    assert "done: all steps trained" in done.stdout, done.stdout[-4000:]
