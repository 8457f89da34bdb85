"""A replay buffer with a journal, whose process dies and comes back, for its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from replay_world import World

from dapo_async.replay import ReplayBuffer
from dapo_async.replay.buffer_image import image_of
from dapo_async.replay.group_io import pack_group, unpack_group
from dapo_async.replay.journal import Journal
from dapo_async.replay.journaled import JournaledBuffer
from dapo_async.types import Group, GroupFacts


class Recorded(JournaledBuffer):
    """Knows the group of each payload of the world."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.options = options
        self.groups: dict[str, Group] = {}

    def offer(self, group: Any, payload: Any) -> Any:
        if payload is not None and isinstance(group, Group):
            self.groups[payload] = group
        return super().offer(group, payload)

    def keep(self, folder: Path) -> None:
        self.keep_journal(
            Journal(folder),
            data_of=lambda payload: pack_group(self.groups[payload]),
            extras=lambda: {"extra": 7},
        )


def recovered(folder: Path, options: dict[str, Any]) -> Recorded:
    journal = Journal(folder)
    found = journal.read()
    assert found is not None
    image, records = found
    assert image["extra"] == 7

    def facts_of(payload: str) -> GroupFacts:
        group_id = int(payload.removeprefix("payload-"))
        return GroupFacts.of(unpack_group(journal.places[group_id].read()))

    def payload(group_id: int) -> str:
        return f"payload-{group_id}"

    buffer = Recorded(**options)
    buffer.load(image, payload)
    for _ in buffer.repeat(records, payload=payload, facts_of=facts_of):
        pass
    return buffer


class Crashing(World):
    """Its buffer dies and comes back."""

    def __init__(self, buffer: ReplayBuffer, folder: Path, **options: Any) -> None:
        self.folder = folder
        assert isinstance(buffer, Recorded)
        buffer.keep(folder / "0")
        self.lives = 0
        super().__init__(buffer, **options)

    def crash(self) -> None:
        before = self.buffer
        assert isinstance(before, Recorded)
        assert before.journal is not None
        before.journal.forget({*before._buffered, *before._taken})
        buffer = recovered(before.journal.folder, before.options)
        assert image_of(buffer) == image_of(before)
        self.go_on_with(buffer, before)

    def go_on_with(self, buffer: Recorded, before: Recorded) -> None:
        assert before.journal is not None
        before.journal.close()
        buffer.groups = before.groups
        self.lives += 1
        self.buffer = buffer
        buffer.keep(self.folder / str(self.lives))

    def resume(self) -> None:
        before = self.buffer
        assert isinstance(before, Recorded)
        super().resume()
        after = self.buffer
        assert isinstance(after, Recorded)
        self.go_on_with(after, before)

    def end(self) -> None:
        assert isinstance(self.buffer, Recorded)
        assert self.buffer.journal is not None
        self.buffer.journal.close()
