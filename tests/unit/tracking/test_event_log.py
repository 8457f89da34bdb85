"""The log of events: one JSON line each, from a run's start to its end."""

from __future__ import annotations

import io
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tracking_world import config_with, step_row

from dapo_async.tracking.disk_faults import DiskFaults
from dapo_async.tracking.event_log import EventLog
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.sinks import Sinks
from dapo_async.tracking.terminal import Outlet, Progress

NOON = datetime(2026, 1, 2, 12, 0, 0, 250_000, tzinfo=UTC)


def events(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]


def test_event_is_one_line_with_run_step_actor_and_its_fields(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", DiskFaults(print), run="quickstart", now=lambda: NOON)
    log.add("start", incarnation="ab12")
    log.step = 7
    log.add("engine_lost", actor="rollout-1", why="no answer", gap=math.nan)
    common = {"time": "2026-01-02T12:00:00.250Z", "run": "quickstart"}
    assert events(tmp_path) == [
        {**common, "step": 0, "actor": "driver", "event": "start", "incarnation": "ab12"},
        {
            **common,
            "step": 7,
            "actor": "rollout-1",
            "event": "engine_lost",
            "why": "no answer",
            "gap": None,
        },
    ]


def test_resumed_run_adds_its_events_after_a_line_that_a_kill_has_cut(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "publ')
    EventLog(tmp_path / "events.jsonl", DiskFaults(print), run="quickstart", now=lambda: NOON).add(
        "start"
    )
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert lines[1] == '{"event": "publ'
    assert json.loads(lines[2])["event"] == "start"


def test_full_disk_loses_events_and_is_counted_and_said_once() -> None:
    said: list[str] = []
    faults = DiskFaults(said.append)
    log = EventLog(Path("/dev/full"), faults, run="quickstart")
    log.add("start")
    log.add("end")
    assert faults.counts == {"full": 2}
    assert said == ["full can't be written: no space left on device; events are lost meanwhile"]


def test_verdicts_evaluations_and_guards_are_events(tmp_path: Path) -> None:
    progress = Progress(Outlet.on(io.StringIO()), num_steps=40, max_staleness=2)
    sinks = Sinks(config_with(sinks="none"), RunDir(tmp_path), progress)
    for step in range(10):
        evicted = {"groups.evicted": 2.0 if step >= 3 else 0.0}
        waits = {"slots.no_credit": 0.5}
        sinks.step(step_row(step) | {"handshake.mismatch": float(step > 5)} | evicted | waits)
        sinks.guards({"entropy_collapse": float(step > 7)})
    sinks.evaluation({"version": 10, "accuracy": 0.5, "mean_response_tokens": 9.0})
    told = [(each["event"], each["step"], each.get("kind")) for each in events(tmp_path)]
    assert told == [
        ("guard", 4, "groups.evicted"),
        ("guard", 7, "handshake.mismatch"),
        ("guard", 9, "entropy_collapse"),
        ("verdict", 10, "the staleness bound"),
        ("evaluation", 10, None),
    ]
