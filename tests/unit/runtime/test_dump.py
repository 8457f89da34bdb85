"""The dump of a run: stacks and tasks of a process, and how the command asks a driver for it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_actors import fake_actor
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.runtime.dump import request_dump, write_dump
from dapo_async.runtime.handles.actors import ReplayHandle, WorkerHandle
from dapo_async.runtime.supervisor import ProcessState
from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.state_clock import StateClock
from dapo_async.utils.thread_stack import process_dump

DEADLINES = knobs.load(QUICKSTART).deadlines


def test_dump_of_a_process_shows_where_its_threads_and_tasks_wait() -> None:
    gate = threading.Event()

    def wait_in_a_thread() -> None:
        gate.wait(10.0)

    async def inner() -> None:
        await asyncio.sleep(10.0)

    async def scene() -> str:
        thread = threading.Thread(target=wait_in_a_thread, name="a slow thread")
        thread.start()
        task = asyncio.create_task(inner(), name="a slow task")
        await asyncio.sleep(0.05)
        clock = StateClock("rollout-0")
        clock.enter("generate")
        text = process_dump(clock, "3 groups")
        task.cancel()
        gate.set()
        thread.join()
        return text

    text = asyncio.run(scene())
    assert f"pid {os.getpid()}" in text
    assert "state: generate\n3 groups" in text
    assert "thread a slow thread" in text
    assert "in wait_in_a_thread" in text
    _, _, task = text.partition("task a slow task\n")
    assert "inner" in task.splitlines()[0]


def test_dump_of_a_run_names_the_actors_that_do_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_async.runtime.dump.ANSWER_S", 0.1)

    async def answer() -> str:
        return "pid 7 on node\nstate: wait"

    async def hang() -> str:
        await asyncio.Event().wait()
        return ""

    system: Any = SimpleNamespace(
        supervisor=SimpleNamespace(states={"rollout-0": ProcessState.SUSPECT}),
        every_actor=[
            ReplayHandle("replay", fake_actor(dump=answer), DEADLINES),
            WorkerHandle("rollout-0", fake_actor(dump=hang), DEADLINES),
        ],
    )
    run_dir = RunDir(tmp_path)
    path = asyncio.run(write_dump(system, run_dir, StateClock("driver"), why="a passed deadline"))
    text = path.read_text()
    assert text.startswith("why: a passed deadline\nat: ")
    assert "rollout-0 suspect" in text
    assert "=== replay\npid 7 on node" in text
    assert "=== rollout-0\nno answer: the driver waited 0.1 s for rollout-0" in text


def test_command_asks_the_driver_and_returns_its_dump(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with pytest.raises(ValueError, match="no run is running in"):
        request_dump(tmp_path, timeout_s=1.0, say=print)
    run_dir.lock()
    run_dir.sign()

    def write(*_: object) -> None:
        run_dir.new_dump().write_text("stacks")

    before = signal.signal(signal.SIGUSR1, write)
    try:
        path = request_dump(tmp_path, timeout_s=5.0, say=print)
        assert path.read_text() == "stacks"
        signal.signal(signal.SIGUSR1, lambda *_: None)
        with pytest.raises(TimeoutError, match=r"wrote no dump within 0\.2 s"):
            request_dump(tmp_path, timeout_s=0.2, say=print)
    finally:
        signal.signal(signal.SIGUSR1, before)
    run_dir.driver.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(ValueError, match="runs on elsewhere"):
        request_dump(tmp_path, timeout_s=1.0, say=print)
    assert socket.gethostname() != "elsewhere"
