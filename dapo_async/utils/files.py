"""Files that appear whole or not at all, also after a power failure. Every package writes with it.

The writer fills `NAME.partial` beside the file, flushes it to disk, renames it to `NAME` and
flushes the folder. A kill before the rename leaves the previous file. A reader never sees half a
file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """Where the content of `path` lies until it is complete. A link keeps pointing at its file."""
    real = path.resolve()
    return real.with_name(real.name + PARTIAL)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives the path to write to; when the block ends, that file replaces `path`.

    When the block raises, the unfinished file is removed and `path` stays as it was.
    """
    partial = partial_path(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path.resolve())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(partial.parent)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replaces `path` by `content`; text is encoded as UTF-8."""
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def is_disk_full(error: OSError) -> bool:
    """Whether a file could not be written because the disk or the quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Flushes a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
