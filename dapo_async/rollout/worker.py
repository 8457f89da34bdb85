"""The rollout worker: admissions come in from the replay room, scored groups go back to it; an engine does the work between.

One asyncio task per group, so a slow group never holds back another. The worker's actor in `runtime/` gives it its ports.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from dapo_async.rollout.engine import Aborted, Engine, GroupRequest, SamplingParams
from dapo_async.types import Admission, Completion, Group


class ReplayPort(Protocol):
    """The worker's side of the replay actor."""

    async def admit(self, worker: str, num_groups: int) -> Sequence[Admission]:
        """Waits for credits and returns 1 to `num_groups` admissions, or none when the wait was long enough to ask again."""
        ...

    async def offer(self, group: Group) -> None: ...

    async def doomed(self, worker: str) -> Sequence[int]:
        """Waits for groups of this worker that were evicted while it generates them."""
        ...


class RolloutWorker:
    """Keeps its engine full as long as there are credits.

    It holds `num_slots / group_size` groups, rounded up, and one more, so that a finished slot finds its successor at the next decode step.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        *,
        replay: ReplayPort,
        score: Callable[[Admission, Sequence[Completion]], Awaitable[Group]],
        sampling: SamplingParams,
        group_size: int,
    ) -> None:
        self.name, self.engine = name, engine
        self._replay, self._score, self._sampling = replay, score, sampling
        self._capacity = -(-engine.num_slots // group_size) + 1
        self._rolling = 0
        self._room = asyncio.Event()
        self._open = asyncio.Event()  # cleared while the engine is quarantined
        self._open.set()
        self._stopping = False

    async def run(self) -> None:
        """Rolls groups until `stop`; raises whatever a group, the engine or the replay room raised, in an ExceptionGroup."""
        async with asyncio.TaskGroup() as groups:
            doomed = groups.create_task(self._abort_doomed(), name="doomed")
            while self._rolling or not self._stopping:
                self._room.clear()
                if self._stopping or self._rolling >= self._capacity:
                    await self._room.wait()
                    continue
                if not self._open.is_set():
                    await self._open.wait()
                    continue
                admissions = await self._replay.admit(self.name, self._capacity - self._rolling)
                for admission in admissions:
                    self._rolling += 1
                    groups.create_task(self._roll(admission), name=f"group {admission.index}")
            doomed.cancel()

    async def _abort_doomed(self) -> None:
        while True:
            await self.engine.abort(await self._replay.doomed(self.name))

    async def _roll(self, admission: Admission) -> None:
        request = GroupRequest(admission.index, admission.prompt.token_ids, admission.group_size, self._sampling)
        try:
            await self._open.wait()  # the admission may have been on its way when the quarantine began
            completions = await self.engine.generate(request)
        except Aborted:
            return  # the replay room evicted this group and has its credit back already
        finally:
            self._rolling -= 1
            self._room.set()
        await self._replay.offer(await self._score(admission, completions))

    def quarantine(self, on: bool) -> None:
        """While on, nothing new is admitted or started here."""
        if on:
            self._open.clear()
        else:
            self._open.set()

    def stop(self) -> None:
        """Ends `run` when the groups in flight are done."""
        self._stopping = True
        self._open.set()
        self._room.set()
