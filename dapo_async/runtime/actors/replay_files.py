"""The files of the replay actor: its part of a checkpoint, samples, recorded batches, its log.

All but the checkpoint is written beside the actor's thread, and a run goes on without it. In:
groups and rows of the replay actor. Out: files of the run directory, and counts of what the disk
refused.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dapo_async.replay import BufferState
from dapo_async.replay.group_io import pack_group, read_groups, unpack_group, write_groups
from dapo_async.replay.state_io import GROUPS_FILE, STATE_FILE
from dapo_async.runtime.actors.offers import Bytes
from dapo_async.tracking.group_log import GroupLog
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.samples import choose_samples, write_rollouts
from dapo_async.types import Group, GroupFacts
from dapo_async.utils.files import disk_fault

SAMPLE_GROUPS = 2  # per step in rollouts/, unless train.record asks for all


@dataclass(slots=True)
class Payload:
    """An accepted group: its facts, and the whole of it, packed."""

    facts: GroupFacts
    data: Bytes

    @property
    def group(self) -> Group:
        return unpack_group(self.data)


def write_state(folder: Path, state: BufferState) -> None:
    """The replay part of a checkpoint: the buffer's state as JSON, finished groups beside it."""
    write_groups(folder / GROUPS_FILE, [each.payload.group for each in state.buffered.values()])
    (folder / STATE_FILE).write_text(json.dumps(state.to_json()) + "\n")


def read_state(folder: Path) -> BufferState:
    """What `write_state` wrote."""
    payloads = {
        group.group_id: Payload(GroupFacts.of(group), pack_group(group))
        for group in read_groups(folder / GROUPS_FILE)
    }
    return BufferState.from_json(json.loads((folder / STATE_FILE).read_text()), payloads)


class ReplayFiles:
    """`record`: all groups of each step are written, not only samples."""

    def __init__(self, run_dir: RunDir, *, record: bool) -> None:
        self.unwritten: Counter[str] = Counter()  # files that the disk refused, by kind
        self.disk_fault: str | None = None  # the newest reason
        self._run_dir, self._record = run_dir, record
        self._writes: set[asyncio.Task[None]] = set()

    async def written(self) -> None:
        """Waits for the writes in the background; raises what they raised."""
        writes, self._writes = self._writes, set()
        await asyncio.gather(*writes)

    def write_step(self, step: int, payloads: Sequence[Payload], prompts: Sequence[str]) -> None:
        """Writes the samples of a step that has ended, and all its groups if it is recorded."""
        self._in_background(partial(self._write_step, step, payloads, prompts))

    def write_log(self, log: GroupLog) -> None:
        """Writes the newest events of the groups."""
        write = partial(log.append, log.take_text())
        self._in_background(partial(self._attempt, "groups.jsonl", write))

    def write_quarantine(self, row: Mapping[str, Any]) -> None:
        """Writes the row of a prompt, at once."""
        self._attempt("quarantine.jsonl", partial(self._run_dir.log_quarantine, row))

    async def keep_batch(self, kind: str, step: int, payloads: Sequence[Payload]) -> None:
        """Keeps a minibatch for inspection: `kind` is non_finite or guarded."""
        path = {"non_finite": self._run_dir.non_finite_step, "guarded": self._run_dir.guarded_step}
        write = partial(self._write_batch, path[kind], step, payloads)
        await asyncio.to_thread(self._attempt, f"{kind}/", write)

    def _in_background(self, write: Callable[[], None]) -> None:
        self._writes.add(asyncio.create_task(asyncio.to_thread(write)))

    def _write_step(self, step: int, payloads: Sequence[Payload], prompts: Sequence[str]) -> None:
        """Unpacks only the groups that it writes."""
        count = len(payloads) if self._record else SAMPLE_GROUPS
        chosen = choose_samples([payload.facts for payload in payloads], prompts, count)
        samples = [payloads[each].group for each in chosen]
        self._attempt(
            "rollouts/",
            lambda: write_rollouts(self._run_dir.rollouts, step=step, groups=samples),
        )
        if self._record:
            self._attempt(
                "recorded/", lambda: self._write_batch(self._run_dir.recorded_step, step, payloads)
            )

    def _write_batch(
        self, path: Callable[[int], Path], step: int, payloads: Sequence[Payload]
    ) -> Path:
        file = path(step)
        write_groups(file, [payload.group for payload in payloads])
        return file

    def _attempt(self, what: str, write: Callable[[], Path | None]) -> None:
        """Writes something without which the run goes on; a file is listed with its checksum.

        What the disk refuses is counted.
        """
        try:
            if (path := write()) is not None:
                self._run_dir.list_file(path)
        except Exception as error:
            if (why := disk_fault(error)) is None:
                raise
            self.refused(what, why)

    def refused(self, what: str, why: str | None) -> None:
        """The disk refused something of this kind."""
        self.unwritten[what] += 1
        self.disk_fault = why
