"""The folder of a run's checkpoints: each appears whole, by one rename, or not at all.

    step_000020/          complete; named after the learner's version
      config.json, model.safetensors, tokenizer.json, …    a plain Hugging Face model
      state/              what a resume needs besides: learner (a file per rank), replay, driver
    step_000030.partial/  being written
    step_000010.removed/  being deleted

Only complete folders are read. The next save deletes what a kill left of the other two.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dapo_async.utils.files import PARTIAL, sync

STATE = "state"
LEARNER_FOLDER = "learner"  # in the state
COMPLETE = re.compile(r"step_(\d{6,})")
REMOVED = ".removed"


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """All checkpoints of one run, below `root`."""

    root: Path

    def path(self, version: int) -> Path:
        return self.root / f"step_{version:06d}"

    def versions(self) -> list[int]:
        """Versions of the complete checkpoints, ascending."""
        found = (COMPLETE.fullmatch(path.name) for path in self.root.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    @property
    def newest(self) -> Path | None:
        versions = self.versions()
        return self.path(versions[-1]) if versions else None

    def begin(self, version: int) -> Path:
        """Deletes left-overs of a kill; makes the folder to write into, with an empty `state/`."""
        for left in (*self.root.glob(f"step_*{PARTIAL}"), *self.root.glob(f"step_*{REMOVED}")):
            shutil.rmtree(left)
        partial = self.path(version).with_name(self.path(version).name + PARTIAL)
        (partial / STATE).mkdir(parents=True)
        return partial

    def commit(self, version: int) -> Path:
        """Makes what was written since `begin` the checkpoint, safe from a power failure."""
        target = self.path(version)
        partial = target.with_name(target.name + PARTIAL)
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        partial.rename(target)
        sync(self.root)
        return target

    def prune(self, *, keep: int, spare: Collection[int] = ()) -> None:
        """Deletes all but the newest `keep` and the versions to `spare`.

        A folder loses its name before it loses a file.
        """
        for version in self.versions()[:-keep]:
            if version not in spare:
                removed = self.path(version).with_name(self.path(version).name + REMOVED)
                self.path(version).rename(removed)
                shutil.rmtree(removed)
