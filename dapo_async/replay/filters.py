"""Dynamic sampling: a scored group arrives at `offer`, a reject reason or None leaves. Called by the buffer, once per group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dapo_async.types import Group, RejectReason
from dapo_async.utils.plugins import load_function

Filter = Callable[[Group], RejectReason | None]


def dynamic_sampling(group: Group) -> RejectReason | None:
    """Keeps a group iff its raw accuracies are not all equal: equal ones have no advantage and hence no gradient.

    Source: DAPO, arXiv 2503.14476, eq. 11 (0 < number of correct siblings < G). It reads the raw accuracy, never the shaped reward:
    overlong shaping alone must not make a group of wrong answers worth training.
    """
    lowest, highest = min(group.accuracies), max(group.accuracies)
    if lowest < highest:
        return None
    if lowest == 1.0:
        return RejectReason.ALL_CORRECT
    if highest == 0.0:
        return RejectReason.ALL_WRONG
    return RejectReason.ALL_EQUAL


def has_tokens(group: Group) -> RejectReason | None:
    """Rejects a group without a single response token: it would add nothing to the loss but its place in the batch."""
    return (
        None
        if any(rollout.num_tokens for rollout in group.rollouts)
        else RejectReason.TOO_FEW_TOKENS
    )


def custom_filter(name: str) -> Filter:
    """The user's `module:function` of `(group: Group) -> bool`, true to keep. Raises ValueError when it is none."""
    keeps = load_function(name, knob="replay.filter", parameters=("group",))

    def filtered(group: Group) -> RejectReason | None:
        kept = keeps(group)
        assert isinstance(kept, bool), (
            f"{name} returned {type(kept).__name__}, must return bool: true keeps the group"
        )
        return None if kept else RejectReason.FILTERED

    return filtered


def first_reason(group: Group, filters: Sequence[Filter]) -> RejectReason | None:
    """The reason of the first filter that rejects `group`; None when all keep it."""
    for filter_ in filters:
        reason = filter_(group)
        if reason is not None:
            return reason
    return None
