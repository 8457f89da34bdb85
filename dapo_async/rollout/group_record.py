"""What a rollout worker records about one group, for `dapo-async trace`.

In: the times of its siblings and of weight updates, all in seconds of `time.monotonic`. Out: a line
of JSON. Its times are milliseconds since the worker got the admission, so that clocks of different
machines do not matter. The replay actor writes the line into `groups.jsonl`, see
`tracking/group_log.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dapo_async.rollout.engine import SiblingTimes
from dapo_async.types import Completion


@dataclass(frozen=True, slots=True)
class Update:
    """A weight update of the engine."""

    version: int
    began_s: float
    ended_s: float


def group_record(
    completions: Sequence[Completion],
    times: SiblingTimes,
    updates: Iterable[Update],
    *,
    admitted_s: float,
    scored_s: float,
) -> str:
    """`{"siblings": […], "updates": […], "scored": ms}`.

    A sibling is `[start, first token, end, first version, last version]`; null stands for a time
    that the engine does not know, such as the start of a sibling that another engine had ended.
    An update is `[version, start, end]`; only those that the group lived through are in the list.
    """

    def ms(time_s: float | None) -> int | None:
        return None if time_s is None else round((time_s - admitted_s) * 1e3)

    siblings = [
        [
            *(ms(moments[sibling]) for moments in (times.started, times.first_token, times.ended)),
            completion.prefill_version,
            _last_version(completion),
        ]
        for sibling, completion in enumerate(completions)
    ]
    starts_s = [time_s for time_s in times.started if time_s is not None]
    ends_s = [time_s for time_s in times.ended if time_s is not None]
    lived = [
        [update.version, ms(update.began_s), ms(update.ended_s)]
        for update in updates
        if starts_s and ends_s and update.ended_s > min(starts_s) and update.began_s < max(ends_s)
    ]
    record = {"siblings": siblings, "updates": lived, "scored": ms(scored_s)}
    return json.dumps(record, separators=(",", ":"))


def _last_version(completion: Completion) -> int:
    versions = completion.weight_versions  # they never decrease within a response
    return int(versions[-1]) if len(versions) else completion.prefill_version
