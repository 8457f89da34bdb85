"""The learner as the loop sees it: one object in front of one Ray actor per rank.

Ranks are numbered as in `model.Mesh.every`: those that share a batch are neighbours. All ranks work
together on the model, and bring their parts of the weights together to be published. The first
`tensor_parallel` ranks send them to the engines; the first one writes them.

When a rank is lost, the supervisor restarts all of them within the run:

    lose ──▶ new processes load the newest checkpoint ──▶ they do the minibatches since then again

The same minibatches in the same order give the same weights, so that no group is trained twice and
the engines go on with the weights that they have. Calls that a loss breaks off wait and are
repeated.

One of several ranks that lacks memory for a pass is lost, too; a single one halves the pass by
itself. From then on all passes run in halves; minibatches that are done again run as they did.
"""

from __future__ import annotations

import asyncio
import time
from collections import ChainMap
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dapo_async.config import Config
from dapo_async.runtime.actors.reports import ProcessInfo
from dapo_async.runtime.handles.actors import LearnerHandle
from dapo_async.runtime.handles.handle import (
    ActorDied,
    ActorFailed,
    ActorSilent,
    ObjectsLost,
    RankMemoryShort,
)
from dapo_async.runtime.handles.redo_log import RedoLog
from dapo_async.runtime.handles.restarts import Restarts
from dapo_async.runtime.standstill import MinibatchTimes
from dapo_async.types import StepMetrics, TrainBatch
from dapo_async.weights import Announcement

T = TypeVar("T")
PING_S = 2.0  # an actor answers while its rank computes: without an answer it hangs


class LearnerGroup:
    """All learner ranks; also the publisher's `WeightSource`."""

    def __init__(
        self, ranks: Sequence[LearnerHandle], config: Config, *, redo: RedoLog | None = None
    ) -> None:
        """`redo`: of the checkpoint that the ranks have loaded."""
        self.ranks = list(ranks)
        self.redo = redo or RedoLog()
        self.restarts = Restarts("learner")
        # Gives a batch with new objects, when those of the batch are gone with a replay actor.
        self.again: Callable[[TrainBatch], Awaitable[TrainBatch]] | None = None
        self._dp, self._per_batch = config.learner.data_parallel, config.learner.ranks_per_batch
        self._num_senders = config.learner.tensor_parallel
        self._address, self._is_left = ("", 0), True  # of the weight groups' rendezvous
        self._dealing = asyncio.Lock()  # the ranks bring weights together for one purpose at a time
        self._captured_after = 0  # losses before the newest capture
        self.times = MinibatchTimes()
        self._fault, self._is_broken = "", asyncio.Event()
        self._num_halvings = 0  # of the passes of new minibatches, as the ranks are told
        self._last_halvings = 0  # of the newest minibatch; a single rank halves them by itself
        # A rank has failed in a minibatch: the others wait in it, and nothing can be asked of them.
        self.is_stuck = False

    @property
    def first(self) -> LearnerHandle:
        return self.ranks[0]

    @property
    def _senders(self) -> list[LearnerHandle]:
        return self.ranks[: self._num_senders]

    async def ready(self) -> list[ProcessInfo]:
        """Connects the ranks and waits until each has loaded its shard of the model."""
        address = await self.first.open_mesh() if len(self.ranks) > 1 else None
        return await self._together(rank.ready(address) for rank in self.ranks)

    def lose(self) -> None:
        """A rank is lost: ends all of them, for they work together. Calls wait for `restore`."""
        self.restarts.lose()
        self._num_halvings = max(self._num_halvings, self._last_halvings)  # new ranks know of none
        self._is_broken.clear()
        for rank in self.ranks:
            rank.kill()

    async def restore(
        self, start: Callable[[int, Path | None], Any], *, published: int | None
    ) -> list[ProcessInfo]:
        """Starts all ranks again and brings them to where they were.

        `start(number, state)` returns Ray's handle of a new actor that loads `state`. `published`:
        the newest version whose weights may still be sent; its snapshot is taken again. Calls wait
        until `restarts.go_on`. Raises as calls of the ranks do; then call `lose` and `restore`
        again.
        """
        for number, rank in enumerate(self.ranks):
            rank.replace(start(number, self.redo.state))
        self.is_stuck = False
        infos = await self.ready()
        await self._redo(published)
        return infos

    async def broken(self) -> str:
        """Waits until a minibatch has failed in a part of the ranks; returns why.

        The ranks are not in step any more then, and have to be restarted.
        """
        await self._is_broken.wait()
        return self._fault

    async def _redo(self, published: int | None) -> None:
        """Trains on the minibatches since the checkpoint again."""
        has_snapshot = published is None
        for done in self.redo.entries:
            if done.step == published and not has_snapshot:
                has_snapshot = True
                await self._snapshot()
            if done.batch is not None:
                await self._minibatch(done.batch)
            else:
                await self._end_step()
        if not has_snapshot:
            await self._snapshot()

    def saved(self, version: int, state: Path) -> bool:
        """A checkpoint of `version` is on disk; a restart begins there. False: a restart that is
        under way has begun at the checkpoint before, which stays the one to begin at."""
        if self.restarts.is_whole:
            self.redo.saved(version, state)
        return self.restarts.is_whole

    async def minibatch(self, batch: TrainBatch) -> StepMetrics:
        """One minibatch on all ranks; each data-parallel rank fetches only its share."""

        async def train() -> tuple[StepMetrics, TrainBatch]:
            planned = replace(batch, num_halvings=self._num_halvings)
            metrics = await self._minibatch(planned)
            self._last_halvings = int(metrics.maxima.get("halvings", 0))
            return metrics, replace(planned, num_halvings=self._last_halvings)

        metrics, trained = await self.restarts.again(train)
        self.redo.add(trained)
        return metrics

    async def _minibatch(self, batch: TrainBatch) -> StepMetrics:
        if self.again is not None:
            batch = await self.again(batch)
        parts = [replace(batch, references=(reference,)) for reference in batch.references]
        assert len(parts) == self._dp, f"{len(parts)} shares for {self._dp} data-parallel ranks"
        began_s = time.monotonic()
        try:
            metrics = await self._together(
                rank.minibatch(parts[number // self._per_batch])
                for number, rank in enumerate(self.ranks)
            )
        except ActorFailed:
            self.is_stuck = len(self.ranks) > 1
            raise
        self.times.add(time.monotonic() - began_s)
        # Ranks that share a batch have the same metrics: the first of them counts.
        first, *others = metrics[:: self._per_batch]
        return sum(others, start=first)

    async def end_step(self) -> None:
        """Ends a step before its last minibatch, on all ranks."""
        await self.restarts.again(self._end_step)
        self.redo.end_step()

    async def _end_step(self) -> None:
        await self._together(rank.end_step() for rank in self.ranks)

    async def snapshot(self) -> Announcement:
        """Every rank copies its shard for the next publish; the first one announces them."""
        return await self.restarts.again(self._snapshot)

    async def _snapshot(self) -> Announcement:
        announcement, *_ = await self._together(rank.snapshot() for rank in self.ranks)
        assert announcement is not None, "the first rank announces"
        return announcement

    async def sleep(self) -> None:
        """Every rank releases its device memory; that of a dead one is free."""
        answers = await asyncio.gather(
            *(rank.sleep() for rank in self.ranks), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ActorDied):
                raise answer

    async def wake(self) -> None:
        """Every rank takes its device memory again."""
        await self._on_all(lambda rank: rank.wake())

    async def open_group(self) -> tuple[str, int]:
        """Opens the rendezvous of the weight groups; returns its address."""
        self._is_left = False
        self._address = await self.restarts.again(self.first.open_group)
        return self._address

    async def leave_group(self) -> None:
        """Closes the weight groups, so that their members stop waiting."""
        self._is_left = True
        for sender in self._senders:
            with suppress(ActorDied):  # closes it, too
                await sender.leave_group()

    async def join(self, world_size: int) -> str | None:
        """Every sender joins its weight group. Returns why one was not formed, or None.

        It fails when an engine or this learner is lost. The rendezvous is closed then, so that the
        other engines stop waiting for the rest.
        """

        async def join(sender: LearnerHandle) -> None:
            if self._is_left:  # before the call was made: nobody would end its wait
                raise ActorFailed("the weight groups were left before they had formed")
            await sender.join(self._address, world_size)

        return await self._with_engines(lambda: [join(sender) for sender in self._senders])

    async def broadcast(self, announcement: Announcement) -> str | None:
        """Sends the weights to the engines. Returns why the broadcast broke off, or None.

        It breaks off when an engine or this learner is lost. The group is closed then, so that the
        other engines stop waiting for the rest.
        """
        async with self._dealing:
            return await self._with_engines(
                lambda: [rank.broadcast(announcement) for rank in self.ranks]
            )

    async def _with_engines(
        self, calls: Callable[[], list[Coroutine[Any, Any, None]]]
    ) -> str | None:
        """Collective calls with the engines. Returns why they failed, with the groups closed."""
        losses = self.restarts.num_losses
        try:
            await self._to_the_end(calls())
        except ActorFailed as error:
            await self.leave_group()
            return str(error)
        except ActorDied as error:
            if not await self.restarts.was_lost(losses):
                raise
            return str(error)
        return None

    async def checksum(self, announcement: Announcement) -> str:
        """The checksum of the announced weights: those of all ranks' shares add up."""
        return _added_up(await self._on_all(lambda rank: rank.checksum(announcement)))

    async def probe(self, announcement: Announcement) -> NDArray[np.float32]:
        """The learner's answer to the probe; all ranks get the same."""
        first, *_ = await self._on_all(lambda rank: rank.probe(announcement))
        return first

    async def server_hashes(self, announcement: Announcement) -> tuple[Mapping[str, str], ...]:
        """What SGLang servers must hash some of the announced weights to."""
        async with self._dealing:
            shares = await self._on_all(lambda rank: rank.server_hashes(announcement))
        return tuple(dict(ChainMap(*map(dict, each))) for each in zip(*shares, strict=True))

    async def write(self, announcement: Announcement) -> str:
        """Writes the weights to the run's folder of versions; returns it."""
        return await self.restarts.again(lambda: self._write(announcement, None))

    async def _write(self, announcement: Announcement, folder: Path | None) -> str:
        async with self._dealing:
            await self._to_the_end([rank.collect(announcement, folder) for rank in self.ranks])
        return await self.first.write(announcement, folder)

    async def write_once(self, announcement: Announcement, folder: Path) -> Announcement:
        """Writes the weights to `folder`; returns what was announced with checksum and answer.

        It is not repeated: after a loss another version may be the newest one.
        """
        # All at once: the next snapshot replaces the announced one.
        _, shares, (answer, *_) = await asyncio.gather(
            self._write(announcement, folder),
            self._together(rank.checksum(announcement) for rank in self.ranks),
            self._together(rank.probe(announcement) for rank in self.ranks),
        )
        return replace(announcement, checksum=_added_up(shares), probe_logprobs=answer)

    async def version(self) -> int:
        """The version of the weights; waits for a step in progress."""
        return _common(await self._on_all(lambda rank: rank.version()))

    async def capture_state(self) -> int:
        """Copies the whole state between two steps, for `save`; returns its version."""
        version = _common(await self._on_all(lambda rank: rank.capture_state()))
        self._captured_after = self.restarts.num_losses
        return version

    async def save(self, folder: Path) -> None:
        """Every rank writes its part of the captured state. Raises ActorDied after a loss, with
        which the captured state is gone."""
        if self._captured_after != self.restarts.num_losses:
            raise ActorDied("learner", "was restarted after its state was captured")
        await self._together(rank.save(folder) for rank in self.ranks)

    async def _on_all(self, call: Callable[[LearnerHandle], Coroutine[Any, Any, T]]) -> list[T]:
        return await self.restarts.again(lambda: self._together(call(rank) for rank in self.ranks))

    async def _together(self, calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """One call per rank, all at once: ranks wait for each other inside a call."""
        try:
            return await asyncio.gather(*calls)
        except (TimeoutError, ActorFailed) as error:
            if isinstance(error, RankMemoryShort):
                self._num_halvings += 1
            if isinstance(error, ObjectsLost | RankMemoryShort):
                self._fault = str(error)
                self._is_broken.set()
            await self._name_the_cause(error)
            raise

    async def _to_the_end(self, calls: Sequence[Coroutine[Any, Any, None]]) -> None:
        """Calls of ranks that wait for each other, beside their steps. After a failure, too, it
        waits for all, so that the next such calls come after them."""
        if len(calls) == 1:
            await calls[0]
            return
        answers = await asyncio.gather(*calls, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if errors:  # a death makes the others fail
            raise next((each for each in errors if isinstance(each, ActorDied)), errors[0])

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
            raise ActorSilent(
                f"{' and '.join(silent)} did not answer for {PING_S:g} s; before that, {error}"
            ) from error
        lines = [f"{name} in {line}" for name, line in by_name.items() if isinstance(line, str)]
        if lines:
            raise type(error)(f"{error}; still in their step: {', '.join(lines)}") from error


def _added_up(checksums: Sequence[str]) -> str:
    """The checksum of whole weights from those of their parts, modulo 2^64."""
    return f"{sum(int(each, 16) for each in checksums) % 2**64:016x}"


def _common(versions: Sequence[int]) -> int:
    assert len(set(versions)) == 1, f"the ranks are at versions {versions}"
    return versions[0]
