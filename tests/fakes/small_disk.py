"""A disk of a few KiB that can be filled up, for tests of a full disk."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BALLAST = "ballast"


@contextmanager
def small_disk(folder: Path, *, kib: int) -> Iterator[Path]:
    """Mounts a tmpfs of `kib` KiB on `folder`. Skips the test where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("this user can't mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(folder: Path) -> None:
    """Writes a file until the disk is full; again after something has been removed."""
    with (folder / BALLAST).open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            return


@contextmanager
def kept_full(folder: Path) -> Iterator[None]:
    """Takes what others remove on the disk meanwhile, too."""
    ended = threading.Event()

    def fill() -> None:
        while not ended.wait(0.01):
            fill_up(folder)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def make_room(folder: Path) -> None:
    """Removes what `fill_up` has written."""
    (folder / BALLAST).unlink()
