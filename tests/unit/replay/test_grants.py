"""Which workers get the groups that may start."""

from __future__ import annotations

from dapo_async.replay.grants import share_grants


def test_every_worker_gets_what_it_wants_while_there_is_enough() -> None:
    assert share_grants({"a": 3, "b": 0, "c": 2}, 5) == {"a": 3, "c": 2}


def test_scarce_groups_go_to_the_workers_that_want_the_most() -> None:
    assert share_grants({"a": 5, "b": 5, "c": 5}, 6) == {"a": 2, "b": 2, "c": 2}
    assert share_grants({"a": 1, "b": 6, "c": 4}, 5) == {"b": 4, "c": 1}


def test_of_equal_workers_the_one_that_waits_longest_is_first() -> None:
    assert share_grants({"a": 5, "b": 5}, 1) == {"a": 1}
    assert share_grants({"b": 5, "a": 5}, 1) == {"b": 1}


def test_without_free_groups_none_gets_any() -> None:
    assert share_grants({"a": 5}, 0) == {}
