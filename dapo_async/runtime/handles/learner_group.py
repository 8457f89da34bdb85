"""The learner as the loop sees it: one object in front of one Ray actor per rank.

Ranks are numbered data-parallel index x tensor_parallel + tensor-parallel index. All ranks work
together on the model; the first one alone publishes and writes weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dapo_async.config import Config
from dapo_async.runtime.actors.reports import ProcessInfo
from dapo_async.runtime.handles.actors import LearnerHandle
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed
from dapo_async.types import StepMetrics, TrainBatch
from dapo_async.weights import Announcement

T = TypeVar("T")
PING_S = 2.0  # an actor answers while its rank computes: without an answer it hangs


class LearnerGroup:
    """All learner ranks; also the publisher's `WeightSource`."""

    def __init__(self, ranks: Sequence[LearnerHandle], config: Config) -> None:
        self.ranks = list(ranks)
        self._dp, self._tp = config.learner.data_parallel, config.learner.tensor_parallel

    @property
    def first(self) -> LearnerHandle:
        return self.ranks[0]

    async def ready(self) -> list[ProcessInfo]:
        """Connects the ranks and waits until each has loaded its shard of the model."""
        address = await self.first.open_mesh() if len(self.ranks) > 1 else None
        return await self._together(rank.ready(address) for rank in self.ranks)

    async def minibatch(self, batch: TrainBatch) -> StepMetrics:
        """One minibatch on all ranks; each data-parallel rank fetches only its share."""
        parts = [replace(batch, references=(reference,)) for reference in batch.references]
        assert len(parts) == self._dp, f"{len(parts)} shares for {self._dp} data-parallel ranks"
        metrics = await self._together(
            rank.minibatch(parts[number // self._tp]) for number, rank in enumerate(self.ranks)
        )
        # The ranks of one tensor-parallel axis saw the same groups: the first of each counts.
        first, *others = metrics[:: self._tp]
        return sum(others, start=first)

    async def end_step(self) -> None:
        """Ends a step before its last minibatch, on all ranks."""
        await self._together(rank.end_step() for rank in self.ranks)

    async def snapshot(self) -> Announcement:
        """Copies the current weights for the next publish; the first rank announces them."""
        announcement, *_ = await self._together(rank.snapshot() for rank in self.ranks)
        assert announcement is not None, "the first rank announces"
        return announcement

    async def join(self, world_size: int) -> str | None:
        """Joins the weight group. Returns why it was not formed, or None.

        It fails when an engine is lost. The rendezvous is closed then, so that the other engines
        stop waiting for the rest.
        """
        return await self._with_engines(self.first.join(world_size))

    async def broadcast(self, announcement: Announcement) -> str | None:
        """Sends the weights to the engines. Returns why the broadcast broke off, or None.

        It breaks off when an engine is lost. The group is closed then, so that the other engines
        stop waiting for the rest.
        """
        return await self._with_engines(self.first.broadcast(announcement))

    async def _with_engines(self, call: Coroutine[Any, Any, None]) -> str | None:
        """A collective call with the engines. Returns why it failed, with the group closed."""
        try:
            await call
        except ActorFailed as error:
            await self.first.leave_group()
            return str(error)
        return None

    async def checksum(self, announcement: Announcement) -> str:
        """The checksum of the announced weights."""
        return await self.first.checksum(announcement)

    async def server_hashes(self, announcement: Announcement) -> tuple[Mapping[str, str], ...]:
        """What SGLang servers must hash some of the announced weights to."""
        return await self.first.server_hashes(announcement)

    async def write(self, announcement: Announcement, folder: Path | None = None) -> str:
        """Writes the weights to `folder`, by default the run's folder of versions; returns it."""
        return await self.first.write(announcement, folder)

    async def version(self) -> int:
        """The version of the weights; waits for a step in progress."""
        return _common(await self._together(rank.version() for rank in self.ranks))

    async def capture_state(self) -> int:
        """Copies the whole state between two steps, for `save`; returns its version."""
        return _common(await self._together(rank.capture_state() for rank in self.ranks))

    async def save(self, folder: Path) -> None:
        """Every rank writes its part of the captured state."""
        await self._together(rank.save(folder) for rank in self.ranks)

    async def _together(self, calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """One call per rank, all at once: ranks wait for each other inside a call."""
        try:
            return await asyncio.gather(*calls)
        except (TimeoutError, ActorFailed) as error:
            await self._name_the_cause(error)
            raise

    async def _name_the_cause(self, error: TimeoutError | ActorFailed) -> None:
        """Raises for the rank that died or hangs, which makes all the others fail or be late.

        Ranks that are still in their step report their current line, so the reader sees which
        rank is stuck.
        """
        answers = await asyncio.gather(
            *(rank.within(PING_S).ping() for rank in self.ranks), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, ActorDied):
                raise answer from error
        by_name = {rank.name: answer for rank, answer in zip(self.ranks, answers, strict=True)}
        silent = [name for name, answer in by_name.items() if isinstance(answer, TimeoutError)]
        if silent:
            raise TimeoutError(
                f"{' and '.join(silent)} did not answer for {PING_S:g} s; before that, {error}"
            ) from error
        lines = [f"{name} in {line}" for name, line in by_name.items() if isinstance(line, str)]
        if lines:
            raise type(error)(f"{error}; still in their step: {', '.join(lines)}") from error


def _common(versions: Sequence[int]) -> int:
    assert len(set(versions)) == 1, f"the ranks are at versions {versions}"
    return versions[0]
