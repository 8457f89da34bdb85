"""Checksums of files: every changed byte is found, whatever the size of the file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dapo_async.utils import manifest
from dapo_async.utils.manifest import damage, read_manifest, sums_of, write_manifest


def folder_of(root: Path, sizes: list[int]) -> Path:
    folder = root / "checkpoint"
    (folder / "state").mkdir(parents=True)
    noise = random.Random(0)
    for number, size in enumerate(sizes):
        (folder / f"file-{number}").write_bytes(noise.randbytes(size))
    (folder / "state" / "small").write_text("{}")
    return folder


def test_each_flipped_byte_is_found_in_files_of_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 64)
    folder = folder_of(tmp_path, [0, 1, 63, 64, 65, 200])
    path = folder / "state" / "manifest.json"
    write_manifest(folder, path)
    sums = read_manifest(path)
    assert sorted(sums) == [*(f"file-{number}" for number in range(6)), "state/small"]
    assert damage(folder, sums) == []
    for number, size in enumerate([0, 1, 63, 64, 65, 200]):
        file = folder / f"file-{number}"
        whole = file.read_bytes()
        for place in range(size):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert damage(folder, sums) == [f"{file} has other content than was written"]
        file.write_bytes(whole)
    assert damage(folder, sums) == []


def test_a_missing_a_cut_and_a_longer_file_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [10, 20, 30])
    write_manifest(folder, folder / "state" / "manifest.json")
    sums = read_manifest(folder / "state" / "manifest.json")
    (folder / "file-0").unlink()
    (folder / "file-1").write_bytes(b"")
    with (folder / "file-2").open("ab") as file:
        file.write(b"more")
    assert damage(folder, sums) == [
        f"{folder}/file-0 can't be read (no such file or directory)",
        f"{folder}/file-1 has 0 bytes, was written with 20",
        f"{folder}/file-2 has 34 bytes, was written with 30",
    ]


def test_exchanged_chunks_change_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 4)
    (tmp_path / "one").write_bytes(b"aaaabbbb")
    (tmp_path / "other").write_bytes(b"bbbbaaaa")
    one, other = sums_of([tmp_path / "one", tmp_path / "other"])
    assert one != other


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"a": {}}}', '{"files": 3}'])
def test_a_manifest_that_cannot_be_read_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json can't be read \("):
        read_manifest(tmp_path / "manifest.json")
