"""The journal of the replay buffer: what has happened to it, on disk, so that a new process has it.

A segment is one file: an image of the whole state, then one record per change. Accepted groups lie
in the records themselves. A new segment begins with each checkpoint and when one is long. A segment
is removed when nobody needs its groups any more.

    journal/000007.log   image, change, change + group, change, …

A record is written when the call that makes it returns, without a sync: it survives the death of
the process, not that of the machine, for which there are checkpoints. A record that was cut short
is the last one of its segment and counts as not written.

In: records as plain values. Out: the newest image, the records after it, the place of each group.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADER = struct.Struct("<IIQ")  # bytes of the JSON, its CRC-32, bytes of the group
DATA = "data"  # kind of a record that is only a group
SEGMENT_BYTES = 256 * 2**20  # a segment that is longer is followed by a new one
ENCODE = json.JSONEncoder(separators=(",", ":")).encode
Bytes = NDArray[np.uint8]
Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a packed group lies."""

    path: Path
    offset: int
    size: int

    def read(self) -> Bytes:
        """The group. Raises ValueError when the file is shorter than it was."""
        data = np.fromfile(self.path, np.uint8, count=self.size, offset=self.offset)
        if len(data) != self.size:
            raise ValueError(f"{self.path} has {len(data)} of {self.size} bytes of a group")
        return data


@dataclass(frozen=True, slots=True)
class Record:
    """One change of the buffer; `place`: of the group that came with it."""

    fields: dict[str, Any]
    place: Place | None = None


class Journal:
    """Appends to the newest segment of `folder`. Methods raise OSError when the disk refuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[int, Place] = {}  # by group id, of all segments
        self.is_open = False
        self._ids: dict[Path, set[int]] = {}  # the groups of each segment
        self._of_image: frozenset[int] = frozenset()  # groups that the newest image refers to
        self._file = -1  # descriptor of the newest segment
        self._size = 0

    @property
    def newest(self) -> Path:
        return max(self._ids)

    @property
    def is_long(self) -> bool:
        return self._size > SEGMENT_BYTES

    def begin(
        self,
        image: Fields,
        groups: Iterable[tuple[int, Bytes]] = (),
        *,
        refers_to: Iterable[int] = (),
    ) -> None:
        """Begins a segment with `image`, and with packed groups by their ids. It exists whole or
        not at all. `refers_to`: the groups that whoever reads the image needs, also older ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = int(self.newest.stem) + 1 if self._ids else 0
        path = self.folder / f"{number:06d}.log"
        unfinished = path.with_suffix(".new")
        file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            size = _write(file, image, None)
            places = {}
            for group_id, data in groups:
                size += _write(file, {"k": DATA, "id": group_id}, data)
                places[group_id] = Place(path, size - len(data), len(data))
            unfinished.rename(path)
        except BaseException:
            os.close(file)
            raise
        self.close()
        self._file, self._size, self.is_open = file, size, True
        self._ids[path] = set()
        self._of_image = frozenset(refers_to)
        for group_id, place in places.items():
            self._note(group_id, place)

    def append(self, fields: Fields, group_id: int = -1, data: Bytes | None = None) -> None:
        """Adds a record, and the packed group `data` with it."""
        path = self.newest
        size = _write(self._file, fields, data)
        self._size += size
        if data is not None:
            self._note(group_id, Place(path, self._size - len(data), len(data)))

    def _note(self, group_id: int, place: Place) -> None:
        self.places[group_id] = place
        self._ids.setdefault(place.path, set()).add(group_id)

    def forget(self, needed: Container[int]) -> None:
        """Removes the segments before the newest one that have no group of `needed`, nor one that
        the newest image refers to."""
        newest = self.newest
        for path, ids in [*self._ids.items()]:
            if path == newest or not ids.isdisjoint(self._of_image):
                continue
            if not any(each in needed for each in ids):
                path.unlink(missing_ok=True)
                for each in ids:
                    if self.places[each].path == path:
                        del self.places[each]
                del self._ids[path]

    def close(self) -> None:
        """Writes no more."""
        if self.is_open:
            self.is_open = False
            os.close(self._file)

    def remove(self) -> None:
        """Ends the journal: nothing can be read back any more."""
        self.close()
        self.places.clear()
        self._ids.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def read(self) -> tuple[dict[str, Any], list[Record]] | None:
        """The newest image and the records after it; `places` has all groups then.

        None: there is no journal.
        """
        newest: list[Record] = []
        for path in sorted(self.folder.glob("*.log")):
            self._ids[path] = set()
            newest = list(_records(path))
            for record in newest:
                if record.place is not None:
                    self._note(record.fields["id"], record.place)
        if not newest:
            return None
        image, *records = newest
        return image.fields, records


def _write(file: int, fields: Fields, data: Bytes | None) -> int:
    """Returns the bytes written."""
    text = ENCODE(fields).encode()
    size = 0 if data is None else len(data)
    record: Any = HEADER.pack(len(text), zlib.crc32(text), size) + text
    parts = [record] if data is None else [record, np.ascontiguousarray(data).data]
    total = left = len(record) + size
    while (written := os.writev(file, parts)) < left:  # the disk took a part
        left -= written
        while written >= len(parts[0]):
            written -= len(parts.pop(0))
        parts[0] = memoryview(parts[0])[written:]
    return total


def _records(path: Path) -> Iterator[Record]:
    """The whole records of a segment, up to the first one that was cut short or damaged."""
    end = path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(HEADER.size)) == HEADER.size:
            length, checksum, size = HEADER.unpack(header)
            text = file.read(length)
            offset = file.tell()
            if len(text) < length or zlib.crc32(text) != checksum or offset + size > end:
                return
            place = Place(path, offset, size) if size else None
            yield Record(json.loads(text), place)
            file.seek(offset + size)
