"""Paths that a user has given: checked, and written so that a shell reads them back."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

CONTROL = {*map(chr, range(32)), "\x7f"}


def check_path(name: str, path: str) -> None:
    """Raises ValueError for a blank path, a line break, a control character and half a character.

    Such a path can't be printed in one line or copied from there. `name`: of the knob or option.
    """
    if not path.strip():
        raise ValueError(f"{name} is empty; give a path")
    if CONTROL & {*path}:
        raise ValueError(
            f"{name} ({path!r}) must not have a line break or another control character; "
            "rename the file or folder"
        )
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} ({path!r}) must be UTF-8, because it is written to files; rename the file or "
            "folder"
        ) from error


def for_shell(path: Path | str) -> str:
    """`path` as one word of a command that a user may copy."""
    return quote(str(path))
