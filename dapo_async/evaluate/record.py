"""The file of an evaluation: finished problems come in, the result leaves. `command.py` uses it.

OUT.partial.jsonl   during the evaluation: the settings, then one line per finished problem
OUT                 the result, which replaces the other file

The same evaluation, started again, continues from OUT.partial.jsonl.
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

from dapo_async.evaluate.sampled import ProblemResult
from dapo_async.utils.files import atomic_write
from dapo_async.utils.reasons import unreadable

NOT_COMPARED = ("checkpoint", "data")  # paths may change; the content is compared by its digest


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
    """The finished problems by row, `done`. Without `out` they are only in memory."""

    def __init__(self, out: Path | None, settings: Mapping[str, Any]) -> None:
        """Reads the problems of an earlier, interrupted evaluation.

        Raises ValueError when it had other settings, when it is still running, and when the files
        are something else.
        """
        self.out, self.settings = out, dict(settings)
        self.done: dict[int, ProblemResult] = {}
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
                f"another process writes {self.partial}; wait until it ends or give another --json"
            ) from error
        except ValueError:
            os.close(self._file)
            raise

    @property
    def finished(self) -> bool:
        """Whether the result existed before."""
        return self.out is not None and self._file is None

    def add(self, problem: ProblemResult) -> None:
        """Adds a finished problem; it is on disk when this returns."""
        self.done[problem.row] = problem
        self._append(problem.to_json())

    def finish(self, result: Mapping[str, Any]) -> None:
        """Replaces the partial file by the result, atomically."""
        if self.out is not None:
            atomic_write(self.out, json.dumps(result, indent=1) + "\n")
            self.partial.unlink()

    def _append(self, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            # ASCII, because model output may hold half a surrogate pair, which is not valid UTF-8.
            os.write(self._file, (json.dumps(values) + "\n").encode("ascii"))

    def _read_partial(self) -> None:
        assert self._file is not None
        lines = self.partial.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # the process was killed while it wrote
            os.truncate(self._file, sum(map(len, lines)) - len(lines.pop()))
        os.lseek(self._file, 0, os.SEEK_END)
        if not lines:
            self._append({"settings": self.settings})
            return
        try:
            first, *rest = (json.loads(line) for line in lines)
            self._check(first["settings"], self.partial)
            self.done = {values["row"]: ProblemResult(**values) for values in rest}
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.partial} is no partial result of dapo-async eval: {unreadable(error)}; "
                "remove it or give another --json"
            ) from error

    def _read_result(self, out: Path) -> None:
        if not out.is_file():
            raise ValueError(f"--json {out} is no file; give the path of a file")
        try:
            result = json.loads(out.read_bytes())
            self._check(result["settings"], out)
            self.done = {values["row"]: ProblemResult(**values) for values in result["problems"]}
        except OSError as error:
            raise ValueError(
                f"--json {out} can't be read: {error.strerror}; give another file"
            ) from error
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--json {out} exists and is no result of dapo-async eval: {unreadable(error)}; "
                "give another file"
            ) from error

    def _check(self, before: Mapping[str, Any], path: Path) -> None:
        names = [name for name in {**self.settings, **before} if name not in NOT_COMPARED]
        for name in names:
            if (was := before.get(name)) != (now := self.settings.get(name)):
                what = {
                    "weights_sha256": "the checkpoint differs",
                    "problems_sha256": "the problems differ",
                }.get(name)
                change = what or f"{name} was {was!r}, is {now!r}"
                raise ValueError(
                    f"{path} holds an evaluation with other settings: {change}; "
                    "use the same settings or give another --json"
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
