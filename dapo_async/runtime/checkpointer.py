"""Checkpoints of the whole run: learner, replay buffer and driver at one instant between two steps.

freeze   on the step path: copies in memory, timed (`checkpoint_pause_s`)
write    beside the steps: the Hugging Face export and the state, then a manifest with the checksum
         of each file; one rename when the metrics of its steps are on disk; then old checkpoints
         are removed, except those that `dapo-async eval --watch` has still to measure

When the disk refuses a checkpoint, training goes on: all older checkpoints but the newest whole
one and the best one are removed, and the next step tries again. `MAX_FAILED` in a row end the run.

Called by the main loop and at the end of a run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dapo_async.config import Config
from dapo_async.runtime.handles.handle import ActorDied
from dapo_async.runtime.mirror import Uploads
from dapo_async.runtime.resume import DRIVER_FILE
from dapo_async.runtime.step_metrics import Tracker
from dapo_async.runtime.system import System
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.watch_folder import WatchClaims
from dapo_async.utils.checkpoint_dir import STATE, CheckpointFolder
from dapo_async.utils.files import disk_fault, sync

MAX_FAILED = 5  # checkpoints in a row that the disk refused: the last one ends the run


class DiskRefused(RuntimeError):
    """The disk refused every checkpoint for too long."""


class Checkpointer:
    """Writes one checkpoint at a time; one that is due meanwhile is left out and counted."""

    def __init__(
        self,
        config: Config,
        *,
        system: System,
        tracker: Tracker,
        run_dir: RunDir,
        driver_state: Callable[[], dict[str, Any]],
        in_evaluation: Callable[[], int | None],
        say: Callable[[str], None] = lambda _: None,
        uploads: Uploads | None = None,
    ) -> None:
        """`in_evaluation`: the version that is being evaluated and may turn out the best."""
        self.folder = CheckpointFolder(run_dir.checkpoints)
        self.saved = self.skipped = self.refused = 0
        self.is_late = False  # the disk refused the newest one: the next step tries again
        self._refused_in_a_row = 0
        self._say, self._uploads = say, uploads
        self.pause_s = self.write_s = 0.0  # sums: on the step path, and beside the steps
        self.longest_write_s = 0.0
        self.checksum_s = 0.0  # the part of `write_s` in which the files are read for the manifest
        self._config, self._system, self._tracker = config, system, tracker
        self._run_dir, self._driver_state = run_dir, driver_state
        self._in_evaluation = in_evaluation
        self._claims = WatchClaims(run_dir.watched)
        self._writing: asyncio.Task[None] | None = None

    async def start(self, version: int) -> None:
        """Called between two steps; returns when everything is copied.

        The write runs in the background. If it fails, the run ends, unless the disk refused it.
        """
        self.is_late = False
        if self._writing is not None and not self._writing.done():
            self.skipped += 1
            return
        driver = await self._freeze(version)
        self._writing = asyncio.create_task(
            self._write_or_postpone(version, driver), name=f"checkpoint of version {version}"
        )
        # The end of a run cancels background tasks, but never a checkpoint half-way.
        self._system.in_background(_until_done(self._writing), self._writing.get_name())

    async def save(self, *, deadline_s: float) -> None:
        """At the end of a run: saves the newest state unless it is saved already.

        Waits for a running step. Raises TimeoutError, and DiskRefused if the disk refuses it twice.
        """
        try:
            async with asyncio.timeout(deadline_s):
                if self._writing is not None:
                    await asyncio.wait([self._writing])
                version = await self._system.learner.version()
                for _ in range(2):
                    if version not in self.folder.versions():
                        await self._write_or_postpone(version, await self._freeze(version))
                if version not in self.folder.versions():
                    raise DiskRefused(f"the disk refused the checkpoint of version {version}")
        except TimeoutError as error:
            raise TimeoutError(
                f"the driver waited {deadline_s:g} s for learner and replay to be saved"
            ) from error

    def summary(self) -> dict[str, float]:
        """Counts of this incarnation, and seconds per checkpoint on the step path and beside it."""
        count = max(1, self.saved)
        copies = self._uploads.summary() if self._uploads is not None else {}
        return copies | {
            "saved": self.saved,
            "skipped": self.skipped,
            "refused": self.refused,
            "pause_s": self.pause_s / count,
            "write_s": self.write_s / count,
            "checksum_s": self.checksum_s / count,
        }

    async def finish_copies(self, *, deadline_s: float) -> None:
        """Waits until the newest checkpoint is on the mirror. Raises TimeoutError."""
        if self._uploads is not None:
            await self._uploads.finish(deadline_s=deadline_s)

    async def _freeze(self, version: int) -> dict[str, Any]:
        began_s = self._tracker.clock.now_s()
        frozen, _ = await asyncio.gather(
            self._system.learner.capture_state(), self._system.replay.capture_state(version)
        )
        assert frozen == version, (
            f"the learner is at version {frozen}, the checkpoint is of {version}"
        )
        self._tracker.checkpoint_pause_s += self._tracker.clock.now_s() - began_s
        self.pause_s += self._tracker.clock.now_s() - began_s
        return {"version": version, **self._driver_state()}

    async def _write_or_postpone(self, version: int, driver: dict[str, Any]) -> None:
        """Writes a checkpoint. If the disk refuses it, makes room and lets a later step try again.
        A learner or a replay actor that is lost meanwhile postpones it, too.

        Raises DiskRefused after `MAX_FAILED` in a row.
        """
        try:
            await self._write(version, driver)
        except ActorDied as error:
            if not self._system.learner.restarts.is_kept:
                raise
            self.is_late = True
            self._say(f"the checkpoint of version {version} is postponed: {error}")
        except Exception as error:
            if (why := disk_fault(error)) is None:
                raise
            await self._make_room(version, why)
        else:
            self._refused_in_a_row = 0

    async def _make_room(self, version: int, why: str) -> None:
        self.refused, self._refused_in_a_row = self.refused + 1, self._refused_in_a_row + 1
        before = self.folder.versions()
        try:
            await asyncio.to_thread(self.folder.clear)
            await asyncio.to_thread(self.folder.prune, keep=1, spare=self._spared())
        except OSError as error:
            why = f"{why}; old checkpoints can't be removed: {error.strerror}"
        removed = len(before) - len(self.folder.versions())
        line = f"the checkpoint of version {version} can't be written: {why}"
        if self._refused_in_a_row >= MAX_FAILED:
            raise DiskRefused(
                f"{line}, {self._refused_in_a_row} times in a row; free some space in "
                f"{self.folder.root}, and continue with --resume"
            )
        # Once at the next step; after that only when a checkpoint is due.
        self.is_late = self._refused_in_a_row == 1
        self._say(
            f"{line}; {removed} older checkpoints were removed, training goes on, and the run ends "
            f"after {MAX_FAILED - self._refused_in_a_row} more such failures; free some space"
        )

    async def _write(self, version: int, driver: dict[str, Any]) -> None:
        began_s = self._tracker.clock.now_s()
        partial = await asyncio.to_thread(self.folder.begin, version)
        # Both end before an error is raised: nobody writes into a folder that is removed.
        written = await asyncio.gather(
            self._system.learner.save(partial),
            self._system.replay.save(partial / STATE),
            return_exceptions=True,
        )
        failures = [each for each in written if isinstance(each, BaseException)]
        if failures:  # one that is not the disk's comes first
            raise min(failures, key=lambda each: disk_fault(each) is not None)
        (partial / STATE / DRIVER_FILE).write_text(json.dumps(driver, indent=2) + "\n")
        # A checkpoint never holds a step whose metrics are not on disk.
        await self._tracker.written(version)
        self._tracker.rows.flush()
        if self._run_dir.metrics.exists():
            await asyncio.to_thread(sync, self._run_dir.metrics)
        sealing_s = self._tracker.clock.now_s()
        await asyncio.to_thread(self.folder.seal, version)
        self.checksum_s += self._tracker.clock.now_s() - sealing_s
        await asyncio.to_thread(self.folder.commit, version)
        if self._system.learner.saved(version, self.folder.path(version) / STATE):
            with suppress(ActorDied):  # the next checkpoint tells it
                await self._system.replay.checkpointed(self._system.learner.redo.oldest)
        self.saved += 1
        took_s = self._tracker.clock.now_s() - began_s
        self.write_s, self.longest_write_s = (
            self.write_s + took_s,
            max(self.longest_write_s, took_s),
        )
        self._system.event("checkpoint", version=version, write_s=round(took_s, 3))
        unmeasured = self._claims.unmeasured(self.folder.versions())
        if self._uploads is not None:
            self._uploads.offer(version)
        await asyncio.to_thread(
            self.folder.prune,
            keep=self._config.train.keep_checkpoints,
            spare=[*self._spared(), *unmeasured],
        )

    def _spared(self) -> list[int]:
        """Versions that stay however old they are, also on a full disk."""
        versions = self.folder.versions()
        best, in_evaluation = self._run_dir.best_version(versions), self._in_evaluation()
        copied = self._uploads.in_use if self._uploads is not None else set()
        restart = self._system.learner.redo.version  # where a restarted learner begins
        # A run whose base model is gone reads config and tokenizer from one of its checkpoints.
        base = Path(self._config.model.path)
        return [
            version
            for version in versions
            if version in (best, in_evaluation, restart, *copied)
            or self.folder.path(version) == base
        ]


async def _until_done(task: asyncio.Task[None]) -> None:
    await asyncio.shield(task)
