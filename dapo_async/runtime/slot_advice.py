"""Advice when the credits allow fewer sequences than the engines have slots.

In: a config. Out: one line, which dry runs and summaries print.
"""

from __future__ import annotations

from dapo_async.config import Config

HIGHEST_STALENESS = 8  # the most that is advised: beyond it the loss needs a smaller learning rate


def slot_advice(config: Config) -> str | None:
    """One line if some slots can never be occupied; None if the credits suffice for all slots.

    Engines that find the number of their slots have no more than the credits allow.

    With n groups per step and a staleness bound of S there are (S + 1)·n credits, so at most
    (S + 1)·n·G sequences are in flight.
    """
    replay, rollout = config.replay, config.rollout
    if rollout.adapts_slots:
        return None
    per_step = replay.groups_per_step * replay.group_size
    allowed = (replay.max_staleness + 1) * per_step
    slots = rollout.num_workers * rollout.fixed_slots
    if allowed >= slots:
        return None
    matching = [f"rollout.num_slots={max(1, allowed // rollout.num_workers)}"]
    staleness = -(-slots // per_step) - 1
    lockstep = replay.admission == "lockstep"  # which needs a staleness of 0
    if staleness <= HIGHEST_STALENESS and not lockstep:
        matching.insert(0, f"replay.max_staleness={staleness}")
    return (
        f"credits allow {allowed} sequences in flight, the engines have {slots} slots: "
        f"set {' or '.join(matching)}"
    )
