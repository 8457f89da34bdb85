"""A full disk: rows wait in memory, one line is printed, everything is counted."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from small_disk import fill_up, make_room, small_disk

from dapo_async.tracking import disk_faults
from dapo_async.tracking.disk_faults import DiskFaults, RowFile, append_whole
from dapo_async.utils.files import disk_fault


def test_rows_that_the_disk_refuses_come_later_and_each_once(tmp_path: Path) -> None:
    lines: list[str] = []
    with small_disk(tmp_path / "disk", kib=64) as disk:
        rows = RowFile(disk / "metrics.jsonl", DiskFaults(lines.append))
        rows.append({"step": 0, "loss": float("nan")})
        fill_up(disk)
        for step in range(1, 200):  # more than the page of the file has room for
            rows.append({"step": step, "text": "x" * 100})
        before = (disk / "metrics.jsonl").read_bytes()
        assert before.endswith(b"\n")
        with pytest.raises(OSError, match="No space left"):
            rows.flush()
        make_room(disk)
        rows.flush()
        written = [json.loads(line) for line in (disk / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == [*range(200)]
    assert written[0] == {"step": 0, "loss": None}
    assert lines == [
        "metrics.jsonl can't be written: no space left on device; "
        "the run goes on, and its rows are written when there is space"
    ]


def test_rows_beyond_the_limit_of_memory_are_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    faults = DiskFaults(lines.append)
    monkeypatch.setattr(disk_faults, "MOST_WAITING", 3)
    rows = RowFile(Path("/dev/full"), faults)
    for step in range(5):
        rows.append({"step": step})
    assert faults.counts == {"full": 5, "rows of full": 2}
    assert len(lines) == 2


def test_an_append_that_fails_in_the_middle_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows"
    append_whole(path, [b"first\n"])
    write = os.write

    def half(file: int, data: memoryview) -> int:
        if len(data) < 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        append_whole(path, [b"second\n", b"third\n"])
    assert path.read_bytes() == b"first\n"


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (FULL, "no space left on device"),
        (OSError(errno.EIO, "x"), "input/output error"),
        (OSError(errno.EDQUOT, "x"), "disk quota exceeded"),
        (RuntimeError("I/O error: No space left (os error 28)"), "no space left on device"),
        (caused(RuntimeError("learner failed in save"), FULL), "no space left on device"),
        (ExceptionGroup("both", [ValueError("no"), FULL]), "no space left on device"),
        (OSError(errno.ENOENT, "x"), None),
        (TimeoutError("the driver waited 28 s"), None),
        (RuntimeError("(os error 2)"), None),
    ],
)
def test_a_refusal_by_the_disk_is_found_behind_every_wrapper(
    error: Exception, why: str | None
) -> None:
    assert disk_fault(error) == why
