"""The journal: a replay buffer that dies at any moment comes back in the state that it had."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import pytest
from journal_world import Crashing, Recorded, recovered
from replay_world import make_buffer, make_group, wander

from dapo_async.replay.buffer_image import image_of
from dapo_async.replay.group_io import pack_group
from dapo_async.replay.journal import Journal, Record

WORKERS = ("worker-0", "worker-1")


def world_of(folder: Path, rng: random.Random) -> Crashing:
    num_minibatches = rng.randint(1, 3)
    buffer = make_buffer(
        Recorded,
        groups_per_step=rng.randint(1, 4) * num_minibatches,
        num_minibatches=num_minibatches,
        max_staleness=rng.randint(0, 3),
        num_steps=rng.randint(2, 8),
    )
    return Crashing(buffer, folder, workers=WORKERS)


@pytest.mark.parametrize("seed", range(15))
def test_death_at_any_byte_loses_at_most_the_change_that_was_being_written(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    world = world_of(tmp_path / "run", rng)
    buffer = world.buffer
    assert isinstance(buffer, Recorded)
    journal = buffer.journal
    assert journal is not None
    ends, images = [journal.newest.stat().st_size], [image_of(buffer)]
    append = journal.append

    def noting(*args: Any, **kwargs: Any) -> None:
        append(*args, **kwargs)
        ends.append(journal.newest.stat().st_size)
        images.append(image_of(buffer))

    journal.append = noting  # type: ignore[method-assign]
    wander(world, rng, num_events=80, resumes=False)
    whole = journal.newest.read_bytes()
    for cut in {rng.randrange(ends[0], len(whole) + 1) for _ in range(25)} | set(ends[-2:]):
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        (folder / journal.newest.name).write_bytes(whole[:cut])
        number = sum(end <= cut for end in ends) - 1
        assert image_of(recovered(folder, buffer.options)) == images[number]


@pytest.mark.parametrize("seed", range(40))
def test_run_with_deaths_ends_as_it_should(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    world = world_of(tmp_path, rng)
    for _ in range(6):
        wander(world, rng, num_events=12)
        world.crash()
    world.drain()
    world.buffer.close().check()


def test_image_is_json(tmp_path: Path) -> None:
    world = world_of(tmp_path, random.Random(3))
    wander(world, random.Random(3), num_events=60, resumes=False)
    image = image_of(world.buffer)
    assert json.loads(json.dumps(image)) == image


def test_segments_without_needed_groups_are_removed(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(4):
        journal.begin({"number": number})
        group = pack_group(make_group(number))
        journal.append({"k": "offer", "id": number}, number, group)
        assert (journal.places[number].read() == group).all()
    journal.forget({1})
    assert sorted(journal.places) == [1, 3]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["000001.log", "000003.log"]
    journal.begin({"number": 4}, refers_to=[3])
    journal.forget({1})
    assert sorted(journal.places) == [1, 3], "the image refers to group 3"
    journal.begin({"number": 5})
    journal.forget({1})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["000001.log", "000005.log"]
    again = Journal(tmp_path)
    journal.append({"k": "offer", "id": 6}, 6, group)
    assert again.read() == ({"number": 5}, [Record({"k": "offer", "id": 6}, journal.places[6])])
    assert again.places == journal.places
    again.begin({"number": 6})
    assert again.newest.name == "000006.log"


def test_damaged_record_ends_its_segment(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin({"number": 0})
    journal.append({"k": "serve", "v": 1})
    size = journal.newest.stat().st_size
    journal.append({"k": "serve", "v": 2})
    damaged = bytearray(journal.newest.read_bytes())
    damaged[size + 18] ^= 1
    journal.newest.write_bytes(damaged)
    found = Journal(tmp_path).read()
    assert found is not None
    assert [record.fields for record in found[1]] == [{"k": "serve", "v": 1}]


def test_long_segment_is_followed_by_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_async.replay.journal.SEGMENT_BYTES", 2000)
    world = world_of(tmp_path, random.Random(5))
    buffer = world.buffer
    assert isinstance(buffer, Recorded)
    for seed in range(12):
        wander(world, random.Random(seed), num_events=5, resumes=False)
        buffer.begin_segment_if_long()
    assert len([*(tmp_path / "0").glob("*.log")]) > 1
    world.crash()


def test_disk_that_refuses_the_journal_leaves_the_buffer_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(tmp_path, random.Random(7))
    buffer = world.buffer
    assert isinstance(buffer, Recorded)
    assert buffer.journal is not None

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dapo_async.replay.journal.os.writev", full)
        wander(world, random.Random(7), num_events=30, resumes=False)
    assert buffer.take_journal_fault() is not None
    assert not buffer.journal.folder.exists(), "a torn journal must not be read"
    buffer.begin_segment()
    assert buffer.take_journal_fault() is None
    assert buffer.journal.is_open
    world.crash()
    wander(world, random.Random(8), num_events=30, resumes=False)
