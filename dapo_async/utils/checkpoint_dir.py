"""The folder of a run's checkpoints: each appears whole, by one rename, or not at all.

    step_000020/          complete; named after the learner's version
      config.json, model.safetensors, tokenizer.json, …    a plain Hugging Face model
      state/              what a resume needs besides: learner (a file per rank), replay, driver,
                          and manifest.json with the checksum of every file of the checkpoint
    step_000030.partial/  being written
    step_000010.removed/  being deleted
    aside1.step_000030/   damaged, or newer than the one that a resume used

Only complete folders are read. The next save deletes what a kill left of `.partial` and `.removed`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dapo_async.utils.files import PARTIAL, sync
from dapo_async.utils.manifest import MANIFEST, FileSum, read_manifest, write_manifest

STATE = "state"
LEARNER_FOLDER = "learner"  # in the state
COMPLETE = re.compile(r"step_(\d{6,})")
REMOVED = ".removed"
ASIDE = "aside"  # before the name, so that no pattern for checkpoints finds it


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
        self.clear()
        partial = self.path(version).with_name(self.path(version).name + PARTIAL)
        (partial / STATE).mkdir(parents=True)
        return partial

    def clear(self) -> None:
        """Deletes what is not complete: of a kill, or of a write that the disk refused."""
        for left in (*self.root.glob(f"step_*{PARTIAL}"), *self.root.glob(f"step_*{REMOVED}")):
            shutil.rmtree(left)

    def seal(self, version: int) -> None:
        """Writes the manifest of what was written since `begin`."""
        partial = self.path(version).with_name(self.path(version).name + PARTIAL)
        write_manifest(partial, partial / STATE / MANIFEST)

    def manifest(self, version: int) -> dict[str, FileSum] | None:
        """The sums of a checkpoint's files; None where an earlier version has written none.

        Raises ValueError when the manifest can't be read.
        """
        path = self.path(version) / STATE / MANIFEST
        return read_manifest(path) if path.exists() else None

    def set_aside(self, *, after: int) -> list[Path]:
        """Renames all checkpoints after the version `after`, so that a run can write them again.

        Returns their new paths.
        """
        renamed = []
        for version in self.versions():
            if version > after:
                path, number = self.path(version), 1
                while (aside := path.with_name(f"{ASIDE}{number}.{path.name}")).exists():
                    number += 1
                renamed.append(path.rename(aside))
        return renamed

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
