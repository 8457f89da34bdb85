"""The events of one group in order of time, from the files of a run directory (L3).

In: `groups.jsonl`, which `group_log.py` describes, and the samples in `rollouts/`. Out: text lines,
for `dapo-async trace`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_async.tracking.report_reading import rollout_file
from dapo_async.tracking.run_dir import RunDir

Event = Mapping[str, Any]
# Of groups that were offered: these say that they were not accepted.
NOT_ACCEPTED = ("rejected", "evicted", "refused")


@dataclass(frozen=True, slots=True)
class Moment:
    """One thing that happened; `time_s` counts from the start of its incarnation."""

    time_s: float
    text: str


def trace_group(root: Path, group_id: int) -> Iterator[str]:
    """One line per event of the group.

    Raises ValueError for a folder without the file, and for a group that the run never admitted.
    """
    path = RunDir(root).groups
    if not path.is_file():
        raise ValueError(
            f"{root} has no {path.name}; give the directory of a run that has admitted groups"
        )
    starts = list[Event]()
    found = list[tuple[int, Event]]()  # with the number of its incarnation
    largest = -1
    mark = str(group_id).encode()
    with path.open("rb") as file:
        for line in file:
            if mark not in line and b'"start"' not in line and b'"admitted"' not in line:
                continue
            event = _parsed(line)
            if event.get("event") == "start":
                starts.append(event)
            group_ids = event.get("group_ids", ())
            largest = max([largest, *group_ids])
            if group_id in group_ids:
                found.append((len(starts) - 1, event))
    if not found:
        raise ValueError(
            f"group {group_id} is not in {path}: "
            + (f"its groups are 0 to {largest}" if largest >= 0 else "no group was admitted yet")
        )
    yield from _header(root, group_id, found)
    for number in sorted({number for number, _ in found}):
        yield from _incarnation(
            group_id,
            starts[number] if number >= 0 else {},
            [event for place, event in found if place == number],
            is_first=number == found[0][0],
        )
    yield from _samples(root, group_id, found)


def _header(root: Path, group_id: int, found: Sequence[tuple[int, Event]]) -> Iterator[str]:
    (_, first), (_, last) = found[0], found[-1]
    row = _row_of(first, group_id)
    prompt = f", prompt {row} of the data set" if row is not None else ""
    yield f"group {group_id} of {root}{prompt}: {_outcome(last)}"


def _outcome(last: Event) -> str:
    name = str(last["event"])
    if name in ("released", "trained"):
        return "trained"
    if name == "rejected":
        return f"rejected ({last['reason']})"
    if name in ("evicted", "failed", "skipped", "unused"):
        return name
    return f"still in flight when this was written ({name.replace('_', ' ')})"


def _row_of(event: Event, group_id: int) -> int | None:
    rows, group_ids = event.get("rows"), event["group_ids"]
    if not rows or len(rows) != len(group_ids):
        return None
    row: int = rows[group_ids.index(group_id)]
    return row


def _incarnation(
    group_id: int, start: Event, events: Sequence[Event], *, is_first: bool
) -> Iterator[str]:
    if not is_first:
        yield f"the run was resumed at version {start.get('version')} and repeats the group:"
    moments = sorted(
        (moment for event in _with_acceptance(events) for moment in _moments(event, events)),
        key=lambda moment: moment.time_s,
    )
    before_s = moments[0].time_s if moments else 0.0
    yield f"{'time':>11} {'after':>9}  event"
    for moment in moments:
        yield f"{moment.time_s:9.3f} s {moment.time_s - before_s:+8.3f}  {moment.text}"
        before_s = moment.time_s


def _with_acceptance(events: Sequence[Event]) -> Iterator[Event]:
    """Adds `accepted` after an offer that was not refused or rejected."""
    for place, event in enumerate(events):
        yield event
        after = events[place + 1]["event"] if place + 1 < len(events) else ""
        if event["event"] == "offered" and after not in NOT_ACCEPTED:
            yield {"event": "accepted", "t": event["t"]}


def _moments(event: Event, events: Sequence[Event]) -> Iterator[Moment]:
    time_s, name = event["t"], event["event"]
    if name == "offered" and event.get("made"):
        admitted_s = _admission_before(event, events)
        yield from _generation(event, admitted_s)
    yield Moment(time_s, _TEXTS.get(name, "{event}").format_map(_Fields(event)))


def _admission_before(offered: Event, events: Sequence[Event]) -> float:
    admissions: list[float] = [
        each["t"]
        for each in events
        if each["event"] == "admitted" and each["worker"] == offered["worker"]
    ]
    return max((time_s for time_s in admissions if time_s <= offered["t"]), default=offered["t"])


def _generation(event: Event, admitted_s: float) -> Iterator[Moment]:
    """What the worker noted: the siblings, weight updates, and the score."""
    made, worker, tokens = event["made"], event["worker"], event["tokens"]

    def at(milliseconds: float) -> float:
        return float(admitted_s + milliseconds / 1e3)

    starts: Counter[tuple[int, int, int]] = Counter()
    names: dict[tuple[int, int, int], list[int]] = {}
    for sibling, (start, first, end, oldest, newest) in enumerate(made["siblings"]):
        if start is not None and first is not None:
            key = (start, first, oldest)
            starts[key] += 1
            names.setdefault(key, []).append(sibling)
        if end is not None:
            versions = f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}"
            yield Moment(
                at(end), f"sibling {sibling} ends with {tokens[sibling]} tokens of {versions}"
            )
    for (start, first, version), siblings in names.items():
        which = _siblings(siblings)
        yield Moment(
            at(start),
            f"{which} on {worker}'s engine; prefill until +{(first - start) / 1e3:.3f} s, "
            f"version {version}",
        )
    for version, start, end in made["updates"]:
        yield Moment(
            at(start), f"{worker} loads version {version}, within {(end - start) / 1e3:.3f} s"
        )
    yield Moment(
        at(made["scored"]), "scored: accuracy {accuracy:g}, reward {reward:g}".format(**event)
    )


def _siblings(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"sibling {numbers[0]} starts"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"siblings {numbers[0]} to {numbers[-1]} start"
    return f"siblings {', '.join(map(str, numbers))} start"


class _Fields(dict[str, Any]):
    """A missing field is shown as a question mark: the file may be of another version."""

    def __missing__(self, key: str) -> str:
        return "?"


_TEXTS = {
    "admitted": "admitted to {worker}; every engine serves version {version}",
    "offered": "offered by {worker}",
    "accepted": "accepted: it waits in the buffer",
    "rejected": "rejected: {reason}; its credit is free",
    "refused": "refused: {reason}",
    "given_up": "given up: {why}",
    "handed_back": "handed back with {tokens} tokens: its engine was lost",
    "taken": "taken for step {step}",
    "returned": "returned to the buffer: step {step} ended early",
    "trained": "trained",
    "skipped": "skipped: its step was not finite",
    "released": "released: every engine serves version {version}, the credit is free",
    "evicted": "evicted: its deadline had passed",
    "failed": "failed; its credit is free",
    "unused": "unused: the run ended first",
}


def _samples(root: Path, group_id: int, found: Sequence[tuple[int, Event]]) -> Iterator[str]:
    """Where its responses are, if the step kept them."""
    mark = f'"group_id": {group_id},'
    for _, event in found:
        if event["event"] != "taken" or "step" not in event:
            continue
        path = rollout_file(root, event["step"])
        if path.is_file() and mark in path.read_text(encoding="utf-8"):
            yield f"its responses are in {path}"
            return


def _parsed(line: bytes) -> dict[str, Any]:
    """Empty for a line that a kill has cut."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
