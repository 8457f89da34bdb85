"""Which files of a run directory are whole, and whether every admission ended once.

In: a run directory that no process writes. Out: findings, each one line. Called by
`dapo-async verify`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dapo_async.replay.group_io import read_groups
from dapo_async.replay.state_io import GROUPS_FILE, STATE_FILE, read_outcomes
from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.checkpoint_dir import STATE, CheckpointFolder
from dapo_async.utils.files import PARTIAL
from dapo_async.utils.manifest import damage
from dapo_async.utils.reasons import unreadable


@dataclass(frozen=True, slots=True)
class Finding:
    """One line about one thing that was checked."""

    text: str
    is_whole: bool = True


def verify_run(run_dir: RunDir) -> Iterator[Finding]:
    """Checks a run directory part by part."""
    folder = CheckpointFolder(run_dir.checkpoints)
    for version in folder.versions():
        yield from _checkpoint(folder, version)
    if not folder.versions():
        yield Finding("checkpoints: none yet")
    for left in sorted(folder.root.glob(f"step_*{PARTIAL}")):
        yield Finding(f"{left.name}: unfinished; the next checkpoint removes it")
    yield from _listed_files(run_dir)
    yield from _metrics(run_dir)
    yield from _trained_once(run_dir)


def _checkpoint(folder: CheckpointFolder, version: int) -> Iterator[Finding]:
    path = folder.path(version)
    try:
        sums = folder.manifest(version)
    except ValueError as error:
        yield Finding(f"{path.name}: {error}", is_whole=False)
        return
    if sums is None:
        yield Finding(f"{path.name}: it has no checksums, so its files can't be checked")
    else:
        found = damage(path, sums)
        yield from (Finding(f"{path.name}: {line}", is_whole=False) for line in found)
        if not found:
            size = sum(each.num_bytes for each in sums.values()) / 2**20
            yield Finding(f"{path.name}: whole, {len(sums)} files, {size:,.1f} MiB")
    yield _admissions(path)


def _admissions(checkpoint: Path) -> Finding:
    """Conservation up to a checkpoint: every admission has ended, or is open, exactly once."""
    name = f"{checkpoint.name}: admissions"
    try:
        counts, _ = read_outcomes(checkpoint / STATE)
        state: dict[str, Any] = json.loads((checkpoint / STATE / STATE_FILE).read_text())
        finished = [int(each["group_id"]) for each in state["buffered"]]
        open_ids = [*map(int, state["reissue"]), *finished]
        kept = [group.group_id for group in read_groups(checkpoint / STATE / GROUPS_FILE)]
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        own_words = type(error) in (ValueError, SafetensorError)
        why = str(error) if own_words else unreadable(error)
        return Finding(f"{name}: {why}", is_whole=False)
    ended = counts.admitted - counts.in_flight
    fault = ""
    if sorted(kept) != sorted(finished):
        fault = f"{GROUPS_FILE} has the groups {kept}, {STATE_FILE} names {finished}"
    elif len(set(open_ids)) != len(open_ids):
        fault = "a group is open twice"
    elif any(not 0 <= group_id < counts.admitted for group_id in open_ids):
        fault = "a group is open that was never admitted"
    else:
        try:
            counts.check()
        except AssertionError as error:
            fault = str(error)
    if fault:
        return Finding(f"{name}: {fault}", is_whole=False)
    return Finding(f"{name}: {counts.admitted}, of them {ended} ended once, {len(open_ids)} open")


def _listed_files(run_dir: RunDir) -> Iterator[Finding]:
    try:
        listed = run_dir.listed_files()
    except ValueError as error:
        yield Finding(str(error), is_whole=False)
        return
    found = damage(run_dir.root, listed)
    yield from (Finding(line, is_whole=False) for line in found)
    by_folder: defaultdict[str, int] = defaultdict(int)
    for name in listed:
        by_folder[name.partition("/")[0]] += 1
    if not found:
        yield from (Finding(f"{name}: {count} files whole") for name, count in by_folder.items())


def _metrics(run_dir: RunDir) -> Iterator[Finding]:
    """Every step has one row, in order."""
    if not run_dir.metrics.exists():
        yield Finding("metrics.jsonl: none yet")
        return
    steps = []
    for number, line in enumerate(run_dir.metrics.read_text().splitlines(), start=1):
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, TypeError, KeyError) as error:
            text = f"metrics.jsonl: row {number} can't be read ({unreadable(error)})"
            yield Finding(text, is_whole=False)
            return
    if steps != [*range(len(steps))]:
        wrong = next(place for place, step in enumerate(steps) if place != step)
        text = f"metrics.jsonl: row {wrong + 1} has step {steps[wrong]}, must have step {wrong}"
        yield Finding(text, is_whole=False)
    else:
        yield Finding(f"metrics.jsonl: {len(steps)} steps, a row for each")


def _trained_once(run_dir: RunDir) -> Iterator[Finding]:
    """No group is in the samples of two steps; with `train.record` these are all groups."""
    step_of: dict[int, str] = {}
    twice = False
    for path in sorted(run_dir.rollouts.glob("step_*.jsonl")):
        try:
            ids = {int(json.loads(line)["group_id"]) for line in path.read_bytes().splitlines()}
        except (OSError, ValueError, TypeError, KeyError) as error:
            yield Finding(f"{path} can't be read ({unreadable(error)})", is_whole=False)
            continue
        for group_id in sorted(ids & step_of.keys()):
            text = f"group {group_id} was trained twice: {step_of[group_id]} and {path.name}"
            yield Finding(text, is_whole=False)
            twice = True
        step_of.update(dict.fromkeys(ids, path.name))
    if step_of and not twice:
        yield Finding(f"rollouts: {len(step_of)} groups, each in one step")
