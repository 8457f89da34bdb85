"""Filters, credits, deadlines, reject streak and counts, each against literal numbers."""

from __future__ import annotations

from collections import Counter

import pytest
from replay_world import WRONG, make_group

from dapo_async.replay import Counts, dynamic_sampling, has_tokens
from dapo_async.replay.credits import Credits, DeadlineCounts, Outstanding, doomed, first_overload
from dapo_async.replay.filters import first_reason
from dapo_async.replay.stop_rule import RejectStreak
from dapo_async.types import RejectReason

# Filters.


@pytest.mark.parametrize(
    ("accuracies", "reason"),
    [
        ((1.0, 1.0, 1.0), RejectReason.ALL_CORRECT),
        ((0.0, 0.0, 0.0), RejectReason.ALL_WRONG),
        ((0.5, 0.5, 0.5), RejectReason.ALL_EQUAL),
        ((0.0, 1.0, 1.0), None),
        ((0.5, 0.5, 0.25), None),
        ((1.0,), RejectReason.ALL_CORRECT),
    ],
)
def test_dynamic_sampling_keeps_a_group_iff_its_accuracies_differ(
    accuracies: tuple[float, ...], reason: RejectReason | None
) -> None:
    assert dynamic_sampling(make_group(0, accuracies=accuracies)) is reason


def test_a_group_without_response_tokens_is_rejected_and_the_first_reason_wins() -> None:
    empty = make_group(0, accuracies=WRONG, num_tokens=0)
    assert has_tokens(empty) is RejectReason.TOO_FEW_TOKENS
    assert has_tokens(make_group(0, num_tokens=1)) is None
    assert first_reason(empty, (has_tokens, dynamic_sampling)) is RejectReason.TOO_FEW_TOKENS
    assert first_reason(empty, (dynamic_sampling, has_tokens)) is RejectReason.ALL_WRONG
    assert first_reason(make_group(0), (has_tokens, dynamic_sampling)) is None


# Credits and deadlines.


def test_credits_are_spent_and_given_back_once_each() -> None:
    credits = Credits(2)
    credits.spend(0)
    credits.spend(1)
    with pytest.raises(AssertionError, match="all 2 credits are held"):
        credits.spend(2)
    credits.give_back(0)
    assert (credits.free, credits.held) == (1, 1)
    with pytest.raises(AssertionError, match="holds no credit"):
        credits.give_back(0)


@pytest.mark.parametrize(
    ("deadlines", "overload"),
    [
        ([], None),
        ([5, 5, 6, 6, 7, 7], None),  # two per version from 5 on: just in time
        ([5, 5, 5], 5),
        ([6, 6, 6, 6, 6], 6),  # four places until 6
        ([4], 4),  # already past
        ([9, 9, 9, 9, 9, 9, 9, 9, 9, 9], None),
        ([9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], 9),
    ],
)
def test_first_overload_counts_the_places_until_each_deadline(
    deadlines: list[int], overload: int | None
) -> None:
    counts = Counter(deadlines)
    assert first_overload(counts, next_version=5, groups_per_step=2) == overload


def test_take_removes_the_earliest_finished_deadlines_from_the_counts() -> None:
    counts = DeadlineCounts()
    for deadline in (5, 6, 6):
        counts.start(deadline)
    for deadline in (7, 6, 5):
        counts.keep(deadline)
    assert counts.after_take(2) == {5: 1, 6: 2, 7: 1}
    counts.give(5)
    counts.stop(6)
    assert (counts.outstanding, counts.finished) == ({5: 1, 6: 2, 7: 1}, {6: 1, 7: 1})
    with pytest.raises(AssertionError, match="no group with deadline 5 is counted"):
        counts.give(5)


def test_overload_evicts_generating_groups_first_and_then_the_latest() -> None:
    def lost(*groups: tuple[int, int, bool]) -> tuple[int, ...]:
        return doomed((Outstanding(*group) for group in groups), next_version=5, groups_per_step=2)

    assert lost((5, 0, False), (5, 1, True), (5, 2, False)) == (1,)
    assert lost((5, 0, False), (5, 1, False), (5, 2, False)) == (2,)
    past_deadline = (4, 0, False)
    assert lost(past_deadline, (5, 1, True), (5, 2, True)) == (0,)
    assert lost((5, 0, True), (6, 1, False), (6, 2, False), (6, 3, False), (6, 4, False)) == (0,)
    assert lost((5, 0, True), (6, 1, False), (6, 2, False), (6, 3, False)) == ()


# Consecutive rejects and counts.


def test_accepted_group_restarts_the_streak_but_a_stop_reason_stays() -> None:
    streak = RejectStreak(2)
    streak.reject(RejectReason.ALL_WRONG)
    streak.accept()
    streak.reject(RejectReason.ALL_CORRECT)
    assert streak.stop_reason is None
    streak.reject(RejectReason.ALL_CORRECT)
    stop_reason = streak.stop_reason
    streak.accept()
    streak.reject(RejectReason.ALL_WRONG)
    assert streak.stop_reason is stop_reason
    assert stop_reason is not None
    assert stop_reason.solved


def test_counts_flatten_to_the_summary_names() -> None:
    flat = Counts(admitted=5, trained=2, rejected={RejectReason.ALL_WRONG: 3}).flat()
    assert flat == {
        "admitted": 5,
        "trained": 2,
        "evicted": 0,
        "failed": 0,
        "skipped": 0,
        "unused": 0,
        "rejected.all_correct": 0,
        "rejected.all_wrong": 3,
        "rejected.all_equal": 0,
        "rejected.too_few_tokens": 0,
        "rejected.filtered": 0,
        "in_flight": 0,
    }
