"""What is known of an evaluation: finished problems as they come, then the result (L3). A later try of the same evaluation goes on where it stopped.

OUT.partial.jsonl   while it goes on: the settings, then a line per finished problem, on disk before the next one
OUT                 its result; the other file is gone then
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dapo_async.evaluate.sampled import Problem
from dapo_async.utils.reasons import unreadable

NOT_COMPARED = ("checkpoint", "data")  # where they lie may change: what is in them is compared


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of the files."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(
                f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return whole.hexdigest()


class Record:
    """`done` by row. With `out` None all is kept in memory alone."""

    def __init__(self, out: Path | None, settings: Mapping[str, Any]) -> None:
        """Reads what an earlier try left. Raises ValueError for one with other settings, for files of something else, and while it still goes on."""
        self.out, self.settings = out, dict(settings)
        self.done: dict[int, Problem] = {}
        self._file: int | None = None
        if out is None:
            return
        self.partial = out.with_name(out.name + ".partial.jsonl")
        if out.exists():
            self._read_result(out)
            return
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(
                f"--json {out} can't be written: {error.strerror}; give another file"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read_partial()
        except BlockingIOError as error:
            os.close(self._file)
            raise ValueError(
                f"another process is writing {self.partial}; wait for its end, or give another --json"
            ) from error
        except ValueError:
            os.close(self._file)
            raise

    @property
    def finished(self) -> bool:
        """Whether the result was there already."""
        return self.out is not None and self._file is None

    def add(self, problem: Problem) -> None:
        """Keeps a finished problem."""
        self.done[problem.row] = problem
        self._append(problem.to_json())

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes the result, atomically, in place of what was kept until then."""
        if self.out is not None:
            whole = self.out.with_name(self.out.name + ".partial")
            whole.write_text(json.dumps(result, indent=1) + "\n", encoding="ascii")
            os.replace(whole, self.out)
            self.partial.unlink()

    def _append(self, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            # At once and in one piece; ASCII, for model output may hold half a surrogate pair, which no UTF-8 file can.
            os.write(self._file, (json.dumps(values) + "\n").encode("ascii"))

    def _read_partial(self) -> None:
        assert self._file is not None
        lines = self.partial.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # a kill left it unfinished
            os.truncate(self._file, sum(map(len, lines)) - len(lines.pop()))
        os.lseek(self._file, 0, os.SEEK_END)
        if not lines:
            self._append({"settings": self.settings})
            return
        try:
            first, *rest = (json.loads(line) for line in lines)
            self._check(first["settings"], self.partial)
            self.done = {values["row"]: Problem(**values) for values in rest}
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.partial} is no evaluation that was begun: {unreadable(error)}; "
                "remove it, or give another --json"
            ) from error

    def _read_result(self, out: Path) -> None:
        try:
            result = json.loads(out.read_bytes())
            self._check(result["settings"], out)
            self.done = {values["row"]: Problem(**values) for values in result["problems"]}
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise ValueError(
                f"--json {out} exists and is no evaluation: {unreadable(error)}; give another file"
            ) from error

    def _check(self, before: Mapping[str, Any], path: Path) -> None:
        names = [name for name in {**self.settings, **before} if name not in NOT_COMPARED]
        for name in names:
            if (was := before.get(name)) != (now := self.settings.get(name)):
                what = {
                    "weights_sha256": "the checkpoint is another one",
                    "problems_sha256": "the problems are others",
                }.get(name)
                change = what or f"{name} was {was!r}, is {now!r}"
                raise ValueError(
                    f"{path} holds an evaluation with other settings: {change}; repeat those, or give another --json"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            os.close(self._file)
