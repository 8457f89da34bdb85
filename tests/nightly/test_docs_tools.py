"""Commands of the docs that serve pages until they are stopped."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from paths import ROOT
from snippets import PAGES, snippets
from tracking_world import free_port

from dapo_async.tracking.tensorboard_writer import TensorBoardWriter

pytestmark = pytest.mark.timeout(900)
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "MPLBACKEND": "Agg",
}
LINES = [
    line.partition(" #")[0].strip()
    for page in PAGES
    for snippet in snippets(page)
    if snippet.detail == "tests/nightly/test_docs_tools.py"
    for line in snippet.code.splitlines()
]
START_S = 120.0


@contextmanager
def served(command: str, *more: str, folder: Path) -> Iterator[str]:
    """What `command`, with `more` words, serves; yields the URL when it answers."""
    url = f"http://127.0.0.1:{more[-1].rpartition(':')[2]}"
    with (folder / "served.out").open("w") as out:
        server = subprocess.Popen(
            [*shlex.split(command), *more],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline_s = time.monotonic() + START_S
    try:
        while not answers(url):
            told = (folder / "served.out").read_text()
            assert server.poll() is None, told
            assert time.monotonic() < deadline_s, f"no answer within {START_S:g} s: {told}"
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its own group: nothing else is in it
        server.wait(10)


def answers(url: str) -> bool:
    try:
        return bool(page(url))
    except OSError:
        return False


def page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def line_of(program: str) -> str:
    """The command of the docs that begins with `program`."""
    (line,) = {line for line in LINES if line.startswith(program)}
    return line


def test_tensorboard_shows_the_runs(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path / "runs" / "first" / "tensorboard")
    writer.log(1, {"accuracy": 0.5}, time_s=1.0)
    writer.close("done", "all steps trained")
    command = line_of("tensorboard")
    with served(command, "--port", str(free_port()), folder=tmp_path) as url:
        deadline_s = time.monotonic() + START_S
        while "first/tensorboard" not in page(f"{url}/data/runs"):  # it reads in the background
            assert time.monotonic() < deadline_s, page(f"{url}/data/runs")
            time.sleep(0.2)


def test_mkdocs_shows_the_pages(tmp_path: Path) -> None:
    config = ("--config-file", str(ROOT / "mkdocs.yml"))
    address = ("--dev-addr", f"127.0.0.1:{free_port()}")
    with served("mkdocs serve", *config, *address, folder=tmp_path) as url:
        assert "dapo_async" in page(url)
        assert "network.ports" in page(f"{url}/cluster.html")
