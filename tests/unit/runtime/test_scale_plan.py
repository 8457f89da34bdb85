"""Which workers start and which leave, for a number that somebody asks for."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from dapo_async.runtime.scale_plan import Change, Member, next_change


def members(*numbers: int, node_id: str | None = None, serves: bool = True) -> list[Member]:
    return [Member(f"rollout-{number}", serves, node_id) for number in numbers]


def test_more_workers_get_the_lowest_free_numbers() -> None:
    assert next_change(4, members(0, 2)) == Change(start=("rollout-1", "rollout-3"))


def test_name_of_a_worker_that_is_leaving_is_not_free() -> None:
    change = next_change(3, members(0, 1), leaving=["rollout-2"])
    assert change == Change(start=("rollout-3",))


def test_highest_numbers_leave_first() -> None:
    assert next_change(1, members(0, 1, 10)) == Change(drain=("rollout-1", "rollout-10"))


def test_worker_that_does_not_serve_leaves_before_those_that_do() -> None:
    there = [*members(0, serves=False), *members(1, 2)]
    assert next_change(2, there) == Change(drain=("rollout-0",))


def test_workers_of_a_node_that_goes_are_replaced_elsewhere() -> None:
    there = [*members(0, 1, node_id="spot"), *members(2, node_id="kept")]
    change = next_change(3, there, going_nodes=["spot"])
    assert change == Change(start=("rollout-3", "rollout-4"), drain=("rollout-0", "rollout-1"))


def test_fewer_workers_leave_the_node_that_goes_first() -> None:
    there = [*members(0, node_id="spot"), *members(1, node_id="kept")]
    assert next_change(1, there, going_nodes=["spot"]) == Change(drain=("rollout-0",))


def test_nothing_changes_when_the_number_is_right() -> None:
    assert next_change(2, members(0, 1)) == Change()


MEMBERS = st.lists(
    st.builds(
        Member,
        st.integers(0, 12).map(lambda number: f"rollout-{number}"),
        st.booleans(),
        st.sampled_from([None, "a", "b", "c"]),
    ),
    unique_by=lambda each: each.name,
)


@given(st.integers(1, 12), MEMBERS, st.sets(st.sampled_from("abc")), st.sets(st.integers(13, 20)))
def test_change_leads_to_the_number_asked_for_in_one_step(
    wanted: int, there: Sequence[Member], going: set[str], numbers: set[int]
) -> None:
    leaving = {f"rollout-{number}" for number in numbers}
    change = next_change(wanted, there, leaving=leaving, going_nodes=going)
    names = {each.name for each in there}
    after = names - set(change.drain) | set(change.start)
    assert len(after) == wanted
    assert set(change.drain) <= names
    assert not set(change.start) & (names | leaving), "two workers would have one name"
    assert not [each for each in there if each.name in after and each.node_id in going]
    new = [*there, *(Member(name, False) for name in change.start)]
    stays = [each for each in new if each.name in after]
    assert next_change(wanted, stays, leaving=leaving, going_nodes=going) == Change()
