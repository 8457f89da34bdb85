"""The learner as the loop sees it: one object, one Ray actor per rank behind it, numbered dp index · tp + tp index."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dapo_async.config import Config
from dapo_async.learner.batching import share_groups
from dapo_async.runtime.actors.reports import ProcessInfo
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed, Remote
from dapo_async.types import StepMetrics, TrainBatch
from dapo_async.weights import Announcement

PING_S = 2.0  # an actor answers while its rank computes: one that does not answer for so long hangs


class Learner:
    """What belongs to the model is done by all ranks together; publishing and writing by the first alone."""

    def __init__(self, remotes: Sequence[Remote], config: Config) -> None:
        self.remotes, self._deadlines = list(remotes), config.deadlines
        self._tolerant = config.rollout.engine == "sglang"
        self._dp, self._tp = config.learner.data_parallel, config.learner.tensor_parallel

    @property
    def first(self) -> Remote:
        return self.remotes[0]

    async def ready(self) -> list[ProcessInfo]:
        """Brings the ranks together and waits until each has its shard of the model."""
        deadline_s = self._deadlines.start_s
        address = (
            await self.first.call("open_mesh", deadline_s=deadline_s)
            if len(self.remotes) > 1
            else None
        )
        return await self._all("ready", [(address,)] * len(self.remotes), deadline_s=deadline_s)

    async def step(self, batch: TrainBatch) -> StepMetrics:
        """One step of all ranks; each data-parallel rank fetches only its share of the groups."""
        shares = share_groups(batch.num_tokens, self._dp)
        parts = [
            replace(batch, references=tuple(batch.references[position] for position in share))
            for share in shares
        ]
        arguments = [
            (parts[rank // self._tp], shares[rank // self._tp]) for rank in range(len(self.remotes))
        ]
        metrics: list[StepMetrics] = await self._all(
            "step", arguments, deadline_s=self._deadlines.work_s
        )
        # The ranks of one tensor-parallel axis saw the same groups: the first of each speaks for them.
        first, *others = metrics[:: self._tp]
        return sum(others, start=first)

    async def snapshot(self) -> Announcement:
        announcement, *_ = await self._all("snapshot", deadline_s=self._deadlines.answer_s)
        assert isinstance(announcement, Announcement)
        return announcement

    async def broadcast(self, announcement: Announcement) -> str | None:
        """Where engines are servers, which may be lost: why it broke off. What the others took of it is worthless, so they are let go."""
        try:
            await self.first.call("broadcast", announcement, deadline_s=self._deadlines.answer_s)
        except ActorFailed as error:
            if not self._tolerant:
                raise
            await self.first.call("leave_group", deadline_s=self._deadlines.answer_s)
            return str(error)
        return None

    async def write(self, announcement: Announcement, folder: Path | None = None) -> str:
        """Into the run's folder of versions, or into `folder`; returns which."""
        written: str = await self.first.call(
            "write", announcement, folder, deadline_s=self._deadlines.answer_s
        )
        return written

    async def version(self) -> int:
        """That of the weights; a step that runs is waited for."""
        return self._same(await self._all("version", deadline_s=self._deadlines.work_s))

    async def freeze(self) -> int:
        """Copies the whole state between two steps; returns its version."""
        return self._same(await self._all("freeze", deadline_s=self._deadlines.work_s))

    @staticmethod
    def _same(versions: Sequence[int]) -> int:
        assert len(set(versions)) == 1, f"the ranks are at versions {versions}"
        return versions[0]

    async def save(self, folder: Path) -> None:
        """Every rank writes its parts of what was frozen."""
        await self._all("save", [(folder,)] * len(self.remotes), deadline_s=self._deadlines.work_s)

    async def _all(
        self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None, *, deadline_s: float
    ) -> list[Any]:
        """`method` on every rank at once, each with its `arguments`: the ranks wait for each other, so none may be asked after another."""
        each = arguments or [()] * len(self.remotes)
        calls = (
            remote.call(method, *own, deadline_s=deadline_s)
            for remote, own in zip(self.remotes, each, strict=True)
        )
        try:
            return await asyncio.gather(*calls)
        except (TimeoutError, ActorFailed) as error:
            await self._name_the_cause(error)
            raise

    async def _name_the_cause(self, error: TimeoutError | ActorFailed) -> None:
        """Raises for the rank that died or hangs: through it all others fail or are late, and any may be heard first.

        Those that are still in their step say where, for the reader to see which of them is not where the others wait for it.
        """
        pings = (remote.call("ping", deadline_s=PING_S) for remote in self.remotes)
        answers = dict(
            zip(self.remotes, await asyncio.gather(*pings, return_exceptions=True), strict=True)
        )
        for answer in answers.values():
            if isinstance(answer, ActorDied):
                raise answer from error
        if silent := [
            remote.name for remote, answer in answers.items() if isinstance(answer, TimeoutError)
        ]:
            raise TimeoutError(
                f"{' and '.join(silent)} gave no sign of life for {PING_S:g} s; before, {error}"
            ) from error
        if stepping := [
            f"{remote.name} in {answer}"
            for remote, answer in answers.items()
            if isinstance(answer, str)
        ]:
            raise type(error)(f"{error}; still in their step: {', '.join(stepping)}") from error


def rank_names(config: Config) -> list[str]:
    """`learner`, or `learner-0`, `learner-1`, … where there are several ranks."""
    count = config.learner.data_parallel * config.learner.tensor_parallel
    return ["learner"] if count == 1 else [f"learner-{rank}" for rank in range(count)]
