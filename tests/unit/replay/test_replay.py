"""The replay buffer, one rule per test, with literal numbers."""

from __future__ import annotations

from typing import Any

import pytest
from replay_world import MIXED, RIGHT, WRONG, make_buffer, make_group

from dapo_async.replay import (
    Counts,
    OfferOutcome,
    OfferResult,
    Refusal,
    ReplayBuffer,
    StepAcceptance,
)
from dapo_async.types import RejectReason


def serving(**overrides: Any) -> ReplayBuffer:
    buffer = make_buffer(**overrides)
    buffer.serve(0)
    return buffer


def admit_and_offer(
    buffer: ReplayBuffer, *, version: int = 0, accuracies: tuple[float, ...] = MIXED
) -> int:
    group_id = buffer.admit("worker-0")
    buffer.offer(
        make_group(group_id, accuracies=accuracies, version=version), f"payload-{group_id}"
    )
    return group_id


# Admission.


def test_no_group_is_admitted_before_the_engines_serve() -> None:
    buffer = make_buffer(groups_per_step=2, max_staleness=1)
    assert buffer.admissible() == 0
    buffer.serve(0)
    assert buffer.admissible() == 4


def test_admission_stops_at_the_credits_and_numbers_groups_from_zero() -> None:
    buffer = serving(groups_per_step=2, max_staleness=1)
    assert [buffer.admit("worker-0") for _ in range(4)] == [0, 1, 2, 3]
    assert buffer.admissible() == 0
    with pytest.raises(AssertionError, match="without a free credit"):
        buffer.admit("worker-0")


def test_admission_stops_when_outstanding_groups_cover_the_remaining_steps() -> None:
    buffer = serving(groups_per_step=2, max_staleness=5, num_steps=2)
    assert buffer.admissible() == 4  # 12 credits, but two steps are left
    for _ in range(4):
        admit_and_offer(buffer)
    assert buffer.take(0) is not None
    assert buffer.admissible() == 0
    assert buffer.take(1) is not None
    assert buffer.steps_left == 0


# Offers.


def test_rejected_group_releases_its_credit_at_once() -> None:
    buffer = serving()
    group_id = buffer.admit("worker-0")
    result = buffer.offer(make_group(group_id, accuracies=WRONG), None)
    assert result == OfferResult(OfferOutcome.REJECTED, RejectReason.ALL_WRONG)
    assert buffer.admissible() == 1
    assert buffer.counts == Counts(admitted=1, rejected={RejectReason.ALL_WRONG: 1})


def test_unexpected_offers_are_refused_and_change_nothing() -> None:
    buffer = serving(max_staleness=1)
    first, second = buffer.admit("worker-0"), buffer.admit("worker-1")
    before = buffer.counts
    assert (
        buffer.offer(make_group(first, incarnation="life-0"), None).reason
        is Refusal.FOREIGN_INCARNATION
    )
    assert buffer.offer(make_group(7), None).reason is Refusal.UNKNOWN
    assert buffer.offer(make_group(-1), None).reason is Refusal.UNKNOWN
    assert buffer.counts == before
    assert buffer.offer(make_group(first), None) == OfferResult(OfferOutcome.ACCEPTED)
    assert buffer.offer(make_group(first), None) == OfferResult(OfferOutcome.REFUSED, Refusal.ENDED)
    buffer.lose_worker("worker-1")
    assert buffer.offer(make_group(second), None).reason is Refusal.ENDED
    buffer.close()
    assert buffer.offer(make_group(second), None).reason is Refusal.CLOSED
    assert buffer.counts == Counts(admitted=2, unused=2)


def test_group_of_a_lost_engine_keeps_its_credit_and_is_admitted_first() -> None:
    buffer = serving(groups_per_step=2, max_staleness=0)
    first, second = buffer.admit("worker-0"), buffer.admit("worker-1")
    held = buffer.credits_held
    assert buffer.hand_back(first)
    buffer.check()
    assert buffer.credits_held == held
    assert (buffer.num_generating, buffer.num_to_reissue, buffer.admissible()) == (1, 1, 1)
    # An offer of the lost engine that comes late is refused.
    assert buffer.offer(make_group(first), None).outcome is OfferOutcome.REFUSED
    assert buffer.admit("worker-1") == first
    assert buffer.admissible() == 0
    for group_id in (first, second):
        assert buffer.offer(make_group(group_id), None).outcome is OfferOutcome.ACCEPTED
    assert not buffer.hand_back(first)
    batch = buffer.take(0)
    assert batch is not None
    assert batch.group_ids == (first, second)


def test_continued_group_keeps_the_deadline_of_its_partial_completions() -> None:
    buffer = serving(groups_per_step=1, max_staleness=2)
    group_id = buffer.admit("worker-0")
    assert not buffer.continues(group_id)
    buffer.hand_back(group_id, oldest_version=0)
    buffer.serve(1)
    assert buffer.admit("worker-1") == group_id
    assert buffer.continues(group_id)
    assert buffer._generating[group_id].deadline == 2  # not 3: its oldest tokens are of version 0
    assert buffer.offer(make_group(group_id, version=0), None).outcome is OfferOutcome.ACCEPTED
    buffer.check()


def test_group_starts_again_when_its_partial_completions_are_too_old() -> None:
    buffer = serving(groups_per_step=1, max_staleness=1)
    late, other = buffer.admit("worker-0"), buffer.admit("worker-1")
    buffer.offer(make_group(other), None)
    buffer.hand_back(late, oldest_version=0)
    batch = buffer.take(0)
    assert batch is not None
    assert batch.group_ids == (other,)
    buffer.trained([other])
    buffer.serve(1)
    buffer.release([other])
    assert buffer.take(1) is None
    assert buffer.admit("worker-1") == late
    assert not buffer.continues(late)
    assert buffer._generating[late].deadline == 2
    buffer.check()


def test_lost_worker_hands_back_its_running_groups_and_its_offered_groups_stay() -> None:
    buffer = serving(groups_per_step=4)
    admit_and_offer(buffer)
    mine, other = buffer.admit("worker-0"), buffer.admit("worker-1")
    assert buffer.lose_worker("worker-0") == (mine,)
    assert (buffer.num_buffered, buffer.num_generating, buffer.num_to_reissue) == (1, 1, 1)
    assert buffer.admissible() == 2
    assert buffer.admit("worker-1") == mine
    assert buffer.fail(other, why="engine out of memory")
    assert not buffer.fail(other, why="engine out of memory")
    assert buffer.failures == {"engine out of memory": 1}


# Takes.


def test_take_is_in_admission_order_and_keeps_the_surplus() -> None:
    buffer = serving(groups_per_step=2, max_staleness=1)
    group_ids = [buffer.admit("worker-0") for _ in range(3)]
    for group_id in reversed(group_ids):
        buffer.offer(make_group(group_id, num_tokens=3 + group_id), f"payload-{group_id}")
    batch = buffer.take(0)
    assert batch is not None
    assert (batch.learner_version, batch.group_ids, batch.oldest_versions) == (
        0,
        (0, 1),
        (0, 0),
    )
    assert batch.references == ("payload-0", "payload-1")
    assert batch.evicted == ()
    assert buffer.num_buffered == 1


def test_a_take_prefers_the_earliest_deadline_to_the_earliest_admission() -> None:
    buffer = serving(max_staleness=2)
    admit_and_offer(buffer, version=2)  # started later than it was admitted, under newer weights
    admit_and_offer(buffer, version=1)
    batch = buffer.take(2)
    assert batch is not None
    assert batch.group_ids == (1,)


def test_take_waits_for_a_straggler_only_when_its_deadline_would_be_lost() -> None:
    buffer = serving(groups_per_step=1, max_staleness=2)
    straggler = buffer.admit("worker-1")  # deadline 2
    for version in (0, 1):  # at both versions a place for the straggler is left
        group_id = admit_and_offer(buffer)
        assert buffer.take(version) is not None
        buffer.trained([group_id])
    buffer.serve(2)
    buffer.release([1, 2])
    admit_and_offer(buffer, version=2)
    assert buffer.take(2) is None
    assert "1 of 1 groups finished, but taking them would lose deadline 2" in buffer.explain_wait(2)
    buffer.offer(make_group(straggler), None)
    batch = buffer.take(2)
    assert batch is not None
    assert batch.group_ids == (straggler,)


def test_credits_of_a_step_return_only_when_its_weights_are_served() -> None:
    buffer = serving(groups_per_step=2)
    group_ids = [admit_and_offer(buffer) for _ in range(2)]
    assert buffer.take(0) is not None
    buffer.trained(group_ids)
    assert buffer.admissible() == 0
    assert buffer.counts == Counts(admitted=2, trained=2)
    with pytest.raises(AssertionError, match="waits for version 1, but 0 is served"):
        buffer.release(group_ids[:1])
    buffer.serve(1)
    buffer.release(group_ids[1:])
    assert buffer.admissible() == 1
    with pytest.raises(AssertionError, match="waits for no weights"):
        buffer.release(group_ids[1:])


def test_skipped_step_returns_its_credits_without_a_new_version() -> None:
    buffer = serving()
    group_id = admit_and_offer(buffer)
    assert buffer.take(0) is not None
    buffer.skipped([group_id])
    assert buffer.counts == Counts(admitted=1, skipped=1)
    buffer.release([group_id])
    admit_and_offer(buffer)
    assert buffer.take(0) is not None


def test_served_and_learner_versions_never_go_back() -> None:
    buffer = serving()
    buffer.serve(3)
    buffer.take(3)
    with pytest.raises(AssertionError, match="served version went from 3 to 2"):
        buffer.serve(2)
    with pytest.raises(AssertionError, match="learner version went from 3 to 2"):
        buffer.take(2)


# Faults.


def test_a_group_that_attests_a_passed_deadline_is_evicted_when_offered() -> None:
    buffer = serving(max_staleness=1)
    buffer.serve(3)
    late = buffer.admit("worker-0")
    assert buffer.take(3) is None
    assert buffer.offer(make_group(late, version=1), None) == OfferResult(OfferOutcome.EVICTED)
    admit_and_offer(buffer, version=3)
    batch = buffer.take(3)
    assert batch is not None
    assert batch.evicted == (late,)
    assert buffer.counts == Counts(admitted=2, evicted=1, in_flight=1)


def test_overload_is_evicted_during_generation_even_if_the_take_waits() -> None:
    buffer = serving(max_staleness=1)
    buffer.admit("worker-0")
    buffer.admit("worker-1")
    assert buffer.evict_doomed(0) == {}
    assert buffer.evict_doomed(1) == {1: "worker-1"}  # two groups with deadline 1, one place left
    assert buffer.take(1) is None
    assert buffer.counts == Counts(admitted=2, evicted=1, in_flight=1)


# Consecutive rejects, acceptance, close.


def test_only_correct_answers_mean_solved() -> None:
    buffer = serving(max_rejected_in_a_row=3)
    for _ in range(3):
        assert buffer.stop_reason is None
        admit_and_offer(buffer, accuracies=RIGHT)
    assert buffer.stop_reason is not None
    assert buffer.stop_reason.solved
    assert buffer.stop_reason.reason == "task solved: 3 groups in a row were all correct"
    assert buffer.admissible() == 0


def test_other_rejects_mean_stuck_with_the_counts_per_reason() -> None:
    buffer = serving(max_rejected_in_a_row=3)
    for accuracies in (RIGHT, WRONG, RIGHT):
        admit_and_offer(buffer, accuracies=accuracies)
    assert buffer.stop_reason is not None
    assert not buffer.stop_reason.solved
    assert buffer.stop_reason.rejected == {RejectReason.ALL_CORRECT: 2, RejectReason.ALL_WRONG: 1}
    assert buffer.stop_reason.reason.startswith(
        "the filters rejected 3 groups in a row (all_correct 2, all_wrong 1)"
    )
    assert "but the filters rejected 3 groups" in buffer.explain_wait(0)


def test_acceptance_counts_one_step_and_its_refill_waves_at_staleness_zero() -> None:
    buffer = serving(groups_per_step=3)
    group_ids = [buffer.admit("worker-0") for _ in range(3)]
    for group_id, accuracies in zip(group_ids, (WRONG, MIXED, RIGHT), strict=True):
        buffer.offer(make_group(group_id, accuracies=accuracies), None)
    admit_and_offer(buffer, accuracies=WRONG)  # one wave of two: this group and the next
    buffer.admit("worker-0")
    buffer.admit("worker-0")
    buffer.offer(make_group(4), None)
    buffer.offer(make_group(5), None)
    buffer.offer(make_group(99), None)
    batch = buffer.take(0)
    assert batch is not None
    expected = StepAcceptance(
        accepted=3,
        rejected={RejectReason.ALL_WRONG: 2, RejectReason.ALL_CORRECT: 1},
        refused=1,
        refill_waves=2,
    )
    assert buffer.acceptance == expected
    assert (expected.offered, expected.rate) == (6, 0.5)
    buffer.trained(batch.group_ids)
    buffer.serve(1)
    buffer.release(batch.group_ids)
    for _ in range(3):
        admit_and_offer(buffer, version=1)
    buffer.take(1)
    assert buffer.acceptance == StepAcceptance(accepted=3, refill_waves=0)


def test_refill_waves_are_not_counted_above_staleness_zero() -> None:
    buffer = serving(max_staleness=1)
    admit_and_offer(buffer, accuracies=WRONG)
    admit_and_offer(buffer)
    buffer.take(0)
    assert buffer.acceptance == StepAcceptance(
        accepted=1, rejected={RejectReason.ALL_WRONG: 1}, refill_waves=None
    )


def test_close_ends_all_groups_as_unused_and_accepts_a_late_release() -> None:
    buffer = serving(max_staleness=3)
    first = admit_and_offer(buffer)
    buffer.take(0)
    buffer.trained([first])
    admit_and_offer(buffer)
    buffer.take(1)
    admit_and_offer(buffer)
    buffer.admit("worker-0")
    assert buffer.close() == Counts(admitted=4, trained=1, unused=3)
    assert buffer.admissible() == 0
    buffer.serve(1)
    buffer.release([first])
    buffer.check()
    assert buffer.credits_held == 0


def test_wait_message_names_what_a_take_waits_for() -> None:
    buffer = serving(groups_per_step=3, max_staleness=1)
    batch = [admit_and_offer(buffer) for _ in range(3)]
    buffer.take(0)
    buffer.trained(batch)
    admit_and_offer(buffer)
    buffer.admit("worker-1")
    admit_and_offer(buffer, accuracies=WRONG)
    buffer.lose_worker("worker-2")
    assert buffer.explain_wait(1) == (
        "take at version 1 waits: 1 of 3 groups finished; "
        "1 generating on 1 worker(s) (first: group 4 on worker-1, deadline 1); "
        "3 credits held by trained groups whose weights are not on every engine "
        "(served version 0); 1 more could start, but no worker asks; "
        "since the last take 2 offered, 1 accepted, all_wrong 1"
    )
    assert "no engine has attested a version yet" in make_buffer().explain_wait(0)
