"""Filters of scored groups. The buffer calls each with every offered group.

A filter returns the reason to reject the group, or None to keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dapo_async.types import Group, GroupFacts, RejectReason
from dapo_async.utils.plugins import load_function

Filter = Callable[[Group | GroupFacts], RejectReason | None]


def dynamic_sampling(group: Group | GroupFacts) -> RejectReason | None:
    """Keeps a group iff its accuracies are not all equal: equal ones have no gradient.

    Source: DAPO, arXiv 2503.14476, eq. 11 (0 < number of correct siblings < G). It reads the raw
    accuracy, not the shaped reward: a group of wrong answers that differ only in overlong shaping
    is rejected.
    """
    lowest, highest = min(group.accuracies), max(group.accuracies)
    if lowest < highest:
        return None
    if lowest == 1.0:
        return RejectReason.ALL_CORRECT
    if highest == 0.0:
        return RejectReason.ALL_WRONG
    return RejectReason.ALL_EQUAL


def has_tokens(group: Group | GroupFacts) -> RejectReason | None:
    """Rejects a group without any response token: it adds nothing to the loss."""
    return None if group.num_response_tokens else RejectReason.TOO_FEW_TOKENS


def custom_filter(name: str) -> Filter:
    """The user's `module:function` of `(group: Group) -> bool`, true to keep.

    Raises ValueError when there is no such function.
    """
    keeps = load_function(name, knob="replay.filter", parameters=("group",))

    def filtered(group: Group | GroupFacts) -> RejectReason | None:
        assert isinstance(group, Group), "the user's filter reads the whole group"
        kept = keeps(group)
        assert isinstance(kept, bool), (
            f"{name} returned {type(kept).__name__}, must return bool: true keeps the group"
        )
        return None if kept else RejectReason.FILTERED

    return filtered


def first_reason(group: Group | GroupFacts, filters: Sequence[Filter]) -> RejectReason | None:
    """The reason of the first filter that rejects `group`; None when all keep it."""
    for filter_ in filters:
        reason = filter_(group)
        if reason is not None:
            return reason
    return None
