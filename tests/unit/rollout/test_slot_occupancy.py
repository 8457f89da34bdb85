"""Occupied slots by the rule of the worker, in virtual time with the real buffer and pacer."""

from __future__ import annotations

import pytest
from support.simulated_run import UNLIMITED, Outcome, both_rules


def both(
    group_size: int, *, tail: float, max_staleness: int, num_steps: int = 20
) -> tuple[Outcome, Outcome]:
    """One engine of 128 slots that asks by whole groups, and by siblings; a fast learner."""
    before, after = both_rules(
        group_size, tail=tail, max_staleness=max_staleness, num_steps=num_steps
    )
    assert before.most_in_flight <= 128 + group_size
    assert after.most_in_flight <= 128 + 2 * group_size - 1
    return before, after


@pytest.mark.parametrize("tail", [1.0, 1.5])
@pytest.mark.parametrize("group_size", [8, 16])
def test_with_credits_for_all_slots_a_heavy_tail_leaves_none_empty(
    group_size: int, tail: float
) -> None:
    before, after = both(group_size, tail=tail, max_staleness=UNLIMITED)
    assert before.occupancy < 0.55
    assert after.occupancy > 0.999


@pytest.mark.parametrize(
    ("group_size", "max_staleness", "gain"),
    [(8, 1, 1.1), (8, 2, 1.35), (8, 4, 2.0), (16, 1, 1.15), (16, 2, 1.5), (16, 4, 2.2)],
)
def test_with_scarce_credits_a_heavy_tail_leaves_fewer_empty_slots(
    group_size: int, max_staleness: int, gain: float
) -> None:
    before, after = both(group_size, tail=1.0, max_staleness=max_staleness, num_steps=100)
    assert after.occupancy >= gain * before.occupancy
    assert after.rate >= gain * before.rate


@pytest.mark.parametrize("max_staleness", [UNLIMITED, 1, 4])
@pytest.mark.parametrize("group_size", [8, 16])
def test_without_a_tail_both_rules_occupy_every_slot(group_size: int, max_staleness: int) -> None:
    before, after = both(group_size, tail=0.0, max_staleness=max_staleness)
    assert after.occupancy >= before.occupancy > 0.999


def test_a_simulated_run_repeats_exactly() -> None:
    assert both(8, tail=1.0, max_staleness=1) == both(8, tail=1.0, max_staleness=1)
