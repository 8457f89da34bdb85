"""Checksums of files: written with a checkpoint or a recorded batch, compared when it is read.

`manifest.json` in the `state/` of a checkpoint lists every other file of the checkpoint.
`files.jsonl` of a run directory lists its recorded batches and samples, a row per file.

A file is read in chunks by several threads. The checksum of a file is that of the checksums of its
chunks. It finds damage by disks and copies. It does not protect against somebody who changes both
a file and its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_async.utils.files import atomic_write
from dapo_async.utils.reasons import unreadable

MANIFEST = "manifest.json"
CHUNK_BYTES = 8 * 2**20
MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class FileSum:
    """What a file has to be."""

    num_bytes: int
    checksum: str

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.num_bytes, "sha256": self.checksum}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FileSum:
        """Raises KeyError, TypeError or ValueError for anything else."""
        return cls(int(values["bytes"]), str(values["sha256"]))


def sums_of(paths: Sequence[Path]) -> list[FileSum]:
    """The sums of files, in parallel. Raises OSError."""
    sizes = [path.stat().st_size for path in paths]
    chunks = [
        (path, start)
        for path, size in zip(paths, sizes, strict=True)
        for start in range(0, max(1, size), CHUNK_BYTES)
    ]
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        digests = iter([*threads.map(_chunk_digest, chunks)])
    return [FileSum(size, _joined(digests, max(1, -(-size // CHUNK_BYTES)))) for size in sizes]


def _chunk_digest(chunk: tuple[Path, int]) -> bytes:
    path, start = chunk
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        rest, digest = CHUNK_BYTES, hashlib.sha256()
        while rest and (data := file.read(rest)):
            digest.update(data)
            rest -= len(data)
    return digest.digest()


def _joined(digests: Iterator[bytes], count: int) -> str:
    return hashlib.sha256(b"".join(next(digests) for _ in range(count))).hexdigest()


def write_manifest(folder: Path, path: Path) -> None:
    """Lists every file below `folder`, except the manifest at `path` itself. Raises OSError."""
    files = sorted(each for each in folder.rglob("*") if each.is_file() and each != path)
    listed = {
        str(file.relative_to(folder)): each.to_json()
        for file, each in zip(files, sums_of(files), strict=True)
    }
    atomic_write(path, json.dumps({"files": listed}, indent=1) + "\n")


def read_manifest(path: Path) -> dict[str, FileSum]:
    """Sums by relative path. Raises ValueError, which names the file, when it can't be read."""
    try:
        files = json.loads(path.read_text())["files"]
        return {name: FileSum.from_json(values) for name, values in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} can't be read ({unreadable(error)})") from error


class FileCheck:
    """Compares the files of a checkpoint with its manifest before they are read.

    `folder`: of the checkpoint. One that an earlier version has written has no manifest, and is not
    checked.
    """

    def __init__(self, folder: Path, manifest: Path) -> None:
        """Raises ValueError when the manifest can't be read."""
        self._folder = folder
        self._sums = read_manifest(manifest) if manifest.exists() else None
        self._num_files = self._num_bytes = 0
        self._seconds = 0.0

    def __call__(self, paths: Iterable[Path]) -> None:
        """Raises ValueError, which names the first file that is not as it was written."""
        if self._sums is None:
            return
        began_s = time.monotonic()
        wanted = {str(path.relative_to(self._folder)) for path in paths}
        if unknown := wanted - self._sums.keys():
            raise ValueError(f"{self._folder / min(unknown)} is not in the manifest")
        sums = {name: self._sums[name] for name in sorted(wanted)}
        if found := damage(self._folder, sums):
            raise ValueError(found[0])
        self._num_files += len(sums)
        self._num_bytes += sum(each.num_bytes for each in sums.values())
        self._seconds += time.monotonic() - began_s

    @property
    def line(self) -> str:
        """What was checked, and how long it took."""
        if self._sums is None:
            return f"{self._folder.name} has no checksums, so its files are not checked"
        return (
            f"{self._folder.name}: {self._num_files} files, {self._num_bytes / 2**20:,.1f} MiB, "
            f"checked in {self._seconds:.2f} s"
        )


def damage(folder: Path, sums: Mapping[str, FileSum]) -> list[str]:
    """What is wrong with the files below `folder`, one line each; empty if they are whole."""
    found, there = [], {}
    for name, expected in sums.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            found.append(f"{path} can't be read ({unreadable(error)})")
            continue
        if size == expected.num_bytes:
            there[name] = path
        else:
            found.append(f"{path} has {size} bytes, was written with {expected.num_bytes}")
    try:
        now = dict(zip(there, sums_of([*there.values()]), strict=True))
    except OSError as error:
        return [*found, f"{error.filename or folder} can't be read ({unreadable(error)})"]
    found += [
        f"{path} has other content than was written"
        for name, path in there.items()
        if now[name] != sums[name]
    ]
    return found
