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

    async def fail(self, indices: Sequence[int], why: str) -> None:
        """These groups will not be offered: their credits return. Groups that have ended meanwhile are ignored."""
        ...

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
        self._rolling = 0  # groups on the engine or about to be
        self._in_hand = 0  # groups that are not offered or given up yet, and the request for more
        self._put_down = asyncio.Event()  # set whenever one of these ends
        self._wanted: set[int] = set()  # admitted and to be offered: taken out when offered, evicted or of wrong weights
        self._doomed: set[int] = set()  # evicted since the last request: its admissions may come later than their eviction
        self._room = asyncio.Event()
        self._open = asyncio.Event()  # cleared while the engine is quarantined
        self._open.set()
        self._own = asyncio.Event()  # cleared while the engine is leased
        self._own.set()
        self._proved = asyncio.Event()  # cleared from a weight swap until its handshake
        self._proved.set()

    async def run(self) -> None:
        """Rolls groups until it is cancelled; raises whatever a group, the engine or the replay room raised, in an ExceptionGroup."""
        async with asyncio.TaskGroup() as groups:
            groups.create_task(self._abort_doomed(), name="doomed")
            while True:
                if not (self._open.is_set() and self._own.is_set()):
                    await self._open.wait()
                    await self._own.wait()
                    continue
                if self._rolling >= self._capacity:
                    self._room.clear()
                    await self._room.wait()
                    continue
                for admission in await self._admit(self._capacity - self._rolling):
                    self._rolling += 1
                    self._in_hand += 1
                    self._wanted.add(admission.index)
                    groups.create_task(self._roll(admission), name=f"group {admission.index}")

    async def _admit(self, num_groups: int) -> list[Admission]:
        """Asks for groups; what is idle on the engine meanwhile is without credit."""
        self._doomed.clear()
        self._in_hand += 1
        self.engine.starving(True)
        try:
            admissions = await self._replay.admit(self.name, num_groups)
        finally:
            self.engine.starving(False)
            self._lay_down()
        return [admission for admission in admissions if admission.index not in self._doomed]

    async def _abort_doomed(self) -> None:
        while True:
            doomed = await self._replay.doomed(self.name)
            self._doomed.update(doomed)
            self._wanted.difference_update(doomed)
            await self.engine.abort(doomed)

    async def _roll(self, admission: Admission) -> None:
        try:
            await self._generate(admission)
        finally:
            self._lay_down()

    def _lay_down(self) -> None:
        self._in_hand -= 1
        self._put_down.set()

    async def _generate(self, admission: Admission) -> None:
        index = admission.index
        request = GroupRequest(index, admission.prompt.token_ids, admission.group_size, self._sampling)
        try:
            await self._open.wait()  # the admission may have been on its way when the quarantine began
            if index not in self._wanted:
                return
            completions = await self.engine.generate(request)
        except Aborted:
            if index in self._wanted:
                raise  # not taken off by this worker: its credit would never return
            return
        finally:
            self._rolling -= 1
            self._room.set()
        if index not in self._wanted:
            return
        group = await self._score(admission, completions)
        await self._proved.wait()
        if index in self._wanted:
            self._wanted.remove(index)
            await self._replay.offer(group)

    def hold(self, on: bool) -> None:
        """On, from before a weight swap: groups that finish wait. Off, when the handshake has proved the new weights: they are offered."""
        if on:
            self._proved.clear()
        else:
            self._proved.set()

    def lease(self, on: bool) -> None:
        """On: the engine is lent out, so no group is asked for; what is in hand goes on to its end. Off: admission goes on."""
        if on:
            self._own.clear()
        else:
            self._own.set()

    async def drained(self) -> None:
        """After `lease`: returns when nothing is in hand, the request for groups on its way and what it brings included."""
        while self._in_hand:
            self._put_down.clear()
            await self._put_down.wait()

    async def quarantine(self, on: bool) -> None:
        """On: the engine's weights are wrong, so nothing new is admitted or started here, and what was generated is given up.

        Which weights sampled the groups in flight is unknown (laws 1 and 5): they are aborted, never offered, and failed, which returns their
        credits; all this is done when the call returns. Off: admission goes on.
        """
        if not on:
            self._open.set()
            return
        self._open.clear()
        given_up = sorted(self._wanted)
        self._wanted.clear()
        if given_up:
            await self.engine.abort(given_up)
            await self._replay.fail(given_up, f"quarantine of {self.name}")
