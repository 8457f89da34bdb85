"""Actors that answer and get nowhere are named, once, with the lines that they are in."""

from __future__ import annotations

from dapo_async.runtime.standstill import FIRST_S, LEAST_S, MinibatchTimes, Standstill

ALL_REDUCE = "model/mesh.py:42 sum > all_reduce"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_ranks_that_wait_are_named_once_with_the_one_that_is_elsewhere() -> None:
    clock = Clock()
    standstill = Standstill(clock)
    told = []
    for _ in range(30):
        told += [
            standstill.seen("learner-0", ALL_REDUCE, work=7),
            standstill.seen("learner-1", "learner/rank.py:9 step > sleep", work=7),
        ]
        clock.now_s += 5.0
    assert [line for line in told if line is not None] == [
        "learner-0 in model/mesh.py:42 sum > all_reduce for 60 s, "
        "learner-1 in learner/rank.py:9 step > sleep for 60 s"
    ]


def test_a_rank_that_moves_is_not_named() -> None:
    clock = Clock()
    standstill = Standstill(clock)
    for number in range(100):
        clock.now_s += 5.0
        # The same line in every minibatch, and now and then another one, or none between two.
        assert standstill.seen("learner-0", ALL_REDUCE, work=number // 8) is None
        line = None if number % 9 == 0 else ALL_REDUCE
        assert standstill.seen("learner-1", line) is None
        line = "another" if number % 9 == 0 else ALL_REDUCE
        assert standstill.seen("learner-2", line) is None


def test_a_second_standstill_of_the_same_rank_is_told_too() -> None:
    clock = Clock()
    standstill, told = Standstill(clock), 0
    for work in (1, 1, 1, 2, 2, 2):
        told += standstill.seen("learner", ALL_REDUCE, limit_s=50.0, work=work) is not None
        clock.now_s += 50.0
    assert told == 2


def test_the_limit_follows_the_median_minibatch() -> None:
    times = MinibatchTimes()
    assert (times.median_s, times.standstill_s) == (None, FIRST_S)
    for seconds in (100.0, 0.5, 0.7):
        times.add(seconds)
    assert (times.median_s, times.standstill_s, times.num_ended) == (0.7, LEAST_S, 3)
    for _ in range(60):
        times.add(30.0)
    assert (times.standstill_s, times.num_ended, len(times.seconds)) == (300.0, 63, 50)
