"""The log of groups, the trace of one of them, and the arrows in the timeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dapo_async.cli.main import main
from dapo_async.tracking.group_log import FlowPoint, GroupLog
from dapo_async.tracking.group_trace import trace_group
from dapo_async.tracking.timeline import Timeline, TraceFile
from dapo_async.types import GroupFacts
from dapo_async.utils.state_clock import Span

RECORD = json.dumps(
    {
        "siblings": [[10, 60, 900, 3, 3], [10, 60, 1500, 3, 4]],
        "updates": [[4, 1000, 1020]],
        "scored": 1510,
    }
)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def facts(group_id: int) -> GroupFacts:
    return GroupFacts(group_id, "first", 3, 2, 8, (40, 90), (1.0, 0.0), (1.0, 0.0), ("", ""))


def log_at(root: Path, clock: Clock, *, incarnation: str = "first", version: int = 0) -> GroupLog:
    return GroupLog(
        root / "groups.jsonl",
        now_s=clock,
        incarnation=incarnation,
        version=version,
        follow_every=2,
    )


def play_a_run(log: GroupLog, clock: Clock) -> None:
    """Group 4 is trained, 5 is rejected, 6 is still generated."""
    clock.now_s = 1002.0
    log.admit([4, 5], worker="rollout-0", version=3, rows=[17, 2])
    log.admit([6], worker="rollout-1", version=3, rows=[9])
    clock.now_s = 1003.6
    log.offer(facts(4), worker="rollout-0", record=RECORD)
    log.offer(facts(5), worker="rollout-0", record="")
    log.add("rejected", [5], reason="all_wrong")
    clock.now_s = 1004.0
    log.add("taken", [4], step=3)
    clock.now_s = 1006.0
    log.trained([4], step=3)
    log.add("trained", [4])
    clock.now_s = 1006.5
    log.add("released", [4], version=4)


def rows(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "groups.jsonl").read_text().splitlines()]


def test_trace_tells_the_events_of_a_trained_group_in_order_of_time(tmp_path: Path) -> None:
    clock = Clock()
    log = log_at(tmp_path, clock)
    play_a_run(log, clock)
    log.append(log.take_text())
    assert list(trace_group(tmp_path, 4)) == [
        f"group 4 of {tmp_path}, prompt 17 of the data set: trained",
        "       time     after  event",
        "    2.000 s   +0.000  admitted to rollout-0; every engine serves version 3",
        "    2.010 s   +0.010  siblings 0 to 1 start on rollout-0's engine; prefill until "
        "+0.050 s, version 3",
        "    2.900 s   +0.890  sibling 0 ends with 40 tokens of version 3",
        "    3.000 s   +0.100  rollout-0 loads version 4, within 0.020 s",
        "    3.500 s   +0.500  sibling 1 ends with 90 tokens of versions 3 to 4",
        "    3.510 s   +0.010  scored: accuracy 0.5, reward 0.5",
        "    3.600 s   +0.090  offered by rollout-0",
        "    3.600 s   +0.000  accepted: it waits in the buffer",
        "    4.000 s   +0.400  taken for step 3",
        "    6.000 s   +2.000  trained",
        "    6.500 s   +0.500  released: every engine serves version 4, the credit is free",
    ]


def test_trace_of_a_rejected_group_and_of_one_in_flight(tmp_path: Path) -> None:
    clock = Clock()
    log = log_at(tmp_path, clock)
    play_a_run(log, clock)
    log.append(log.take_text())
    rejected = [*trace_group(tmp_path, 5)]
    assert rejected[0].endswith("prompt 2 of the data set: rejected (all_wrong)")
    assert [line.split("  ")[-1] for line in rejected[2:]] == [
        "admitted to rollout-0; every engine serves version 3",
        "offered by rollout-0",
        "rejected: all_wrong; its credit is free",
    ]
    assert next(trace_group(tmp_path, 6)).endswith(
        "prompt 9 of the data set: still in flight when this was written (admitted)"
    )


def test_events_of_one_moment_share_a_line_and_are_written_once(tmp_path: Path) -> None:
    clock = Clock()
    log = log_at(tmp_path, clock)
    log.admit([0], worker="rollout-0", version=0, rows=[5])
    log.admit([1, 2], worker="rollout-0", version=0, rows=[6, 7])
    log.append(log.take_text())
    for group_id in range(3):
        log.add("unused", [group_id])
    log.add("unused", [])
    log.append(log.take_text())
    assert rows(tmp_path) == [
        {"event": "start", "time_s": 1000.0, "incarnation": "first", "version": 0},
        {
            "event": "admitted",
            "t": 0.0,
            "group_ids": [0, 1, 2],
            "worker": "rollout-0",
            "version": 0,
            "rows": [5, 6, 7],
        },
        {"event": "unused", "t": 0.0, "group_ids": [0, 1, 2]},
    ]


def test_resumed_run_goes_on_in_the_file_after_a_line_that_a_kill_cut(tmp_path: Path) -> None:
    clock = Clock()
    log = log_at(tmp_path, clock)
    play_a_run(log, clock)
    log.append(log.take_text() + '{"event":"admitted","t":7.0,"group_i')
    clock.now_s = 2000.0
    resumed = log_at(tmp_path, clock, incarnation="second", version=3)
    clock.now_s = 2001.0
    resumed.admit([4], worker="rollout-1", version=3, rows=[17])
    resumed.append(resumed.take_text())
    lines = [*trace_group(tmp_path, 4)]
    place = lines.index("the run was resumed at version 3 and repeats the group:")
    assert lines[place + 2] == (
        "    1.000 s   +0.000  admitted to rollout-1; every engine serves version 3"
    )


@pytest.mark.parametrize(
    ("group_id", "line"),
    [
        (40, "dapo-async: group 40 is not in {root}/groups.jsonl: its groups are 0 to 6"),
        (-1, "dapo-async: group -1 is not in {root}/groups.jsonl: its groups are 0 to 6"),
    ],
)
def test_unknown_group_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], group_id: int, line: str
) -> None:
    clock = Clock()
    log = log_at(tmp_path, clock)
    play_a_run(log, clock)
    log.append(log.take_text())
    assert main(["trace", str(tmp_path), "--", str(group_id)]) == 2
    assert capsys.readouterr().err == line.format(root=tmp_path) + "\n"


def test_folder_without_groups_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", str(tmp_path), "3"]) == 2
    assert capsys.readouterr().err.startswith(f"dapo-async: {tmp_path} has no groups.jsonl; give")


def test_one_group_in_so_many_gets_an_arrow_through_all_its_actors(tmp_path: Path) -> None:
    clock = Clock()
    log = log_at(tmp_path, clock)
    play_a_run(log, clock)
    points = log.take_points()
    assert {point.group_id for point in points} == {4, 6}
    assert [(each.phase, each.actor, each.step) for each in points if each.group_id == 4] == [
        ("s", "replay", None),
        ("t", "rollout-0", None),
        ("t", "rollout-0", None),
        ("t", "replay", None),
        ("t", "replay", None),
        ("t", "", 3),
        ("f", "replay", None),
    ]
    assert log.take_points() == []
    path = tmp_path / "timeline.json"
    timeline = Timeline(TraceFile(path, start_s=1000.0))
    timeline.add("replay", [Span("wait", 1000.0, 1010.0)])
    timeline.add("rollout-0", [Span("generate", 1000.0, 1010.0)])
    timeline.flow(points)  # the learner has not reported the step yet
    timeline.add("learner", [Span("train", 1004.0, 1006.0, "step 3")])
    timeline.flow([])
    timeline.close()
    events = json.loads(path.read_text())["traceEvents"]
    actors = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    arrow = [event for event in events if event["ph"] in "stf" and event["id"] == 4]
    assert [
        (event["ph"], actors[event["pid"]], event["ts"])
        for event in sorted(arrow, key=lambda event: event["ts"])
    ] == [
        ("s", "replay", 2_000_000),
        ("t", "rollout-0", 2_010_000),
        ("t", "rollout-0", 3_500_000),
        ("t", "replay", 3_600_000),
        ("t", "replay", 4_000_000),
        ("t", "learner", 5_000_000),
        ("f", "replay", 6_500_000),
    ]


def test_points_that_no_step_claims_are_bounded(tmp_path: Path) -> None:
    timeline = Timeline(TraceFile(tmp_path / "timeline.json", start_s=0.0))
    for step in range(3000):
        timeline.flow([FlowPoint(step, "t", step=step)])
    assert len(timeline._unplaced) == 1000
