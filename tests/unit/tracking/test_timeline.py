"""Time accounting in the driver: exact sums over all spans, and a trace of a bounded size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dapo_async.tracking.timeline import Timeline, TraceFile
from dapo_async.utils.state_clock import Span

BUSY = ("train", "snapshot")
LARGEST_TRACE = 20_000_000  # bytes of 10,000 steps


def bars(path: Path, actor: str) -> list[tuple[str, float, float, dict[str, Any]]]:
    """State, start and length in milliseconds, and arguments of what was drawn of an actor."""
    events = json.loads(path.read_text())["traceEvents"]
    (pid,) = (
        event["pid"] for event in events if event["ph"] == "M" and event["args"]["name"] == actor
    )
    return [
        (event["name"], event["ts"] / 1e3, event["dur"] / 1e3, event.get("args", {}))
        for event in events
        if event["ph"] == "X" and event["pid"] == pid
    ]


def test_totals_are_sums_over_all_spans_and_a_lost_report_leaves_a_gap() -> None:
    timeline = Timeline()
    timeline.add("learner", [Span("train", 0.0, 2.0, "step 0"), Span("wait", 2.0, 2.0)])
    timeline.add("learner", [Span("train", 7.0, 8.0, "step 1"), Span("start", 8.0, 12.0)])
    assert timeline.totals("learner") == {"start": 4.0, "train": 3.0}
    assert list(timeline.totals("learner")) == ["start", "train"]  # largest first
    assert timeline.actors == ["learner"]
    assert timeline.totals("unheard") == {}


def test_seconds_until_a_time_count_the_part_of_each_span_before_it() -> None:
    timeline = Timeline()
    timeline.add("learner", [Span("start", 0.0, 10.0), Span("wait", 10.0, 16.0)])
    timeline.add("learner", [Span("train", 16.0, 28.0), Span("snapshot", 28.0, 30.0)])
    assert timeline.seconds("learner", BUSY) == 14.0
    assert [timeline.seconds("learner", BUSY, until_s=until_s) for until_s in (10, 20, 29)] == [
        0.0,
        4.0,
        13.0,
    ]
    assert timeline.seconds("unheard", BUSY, until_s=5.0) == 0.0


def test_forgotten_spans_stay_in_the_sums_and_a_late_report_is_added() -> None:
    timeline = Timeline()
    timeline.add("learner", [Span("train", 0.0, 4.0), Span("wait", 4.0, 6.0)])
    timeline.add("learner", [Span("train", 6.0, 10.0)])
    timeline.forget(7.0)
    assert timeline.seconds("learner", BUSY, until_s=7.0) == 5.0
    assert timeline.totals("learner") == {"train": 8.0, "wait": 2.0}
    timeline.add("learner-1", [Span("train", 3.0, 9.0)])
    assert timeline.seconds("learner-1", BUSY, until_s=7.0) == 4.0


def test_the_trace_is_complete_json_with_a_row_per_actor_and_starts_at_zero(
    tmp_path: Path,
) -> None:
    path = tmp_path / "timeline.json"
    timeline = Timeline(TraceFile(path, start_s=1_700_000_000.0))
    timeline.add(
        "rollout-0",
        [
            Span("generate", 1_700_000_000.0, 1_700_000_001.5),
            Span("sync", 1_700_000_001.5, 1_700_000_001.75, "version 3"),
        ],
    )
    timeline.add("learner", [Span("train", 1_700_000_000.25, 1_700_000_000.5)])
    timeline.close()
    timeline.close()
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["args"]["name"]: event["pid"] for event in events if event["ph"] == "M"}
    assert names == {"rollout-0": 1, "learner": 2}
    assert [
        (event["pid"], event["name"], event["ts"], event["dur"], event.get("args"))
        for event in events
        if event["ph"] == "X"
    ] == [
        (1, "generate", 0, 1_500_000, None),
        (1, "sync", 1_500_000, 250_000, {"detail": "version 3"}),
        (2, "train", 250_000, 250_000, None),
    ]


def test_a_span_that_reports_cut_is_one_bar(tmp_path: Path) -> None:
    timeline = Timeline(TraceFile(tmp_path / "timeline.json", start_s=0.0))
    timeline.add("learner", [Span("train", 0.0, 2.0, "step 0")])
    timeline.add("learner", [Span("train", 2.0, 5.0, "step 0"), Span("train", 5.0, 6.0, "step 1")])
    timeline.close()
    assert bars(tmp_path / "timeline.json", "learner") == [
        ("train", 0.0, 5000.0, {"detail": "step 0"}),
        ("train", 5000.0, 1000.0, {"detail": "step 1"}),
    ]


def test_short_stays_are_part_of_the_bar_around_them_which_lists_them(tmp_path: Path) -> None:
    timeline = Timeline(TraceFile(tmp_path / "timeline.json", start_s=0.0))
    offers = [
        Span("wait", 0.0, 1.0),
        Span("offer", 1.0, 1.002),
        Span("wait", 1.002, 3.0),
        Span("offer", 3.0, 3.001),
        Span("take", 3.001, 4.001, "version 7"),
    ]
    timeline.add("replay", offers)
    timeline.close()
    assert bars(tmp_path / "timeline.json", "replay") == [
        ("wait", 0.0, 3001.0, {"covered_ms": {"offer": 3.0}}),
        ("take", 3001.0, 1000.0, {"detail": "version 7"}),
    ]
    assert timeline.totals("replay") == pytest.approx({"wait": 2.998, "offer": 0.003, "take": 1.0})


def test_a_killed_run_leaves_whole_lines_that_lack_the_closing_bracket_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "timeline.json"
    timeline = Timeline(TraceFile(path, start_s=0.0))
    for step in range(3):
        timeline.add("learner", [Span("train", step, step + 1.0, f"step {step}")])
    drawn = json.loads(path.read_text() + "]")
    assert [event["args"] for event in drawn] == [
        {"name": "learner"},
        {"detail": "step 0"},
        {"detail": "step 1"},
    ]


def spans_of_a_step(step: int, *, num_offers: int) -> dict[str, list[Span]]:
    """One second of a run: the replay actor changes its state twice for every offer."""
    each_s, now_s, replay = 0.4 / num_offers, float(step), list[Span]()
    for number in range(num_offers):
        middle_s, end_s = now_s + 0.9 * each_s, step + (number + 1) * each_s
        replay += [Span("wait", now_s, middle_s), Span("offer", middle_s, end_s)]
        now_s = end_s
    name = f"step {step}"
    return {
        "driver": [
            Span("wait for batch", step, step + 0.3, name),
            Span("wait for step", step + 0.3, step + 0.9, name),
            Span("wait for publish", step + 0.9, step + 1.0, name),
        ],
        "replay": [*replay, Span("wait", now_s, step + 1.0)],
        "learner": [
            Span("wait", step, step + 0.3),
            Span("fetch", step + 0.3, step + 0.305, name),
            Span("train", step + 0.305, step + 0.9, name),
            Span("snapshot", step + 0.9, step + 1.0, f"version {step + 1}"),
        ],
        **{
            f"rollout-{number}": [
                Span("generate", step, step + 0.95),
                Span("sync", step + 0.95, step + 1.0, f"version {step}"),
            ]
            for number in range(4)
        },
    }


@pytest.mark.slow
def test_ten_thousand_steps_are_drawn_in_20_megabytes_with_exact_totals(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    timeline = Timeline(TraceFile(path, start_s=0.0))
    for step in range(10_000):
        for actor, spans in spans_of_a_step(step, num_offers=20).items():
            timeline.add(actor, spans)
        timeline.forget(step + 1.0)
    timeline.close()
    assert path.stat().st_size < LARGEST_TRACE
    assert timeline.totals("replay") == pytest.approx({"wait": 9_600.0, "offer": 400.0})
    assert timeline.totals("learner") == pytest.approx(
        {"train": 5_950.0, "wait": 3_000.0, "snapshot": 1_000.0, "fetch": 50.0}
    )
    assert timeline.totals("rollout-3") == pytest.approx({"generate": 9_500.0, "sync": 500.0})
    drawn = bars(path, "replay")
    assert sum(length for _, _, length, _ in drawn) == pytest.approx(10_000_000.0)
    covered = sum(args["covered_ms"]["offer"] for _, _, _, args in drawn)
    assert covered == pytest.approx(400_000.0, rel=1e-3)


def test_the_number_of_bars_does_not_depend_on_the_number_of_short_stays(tmp_path: Path) -> None:
    sizes = []
    for num_offers in (50, 2000):
        path = tmp_path / f"{num_offers}.json"
        timeline = Timeline(TraceFile(path, start_s=0.0))
        for step in range(3):
            for actor, spans in spans_of_a_step(step, num_offers=num_offers).items():
                timeline.add(actor, spans)
        timeline.close()
        sizes.append(len(bars(path, "replay")))
    assert sizes == [3, 3]


def test_a_full_disk_ends_the_trace_and_is_reported_once_at_the_end() -> None:
    timeline = Timeline(TraceFile(Path("/dev/full"), start_s=0.0))
    for step in range(3):
        timeline.add(
            "learner", [Span("train", step, step + 0.5), Span("wait", step + 0.5, step + 1)]
        )
    assert timeline.totals("learner") == {"train": 1.5, "wait": 1.5}
    with pytest.raises(OSError, match=r"/dev/full is not complete: .*No space left on device"):
        timeline.close()
    timeline.close()
