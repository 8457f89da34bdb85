"""Where rows are, and what columns they have: for messages.

`sources.py` fills a `Places` while it reads; `problems.py` and the counts of left-out rows ask it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from dapo_async.data.cells import as_struct, text_of
from dapo_async.data.conversation import is_chat, turn_path

NUM_NAMED = 20  # columns that a message names


@dataclass(slots=True)
class Places:
    """The files of a source. Rows count from 0 over all files; messages count from 1 in a file."""

    files: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # first row of each file
    example: Any = None  # values like those of a row of the current file; None: rows are whole

    def begin(self, file: str, row: int) -> None:
        """The next row, `row`, is the first one of `file`."""
        self.files.append(file)
        self.starts.append(row)
        self.example = None

    def of(self, row: int) -> str:
        """The place of a row."""
        index = max(0, bisect_right(self.starts, row) - 1)
        return f"row {row - self.starts[index] + 1} of {self.files[index]}"

    def named(self, rows: Sequence[int], *, more: bool) -> str:
        """Several rows, without their file where there is only one file."""
        if len(self.files) > 1:
            names = ", ".join(map(self.of, rows))
        else:
            names = ("rows " if len(rows) > 1 or more else "row ") + ", ".join(
                str(row + 1) for row in rows
            )
        return names + (", …" if more else "")


def column_names(values: Any, *, chats: bool) -> str:
    """The columns of a row that hold a text or a number, and with `chats` those with messages."""
    names = list(islice(_columns(values, "", chats), NUM_NAMED + 1))
    more = ", …" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def _columns(values: Any, path: str, chats: bool) -> Iterator[str]:
    if isinstance(values, str):
        values = as_struct(values)
    if is_chat(values):
        yield path if chats else f"{path}.{turn_path(values, -1)}"
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _columns(value, f"{path}.{name}" if path else str(name), chats)
    elif isinstance(values, list):
        if values:
            yield from _columns(values[0], f"{path}.0", chats)
    elif values is not None and text_of(values) is not None:
        yield path
