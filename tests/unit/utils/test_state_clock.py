"""Time accounting: the states of a clock are disjoint and add up to its time."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Never

import pytest

from dapo_async.utils.state_clock import Span, StateClock


class Stopwatch(StateClock):
    """A clock whose time the test sets."""

    time_s = 100.0

    def now_s(self) -> float:
        return self.time_s

    def after(self, seconds: float) -> Stopwatch:
        self.time_s += seconds
        return self


def assert_adds_up(spans: list[Span]) -> None:
    """Disjoint, without gaps, and their sum is the elapsed time to the last bit."""
    assert all(before.end_s == after.start_s for before, after in pairwise(spans))
    assert sum(span.end_s - span.start_s for span in spans) == spans[-1].end_s - spans[0].start_s


def test_each_span_is_given_once_and_the_running_one_is_cut_and_continues() -> None:
    clock = Stopwatch("learner")
    clock.after(2).enter("train", "step 0")
    first = clock.after(3).take_spans()
    assert first == [Span("start", 100.0, 102.0), Span("train", 102.0, 105.0, "step 0")]
    assert clock.after(4).take_spans() == [Span("train", 105.0, 109.0, "step 0")]
    clock.after(1).enter("wait")
    assert clock.take_spans() == [Span("train", 109.0, 110.0, "step 0"), Span("wait", 110.0, 110.0)]


def test_entering_the_current_state_changes_nothing_but_a_new_detail_does() -> None:
    clock = Stopwatch("learner", state="train")
    clock.after(1).enter("train")
    clock.after(1).enter("train", "step 1")
    assert clock.state == "train"
    assert clock.after(1).take_spans() == [
        Span("train", 100.0, 102.0),
        Span("train", 102.0, 103.0, "step 1"),
    ]


def test_a_block_returns_to_the_previous_state_even_when_it_fails() -> None:
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


def test_states_of_several_threads_add_up_and_no_span_is_lost_or_doubled() -> None:
    clock, done = StateClock("rollout-0"), threading.Event()
    taken: list[Span] = []

    def busy(name: str) -> None:
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
    """Broken on purpose: reads the time twice, for the end of one span and the next start."""

    def enter(self, state: str, detail: str = "") -> None:
        super().enter(state, detail)
        self._since_s = self.now_s()


def test_a_clock_that_reads_the_time_twice_is_noticed() -> None:
    clock = RacyClock("learner")
    for number in range(100):
        clock.enter("train", f"step {number}")
    with pytest.raises(AssertionError):
        assert_adds_up(clock.take_spans())
