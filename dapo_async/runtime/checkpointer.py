"""Checkpoints of the whole run: learner, replay buffer and driver at one instant between two steps.

freeze   on the step path: copies in memory, timed (`checkpoint_pause_s`)
write    beside the steps: the Hugging Face export and the state; one rename when the metrics of its
         steps are on disk; then old checkpoints are removed

Called by the main loop and at the end of a run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dapo_async.config import Config
from dapo_async.runtime.resume import DRIVER_FILE
from dapo_async.runtime.step_metrics import Tracker
from dapo_async.runtime.system import System
from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.checkpoint_dir import STATE, CheckpointFolder
from dapo_async.utils.files import sync


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
    ) -> None:
        """`in_evaluation`: the version that is being evaluated and may turn out the best."""
        self.folder = CheckpointFolder(run_dir.checkpoints)
        self.saved = self.skipped = 0
        self.pause_s = self.write_s = 0.0  # sums: on the step path, and beside the steps
        self.longest_write_s = 0.0
        self._config, self._system, self._tracker = config, system, tracker
        self._run_dir, self._driver_state = run_dir, driver_state
        self._in_evaluation = in_evaluation
        self._writing: asyncio.Task[None] | None = None

    async def start(self, version: int) -> None:
        """Called between two steps; returns when everything is copied.

        The write runs in the background; if it fails, the run ends.
        """
        if self._writing is not None and not self._writing.done():
            self.skipped += 1
            return
        driver = await self._freeze(version)
        self._writing = asyncio.create_task(
            self._write(version, driver), name=f"checkpoint of version {version}"
        )
        # The end of a run cancels background tasks, but never a checkpoint half-way.
        self._system.in_background(_until_done(self._writing), self._writing.get_name())

    async def save(self, *, deadline_s: float) -> None:
        """At the end of a run: saves the newest state unless it is saved already.

        Waits for a running step. Raises TimeoutError.
        """
        try:
            async with asyncio.timeout(deadline_s):
                if self._writing is not None:
                    await asyncio.wait([self._writing])
                version = await self._system.learner.version()
                if version not in self.folder.versions():
                    await self._write(version, await self._freeze(version))
        except TimeoutError as error:
            raise TimeoutError(
                f"the driver waited {deadline_s:g} s for learner and replay to be saved"
            ) from error

    def summary(self) -> dict[str, float]:
        """Counts of this incarnation, and seconds per checkpoint on the step path and beside it."""
        count = max(1, self.saved)
        return {
            "saved": self.saved,
            "skipped": self.skipped,
            "pause_s": self.pause_s / count,
            "write_s": self.write_s / count,
        }

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

    async def _write(self, version: int, driver: dict[str, Any]) -> None:
        began_s = self._tracker.clock.now_s()
        partial = await asyncio.to_thread(self.folder.begin, version)
        await asyncio.gather(
            self._system.learner.save(partial), self._system.replay.save(partial / STATE)
        )
        (partial / STATE / DRIVER_FILE).write_text(json.dumps(driver, indent=2) + "\n")
        # A checkpoint never holds a step whose metrics are not on disk.
        await self._tracker.written(version)
        if self._run_dir.metrics.exists():
            await asyncio.to_thread(sync, self._run_dir.metrics)
        await asyncio.to_thread(self.folder.commit, version)
        self.saved += 1
        took_s = self._tracker.clock.now_s() - began_s
        self.write_s, self.longest_write_s = (
            self.write_s + took_s,
            max(self.longest_write_s, took_s),
        )
        await asyncio.to_thread(
            self.folder.prune, keep=self._config.train.keep_checkpoints, spare=self._spared()
        )

    def _spared(self) -> list[int]:
        """Versions that stay however old they are."""
        versions = self.folder.versions()
        best, in_evaluation = self._run_dir.best_version(versions), self._in_evaluation()
        # A run whose base model is gone reads config and tokenizer from one of its checkpoints.
        base = Path(self._config.model.path)
        return [
            version
            for version in versions
            if version in (best, in_evaluation) or self.folder.path(version) == base
        ]


async def _until_done(task: asyncio.Task[None]) -> None:
    await asyncio.shield(task)
