"""The one writer of files: whole or not at all, whatever stops it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Never

import pytest

from dapo_async.utils.files import atomic_file, atomic_write, partial_path


def test_text_is_utf8_and_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    atomic_write(tmp_path / "text", "42 – quod erat")
    atomic_write(tmp_path / "bytes", b"\xff\x00")
    assert (tmp_path / "text").read_bytes() == "42 – quod erat".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\xff\x00"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "text"]


def test_a_writer_that_raises_leaves_the_previous_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    atomic_write(path, "before")

    def write_half() -> Never:
        with atomic_file(path) as partial:
            partial.write_text("half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_half()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_the_previous_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    atomic_write(path, "before")

    def fails(*_: object) -> Never:
        raise OSError("the rename failed")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="the rename failed"):
        atomic_write(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_left_over_of_a_killed_writer_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    partial_path(path).write_text("half a file that is longer than the next one")
    atomic_write(path, "whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_keeps_pointing_at_the_file_that_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "out.html", tmp_path / "out.html"
    real.write_text("before")
    link.symlink_to(real)
    atomic_write(link, "after")
    assert link.is_symlink()
    assert real.read_text() == "after"


def test_content_is_on_disk_before_the_rename_and_the_rename_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        seen.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        seen.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    (tmp_path / "run").mkdir()
    atomic_write(tmp_path / "run" / "a", "whole")
    assert seen == ["fsync a.partial", "rename to a", "fsync run"]
