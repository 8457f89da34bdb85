"""The whole state of a replay buffer as plain values, and a buffer in this state.

A checkpoint's `BufferState` is for a resumed run, in which no group is generating and no credit is
waiting. An image is for a replay actor that is restarted while the run goes on. Only the journal
uses it. This module is a friend of the buffer: it reads and sets its private parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from dapo_async.replay.buffer import ReplayBuffer
from dapo_async.replay.state import Buffered, Generating, Taken
from dapo_async.replay.stop_rule import StopReason
from dapo_async.replay.token_flow import TokenOutcome
from dapo_async.types import RejectReason

PLAIN = (  # attributes that are plain values
    "next_step",
    "served_version",
    "learner_version",
    "closed",
    "num_offered",
    "num_accepted",
    "_taken_now",
    "cut_version",
    "_suspect",
)


def image_of(buffer: ReplayBuffer) -> dict[str, Any]:
    """Everything but the groups themselves, as JSON values."""
    stop = buffer.stop_reason
    tokens = buffer.tokens.counts
    return {
        "plain": {name: getattr(buffer, name) for name in PLAIN},
        "failures": dict(buffer.failures),
        "tokens": {
            "resumed": tokens.resumed,
            "accepted": tokens.accepted,
            "ended": {outcome.value: count for outcome, count in tokens.ended.items()},
        },
        "ledger": buffer._ledger.state(),
        "streak": buffer._streak.state(),
        "stopped": None if stop is None else {each.value: n for each, n in stop.rejected.items()},
        "log": buffer._log.state(),
        "closed_logs": [[version, state] for version, state in buffer._closed_logs.items()],
        "generating": [
            [group_id, each.worker, each.deadline, each.continues]
            for group_id, each in buffer._generating.items()
        ],
        "buffered": [[group_id, *_values(each)] for group_id, each in buffer._buffered.items()],
        "taken": [
            [group_id, each.version, *_values(each.group)]
            for group_id, each in buffer._taken.items()
        ],
        "reissue": [[group_id, deadline] for group_id, deadline in buffer._reissue.items()],
        "awaiting": [[group_id, version] for group_id, version in buffer._awaiting.items()],
        "evicted_since_take": [*buffer._evicted_since_take],
    }


def load_image(
    buffer: ReplayBuffer, image: Mapping[str, Any], payload: Callable[[int], Any]
) -> None:
    """Brings a new `buffer` into the state of `image`. `payload(group_id)` gives a finished group.

    The options of the buffer must be those of the buffer before.
    """
    for name, value in image["plain"].items():
        setattr(buffer, name, value)
    buffer.failures = Counter(image["failures"])
    tokens = image["tokens"]
    buffer.tokens.resume(tokens["resumed"])
    buffer.tokens.accept(tokens["accepted"])
    for name, count in tokens["ended"].items():
        buffer.tokens.end(_outcome(name), count)
    buffer._streak.restore(image["streak"])
    if image["stopped"] is not None:
        rejected = {RejectReason(name): count for name, count in image["stopped"].items()}
        buffer._streak.stop_reason = StopReason(rejected)
    buffer._log.restore(image["log"])
    buffer._closed_logs = dict(image["closed_logs"])
    for group_id, worker, deadline, continues in image["generating"]:
        buffer._generating[group_id] = Generating(worker, deadline, continues)
        buffer._generating_on[worker] += 1
        buffer._deadlines.start(deadline)
    for group_id, *values in image["buffered"]:
        buffer._keep(group_id, _buffered(values, payload(group_id)))
    for group_id, version, *values in image["taken"]:
        buffer._taken[group_id] = Taken(version, _buffered(values, payload(group_id)))
    buffer._reissue = dict(image["reissue"])
    buffer._awaiting = dict(image["awaiting"])
    buffer._evicted_since_take = [*image["evicted_since_take"]]
    open_groups = [
        *buffer._generating,
        *buffer._buffered,
        *buffer._taken,
        *buffer._reissue,
    ]
    for group_id in [*open_groups, *buffer._awaiting]:
        buffer._credits.spend(group_id)
    ledger = image["ledger"]
    buffer._ledger.restore(ledger["admitted"], ledger["ended"], open_groups)


def _values(group: Buffered) -> list[Any]:
    return [group.worker, group.deadline, group.oldest_version, group.num_response_tokens]


def _buffered(values: list[Any], payload: Any) -> Buffered:
    worker, deadline, oldest_version, num_response_tokens = values
    return Buffered(worker, deadline, oldest_version, payload, num_response_tokens)


def _outcome(name: str) -> TokenOutcome | RejectReason:
    reasons = {reason.value for reason in RejectReason}
    return RejectReason(name) if name in reasons else TokenOutcome(name)
