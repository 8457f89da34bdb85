"""What of the buffer survives a resume (law 7): plain values that a checkpoint writes as JSON; the payloads of the finished groups go beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dapo_async.replay.state import Buffered

if TYPE_CHECKING:
    from dapo_async.replay.buffer import ReplayBuffer


@dataclass(frozen=True, slots=True)
class BufferState:
    """The buffer between two steps. Nobody generates after a resume: those groups, in `reissue`, keep their id and credit and are admitted once more."""

    version: int  # of the learner
    next_step: int
    admitted: int
    ended: Mapping[str, int]  # ending or reject reason → groups
    failures: Mapping[str, int]
    streak: Mapping[str, int]  # consecutive rejects by reason
    acceptance: Mapping[str, Any]  # of the step that is being filled
    reissue: tuple[int, ...]  # group ids, ascending
    buffered: Mapping[int, Buffered]  # by group id, in the order of their offers

    def to_json(self) -> dict[str, Any]:
        """Without payloads."""
        values = asdict(self)
        values["buffered"] = [
            {
                "group_id": group_id,
                **{
                    name: getattr(group, name)
                    for name in ("worker", "deadline", "oldest_version", "num_tokens")
                },
            }
            for group_id, group in self.buffered.items()
        ]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], payloads: Mapping[int, Any]) -> BufferState:
        """`payloads` by group id, one for each buffered group."""
        rows = [dict(row) for row in values["buffered"]]
        buffered = {
            group_id: Buffered(**row, payload=payloads[group_id])
            for row in rows
            for group_id in [row.pop("group_id")]
        }
        return cls(**{**values, "reissue": tuple(values["reissue"]), "buffered": buffered})


def freeze(buffer: ReplayBuffer, version: int) -> BufferState:
    """What a resume needs when the learner is at `version`; a batch that was taken and is not trained counts as finished groups.

    The buffer goes on unchanged, and what it does later does not reach the state.
    """
    assert all(taken.version == version for taken in buffer._taken.values()), (
        f"a step before version {version} is not booked"
    )
    back = {group_id: taken.group for group_id, taken in buffer._taken.items()}
    return BufferState(
        version=version,
        next_step=buffer.next_step - bool(back),
        **buffer._ledger.state(),
        failures=dict(buffer.failures),
        streak=buffer._patience.state(),
        acceptance=buffer._log.state(),
        reissue=tuple(sorted([*buffer._reissue, *buffer._generating])),
        buffered={**back, **buffer._buffered},
    )


def thaw(buffer: ReplayBuffer, state: BufferState) -> None:
    """Puts a new buffer into `state`. The credits of groups that were trained are free: no engine serves before it has their weights."""
    assert state.next_step <= buffer.num_steps, (state.next_step, buffer.num_steps)
    buffer.next_step, buffer.learner_version = state.next_step, state.version
    buffer._buffered, buffer._reissue = dict(state.buffered), dict.fromkeys(state.reissue, -1)
    outstanding = [*state.buffered, *state.reissue]
    buffer._ledger.restore(state.admitted, state.ended, outstanding)
    buffer._patience.restore(state.streak)
    buffer._log.restore(state.acceptance)
    buffer.failures.update(state.failures)
    buffer._suspect = True  # the next take looks at every deadline
    for group_id in outstanding:
        buffer._credits.spend(group_id)
