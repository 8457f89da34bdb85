"""Files that appear whole or not at all, also after a power failure. Every package writes with it.

The writer fills `NAME.partial` beside the file, flushes it to disk, renames it to `NAME` and
flushes the folder. A kill before the rename leaves the previous file. A reader never sees half a
file.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (*FULL, errno.EIO, errno.EROFS)
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries written in Rust name it


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
    return error.errno in FULL


def disk_fault(error: BaseException) -> str | None:
    """Why the disk refused a write, such as "no space left on device"; None for another error.

    Looks also at what caused `error`, and at the errors in a group or in an actor's answer.
    """
    left, seen = [error], set[int]()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        number = each.errno if isinstance(each, OSError) else None
        if number is None and (named := OS_ERROR.search(str(each))):
            number = int(named[1])
        if number in REFUSED:
            return os.strerror(number).lower()
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions
        # Ray keeps the error of an actor as `cause`.
        causes = (each.__cause__, getattr(each, "cause", None))
        left += [cause for cause in causes if isinstance(cause, BaseException)]
    return None


def sync(path: Path) -> None:
    """Flushes a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
