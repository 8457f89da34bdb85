"""Law 6 and what a run leaves behind: states that add up exactly, the timeline made of them, the run directory, the picture."""

import json
import os
import threading
from itertools import pairwise
from pathlib import Path
from typing import Never

import numpy as np
import pytest

from dapo_async.tracking.run_dir import RunDir, version_spans, write_rollouts
from dapo_async.tracking.timeline import Timeline
from dapo_async.types import Completion, FinishReason, Group, Prompt, Rollout
from dapo_async.utils.state_clock import Span, StateClock


class Stopwatch(StateClock):
    """A clock whose time the test sets."""

    time_s = 100.0

    def now_s(self):
        return self.time_s

    def after(self, seconds):
        self.time_s += seconds
        return self


def states(spans):
    return [(span.state, span.end_s - span.start_s) for span in spans]


def assert_adds_up(spans) -> None:
    """Disjoint, without gaps, and their sum is the elapsed time to the last bit: near one epoch second differences of floats are exact."""
    assert all(before.end_s == after.start_s for before, after in pairwise(spans))
    assert sum(span.end_s - span.start_s for span in spans) == spans[-1].end_s - spans[0].start_s


def test_each_span_is_handed_over_once_and_the_running_one_is_cut_and_goes_on() -> None:
    clock = Stopwatch("learner")
    clock.after(2).enter("train", "step 0")
    first = clock.after(3).take_spans()
    assert first == [Span("start", 100.0, 102.0), Span("train", 102.0, 105.0, "step 0")]
    assert clock.after(4).take_spans() == [Span("train", 105.0, 109.0, "step 0")]
    clock.after(1).enter("wait")
    assert clock.take_spans() == [Span("train", 109.0, 110.0, "step 0"), Span("wait", 110.0, 110.0)]


def test_entering_the_state_one_is_in_changes_nothing_but_a_new_detail_does() -> None:
    clock = Stopwatch("learner", state="train")
    clock.after(1).enter("train")
    clock.after(1).enter("train", "step 1")
    assert clock.state == "train"
    assert clock.after(1).take_spans() == [
        Span("train", 100.0, 102.0),
        Span("train", 102.0, 103.0, "step 1"),
    ]


def test_a_stay_returns_to_the_state_before_even_when_it_fails() -> None:
    clock = Stopwatch("rollout-0", state="generate")
    clock.enter("generate", "group 7")

    def swap() -> Never:
        with clock.during("sync", "version 3"):
            clock.after(5)
            with clock.during("save"):
                clock.after(1)
            raise ValueError("weights that do not fit")

    with pytest.raises(ValueError, match="do not fit"):
        swap()
    spans = clock.after(2).take_spans()
    assert [(span.state, span.detail, span.end_s - span.start_s) for span in spans] == [
        ("generate", "", 0.0),
        ("generate", "group 7", 0.0),
        ("sync", "version 3", 5.0),
        ("save", "", 1.0),
        ("sync", "version 3", 0.0),
        ("generate", "group 7", 2.0),
    ]


def test_states_of_several_threads_add_up_exactly_and_no_span_is_lost_or_doubled() -> None:
    clock, taken, done = StateClock("rollout-0"), [], threading.Event()

    def busy(name) -> None:
        for number in range(500):
            with clock.during(name, f"turn {number}"):
                pass

    def collect() -> None:
        while not done.is_set():
            taken.extend(clock.take_spans())

    workers = [threading.Thread(target=busy, args=(name,)) for name in ("generate", "sync", "wait")]
    collector = threading.Thread(target=collect)
    for thread in (collector, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    collector.join()
    taken.extend(clock.take_spans())
    assert_adds_up(taken)
    assert {span.state for span in taken} >= {"generate", "sync", "wait"}


class RacyClock(StateClock):
    """The named break: the end of one span and the start of the next are two looks at the time."""

    def enter(self, state, detail="") -> None:
        super().enter(state, detail)
        self._since_s = self.now_s()


def test_a_clock_that_looks_twice_is_seen() -> None:
    clock = RacyClock("learner")
    for number in range(100):
        clock.enter("train", f"step {number}")
    with pytest.raises(AssertionError):
        assert_adds_up(clock.take_spans())


def test_the_timeline_joins_what_was_cut_and_drops_what_took_no_time() -> None:
    timeline = Timeline()
    timeline.add("learner", [Span("train", 0.0, 2.0, "step 0"), Span("wait", 2.0, 2.0)])
    timeline.add("learner", [Span("train", 2.0, 5.0, "step 0"), Span("train", 5.0, 6.0, "step 1")])
    assert timeline.spans["learner"] == [
        Span("train", 0.0, 5.0, "step 0"),
        Span("train", 5.0, 6.0, "step 1"),
    ]


def test_a_report_that_was_lost_leaves_a_gap_that_no_state_is_given() -> None:
    timeline = Timeline()
    timeline.add("learner", [Span("train", 0.0, 2.0)])
    timeline.add("learner", [Span("train", 7.0, 8.0)])
    assert timeline.totals("learner") == {"train": 3.0}


def test_totals_and_idle_shares_are_of_the_window_alone() -> None:
    timeline = Timeline()
    timeline.add(
        "learner",
        [
            Span("start", 0.0, 10.0),
            Span("wait", 10.0, 16.0),
            Span("train", 16.0, 28.0),
            Span("snapshot", 28.0, 30.0),
        ],
    )
    assert timeline.totals("learner") == {
        "train": 12.0,
        "start": 10.0,
        "wait": 6.0,
        "snapshot": 2.0,
    }
    assert list(timeline.totals("learner")) == [
        "train",
        "start",
        "wait",
        "snapshot",
    ]  # largest first
    assert timeline.totals("learner", start_s=12.0, end_s=20.0) == {
        "wait": 4.0,
        "train": 4.0,
        "start": 0.0,
        "snapshot": 0.0,
    }
    assert timeline.idle_share(
        "learner", ("train", "snapshot"), start_s=10.0, end_s=30.0
    ) == pytest.approx(0.3)
    assert timeline.idle_share("learner", ("train",), start_s=10.0, end_s=30.0) == pytest.approx(
        0.4
    )
    assert timeline.idle_share("learner", ("train",), start_s=30.0, end_s=30.0) == 0.0
    assert timeline.idle_share("unheard", ("train",), start_s=0.0, end_s=5.0) == 1.0


def test_the_trace_has_one_row_per_actor_in_microseconds(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.add(
        "rollout-0",
        [
            Span("generate", 1_700_000_000.0, 1_700_000_001.5),
            Span("sync", 1_700_000_001.5, 1_700_000_001.75, "version 3"),
        ],
    )
    timeline.add("learner", [Span("train", 1_700_000_000.25, 1_700_000_000.5)])
    timeline.write(tmp_path / "timeline.json")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert [(event["pid"], event["args"]["name"]) for event in events if event["ph"] == "M"] == [
        (1, "learner"),
        (2, "rollout-0"),
    ]
    assert [
        (event["pid"], event["name"], event["ts"], event["dur"], event["args"])
        for event in events
        if event["ph"] == "X"
    ] == [
        (1, "train", 1_700_000_000_250_000, 250_000, {}),
        (2, "generate", 1_700_000_000_000_000, 1_500_000, {}),
        (2, "sync", 1_700_000_001_500_000, 250_000, {"detail": "version 3"}),
    ]


def test_versions_per_token_become_spans() -> None:
    assert version_spans([7, 7, 8]) == [[7, 0, 2], [8, 2, 3]]
    assert version_spans([3]) == [[3, 0, 1]]
    assert version_spans([1, 2, 1]) == [[1, 0, 1], [2, 1, 2], [1, 2, 3]]
    assert version_spans([]) == []


def test_readable_rollouts_say_where_each_came_from(tmp_path: Path) -> None:
    completion = Completion(
        np.array([4, 5, 6], np.int32),
        np.zeros(3, np.float32),
        np.array([7, 7, 8], np.int32),
        6,
        FinishReason.STOP,
    )
    prompt = Prompt(0, "12 + 30 =", np.array([1], np.int32), "42")
    right, wrong = (
        Rollout(completion, "#### 42 – quod erat", 1.0, 1.0, "42"),
        Rollout(completion, "", 0.0, -1.0, None),
    )
    write_rollouts(tmp_path, step=12, groups=[Group(31, prompt, (right, wrong), "first", 1.0)])
    rows = [
        json.loads(line)
        for line in (tmp_path / "step_000012.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert rows[0] == {
        "step": 12, "group_id": 31, "sibling": 0, "prompt": "12 + 30 =", "response": "#### 42 – quod erat", "gold": "42", "extracted": "42",
        "accuracy": 1.0, "reward": 1.0, "tokens": 3, "finish_reason": "stop", "weight_versions": [[7, 0, 2], [8, 2, 3]], "prefill_version": 6,
    }  # fmt: skip
    assert (rows[1]["sibling"], rows[1]["extracted"], rows[1]["reward"]) == (1, None, -1.0)


def test_a_run_never_writes_over_another(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path / "runs" / "first")
    assert sorted(path.name for path in run_dir.root.iterdir()) == ["checkpoints", "rollouts"]
    with pytest.raises(ValueError, match=r"first is not empty; go on with train --resume"):
        RunDir.create(tmp_path / "runs" / "first")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt is a file; choose another run_dir"):
        RunDir.create(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert RunDir.create(tmp_path / "empty").checkpoints == tmp_path / "empty" / "checkpoints"


def test_each_step_is_one_line_of_strict_json_whatever_its_numbers(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path)
    run_dir.log_step({"step": 0, "loss": 0.25})
    run_dir.log_step({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})

    def refuse(constant) -> Never:
        raise AssertionError(f"{constant} is not JSON")

    rows = [
        json.loads(line, parse_constant=refuse) for line in run_dir.metrics.read_text().splitlines()
    ]
    assert rows == [{"step": 0, "loss": 0.25}, {"step": 1, "loss": None, "grad_norm": None}]


def test_the_summary_is_replaced_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir.create(tmp_path)
    run_dir.write_summary({"status": "running"})

    def dies(*_) -> Never:
        raise OSError("the machine stops before the rename")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dies)
        with pytest.raises(OSError, match="before the rename"):
            run_dir.write_summary({"status": "done"})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "running"}
    run_dir.write_summary({"status": "done"})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "done"}
    assert not list(tmp_path.glob("*.partial"))
