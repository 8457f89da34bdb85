"""Real runs on a terminal, on a closed terminal, and with a tracking server without an answer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import termios
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from paths import QUICKSTART
from run_support import (
    COMMAND,
    MARKER,
    TINY,
    Finished,
    environment,
    finished,
    processes_of,
)
from tracking_world import silent_port

pytestmark = pytest.mark.ray
# The run gets a terminal of its own, like a shell in a window: closing it sends SIGHUP.
LOGIN = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """A run in a terminal window; `shown` is all that was written to it."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.root, self._mark, self._shown = root, uuid.uuid4().hex, b""
        self._window, inside = os.openpty()
        termios.tcsetwinsize(inside, (40, 120))
        arguments = [
            sys.executable,
            "-c",
            LOGIN,
            COMMAND,
            "train",
            str(QUICKSTART),
            *TINY,
            *overrides,
            f"run_dir={root}",
        ]
        self._process = subprocess.Popen(
            arguments,
            stdin=inside,
            stdout=inside,
            stderr=inside,
            env=environment(**{MARKER: self._mark, "TERM": "xterm"}),
        )
        os.close(inside)
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        os.set_blocking(self._window, False)
        while not self._closing.is_set():
            try:
                part = os.read(self._window, 65536)
            except BlockingIOError:
                time.sleep(0.01)
                continue
            except OSError:  # the other side is closed
                return
            self._shown += part

    @property
    def shown(self) -> str:
        return self._shown.decode(errors="replace")

    def wait_for(self, pattern: str, *, timeout_s: float = 180.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not re.search(pattern, CONTROLS.sub("", self.shown)):
            assert self._process.poll() is None, (
                f"the run ended before it showed {pattern!r}:\n{self.shown}"
            )
            assert time.monotonic() < deadline_s, f"no {pattern!r} in {timeout_s} s:\n{self.shown}"
            time.sleep(0.01)

    def close_window(self) -> None:
        self._closing.set()
        self._reader.join()
        os.close(self._window)

    def finish(self, *, timeout_s: float = 240.0) -> Finished:
        code = self._process.wait(timeout_s)
        if not self._closing.is_set():
            time.sleep(0.2)
            self.close_window()
        return Finished(self.root, code, CONTROLS.sub("", self.shown))

    def destroy(self) -> None:
        for pid in processes_of(self._mark, session=self._process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait(10)


@contextmanager
def terminal(root: Path, *overrides: str) -> Iterator[Terminal]:
    window = Terminal(root, *overrides)
    try:
        yield window
    finally:
        window.destroy()


def test_terminal_shows_the_display_and_lines_above_it(tmp_path: Path) -> None:
    with terminal(tmp_path / "run") as window:
        run = window.finish()
        raw = window.shown
    assert run.exit_code == 0, run.output
    assert "\x1b[1A" in raw, "the display never moved the cursor"
    for fact in (
        "step 6/6",
        "learner ",
        "initial evaluation of version 0",
        "held-out v6",
        "of training left",
        "done: all steps trained",
    ):
        assert fact in run.output, run.output
    assert not re.search(r"^step +\d+/6 +\d", run.output, re.MULTILINE), (
        "the lines of a log do not belong on a terminal"
    )
    assert run.output.rindex("step 6/6") < run.output.rindex("done: all steps trained")
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l"), "the cursor stayed hidden"
    assert run.summary["caught"] == {}


def test_closing_the_terminal_ends_the_display_and_not_the_run(
    tmp_path: Path,
) -> None:
    with terminal(tmp_path / "run", "train.num_steps=60") as window:
        window.wait_for(r"step [1-9]\d*/60")
        window.close_window()
        run = window.finish()
    assert run.exit_code == 0
    assert (run.summary["status"], run.summary["steps"]) == ("done", 60)
    assert run.summary["caught"] == {"display": 1}


def test_run_reports_a_silent_tracking_server_once_and_ends_well(tmp_path: Path) -> None:
    with silent_port() as port:
        server = f"tracking.mlflow=http://me:secret@127.0.0.1:{port}"
        run = finished(tmp_path / "run", *TINY, "tracking.sinks=mlflow", server)
    assert run.exit_code == 0, run.output
    assert run.output.count("MLflow") == 1
    assert "MLflow at http://***@127.0.0.1:" in run.output
    assert len(run.metrics) == 6
    assert run.summary["mlflow_run_id"] is None
    assert (
        sum(count for name, count in run.summary["caught"].items() if name.startswith("mlflow: "))
        == sum(run.summary["caught"].values())
        > 0
    )
    told = [
        path for path in run.root.rglob("*") if path.is_file() and b"secret" in path.read_bytes()
    ]
    assert not told, f"the password is in {told}"
