"""Advice when engines have slots that no sequence can occupy.

In: a config, and for a run its idle shares. Out: one line, which dry runs and summaries print.
"""

from __future__ import annotations

from collections.abc import Mapping

from dapo_async.config import Config

QUEUED_SHARE = 0.1  # of all slots, from which on a queue is worth a line
HIGHEST_STALENESS = 8  # the most that is advised: beyond it the loss needs a smaller learning rate


def slot_advice(config: Config) -> str | None:
    """One line if some slots can never be occupied; None if the credits suffice for all slots.

    With n groups per step and a staleness bound of S there are (S + 1)·n credits, so at most
    (S + 1)·n·G sequences are in flight.
    """
    replay, rollout = config.replay, config.rollout
    per_step = replay.groups_per_step * replay.group_size
    allowed = (replay.max_staleness + 1) * per_step
    slots = rollout.num_workers * rollout.num_slots
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


def queue_advice(config: Config, idle: Mapping[str, float]) -> str | None:
    """One line if many requests waited in the queues of SGLang servers, else None.

    `idle`: the idle shares of a run by part. A server queues what its memory for keys and values
    has no room for, so fewer slots give the same speed with fresher tokens.
    """
    queued = idle.get("rollout.queued", 0.0)
    if queued < QUEUED_SHARE:
        return None
    num_slots, occupied = config.rollout.num_slots, 1.0 - idle["rollout"]
    enough = max(1, round(num_slots * occupied / (occupied + queued)))
    return (
        f"{queued:.0%} of the slots waited in the servers' queues, mostly for KV memory: set "
        f"rollout.num_slots={enough}, or give the servers more memory (rollout.server_flags)"
    )
