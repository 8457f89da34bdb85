"""Recognises files that are no data files.

In: the first bytes of a file. Out: a text that names the format and the remedy, or None.

`json_rows.py` and `tables.py` call it when they can't read a file.
"""

from __future__ import annotations

from pathlib import Path

UNPACK = "unpack it, or pack it with gzip or zstd"
CONVERT = "convert it to Parquet or JSONL"
FORMATS = {
    b"version https://git-lfs": (
        "is a pointer of Git LFS, not the file itself; fetch the file with git lfs pull"
    ),
    b"BZh": f"is packed with bzip2 or xz; {UNPACK}",
    b"\xfd7zXZ": f"is packed with bzip2 or xz; {UNPACK}",
    b"PK\x03\x04": f"is a zip archive; {UNPACK}",
    b"7z\xbc\xaf": f"is a 7z archive; {UNPACK}",
    b"ARROW1": f"is an Arrow file; {CONVERT}, or give the folder of datasets.save_to_disk",
    b"\x93NUMPY": f"is a NumPy array; {CONVERT}",
    b"SQLite format 3": f"is a SQLite database; {CONVERT}",
    b"\x89HDF": f"is an HDF5 file; {CONVERT}",
    b"\x80": f"is a pickle, and nothing is unpickled; {CONVERT}",
}
# Formats that are read only when they are not packed.
PACKED = {
    b"PAR1": "holds a packed Parquet file; unpack it",
    b"\x1f\x8b": "is packed twice; unpack it once",
    b"\x28\xb5\x2f\xfd": "is packed twice; unpack it once",
}
LONGEST = max(map(len, (*FORMATS, *PACKED)))


def foreign_format(path: Path) -> str | None:
    """The format of a file and the remedy, as text; None if its first bytes are unknown."""
    with path.open("rb") as file:
        return format_of(file.read(LONGEST))


def format_of(start: bytes, *, packed: bool = False) -> str | None:
    """As `foreign_format`, from the first bytes; `packed`: they come from a packed file."""
    known = {**FORMATS, **PACKED} if packed else FORMATS
    return next((what for magic, what in known.items() if start.startswith(magic)), None)
