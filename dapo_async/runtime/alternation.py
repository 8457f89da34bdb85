"""Who has the devices: `OwnDevices` with model.placement=separate, `SharedDevices` with shared.

The loop calls `to_learner` when a batch is complete, and `to_engines` when the learner has trained
on it and taken the snapshot to be published. `turns.py` says what may happen when. The supervisor
asks before it starts a process that takes device memory:

    engine_starts    in a turn of the engines; no switch meanwhile
    engine_returns   it proves the newest weights: no switch to the learner meanwhile
    learner_restarts in the learner's turn, or in one that the engines lend it for the restart

A process that is dead holds no memory: a switch does not wait for it, and its successor starts in
the next turn of its side.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from dapo_async.config import Config
from dapo_async.runtime.turns import Turn, Turns

MARGIN_S = 30.0  # an actor that starts says itself why it is late


class Sleeper(Protocol):
    """A rollout worker. Both calls return at once if nothing is to be done."""

    name: str

    async def sleep(self) -> None:
        """Its engine stops and releases its device memory; returns also if it is dead."""
        ...

    async def wake(self) -> None:
        """Its engine takes its device memory again."""
        ...


class SleepingLearner(Protocol):
    """The learner: all its ranks."""

    async def sleep(self) -> None:
        """See `Sleeper`."""
        ...

    async def wake(self) -> None:
        """Waits for a restart that is under way."""
        ...


class OwnDevices:
    """Learner and engines have their own devices: nobody waits for them."""

    async def to_learner(self) -> None:
        """Returns when the learner may train."""

    async def to_engines(self) -> None:
        """Returns when the engines may generate and take weights."""

    def engine_starts(self, name: str) -> AbstractAsyncContextManager[None]:
        """In the body a process or a server of `name` may start."""
        return _at_once()

    def engine_returns(self, name: str) -> AbstractAsyncContextManager[None]:
        """In the body `name` reads weights. Enter it right after the start."""
        return _at_once()

    def learner_restarts(self) -> AbstractAsyncContextManager[None]:
        """In the body new ranks may start."""
        return _at_once()


@asynccontextmanager
async def _at_once() -> AsyncIterator[None]:
    yield


class SharedDevices(OwnDevices):
    """Each rank and one engine take turns on one device. The engines have the first turn."""

    def __init__(
        self,
        config: Config,
        *,
        learner: SleepingLearner,
        workers: Sequence[Sleeper],
        ranks: Sequence[str],
    ) -> None:
        self._learner, self._workers = learner, {worker.name: worker for worker in workers}
        self.turns = Turns(engines=self._workers, ranks=ranks)
        deadlines = config.deadlines
        # What others may take: a start, and a publish or a switch.
        self._others_s = deadlines.start_s + MARGIN_S + deadlines.answer_s
        self._turn_s = deadlines.work_s * config.learner.num_minibatches + self._others_s
        self._busy = ""  # what changes who has the devices now
        self._returning: set[str] = set()  # engines that read weights
        self._is_lent = False  # the learner's turn is for a restart, not for a step
        self._changed = asyncio.Event()  # a new one after each change

    async def to_learner(self) -> None:
        """Engines stop between two tokens; their groups stay on them."""
        async with self._alone(
            "the learner",
            "the switch to the learner",
            lambda: ", ".join(f"the return of {name}" for name in sorted(self._returning)),
        ):
            self._is_lent = False  # a step follows
            if self.turns.turn is Turn.ENGINES:
                await self._release_engines()
        await self._learner.wake()

    async def to_engines(self) -> None:
        """The ranks' state goes to host memory; groups go on with the weights before."""
        async with self._alone("the engines", "the switch to the engines"):
            await self._give_back()

    @asynccontextmanager
    async def engine_starts(self, name: str) -> AsyncIterator[None]:
        async with self._alone(
            name,
            f"the start of {name}",
            lambda: "" if self.turns.turn is Turn.ENGINES else "the learner's step",
            limit_s=self._turn_s,
        ):
            yield

    @asynccontextmanager
    async def engine_returns(self, name: str) -> AsyncIterator[None]:
        self._returning.add(name)
        try:
            yield
        finally:
            self._returning.discard(name)
            self._notify()

    @asynccontextmanager
    async def learner_restarts(self) -> AsyncIterator[None]:
        """A publish may wait for the learner, and the next step for the publish: so the engines
        lend their turn. When it fails, another restart follows."""
        async with self._alone("the learner", "the restart of the learner"):
            if self.turns.turn is Turn.ENGINES:
                await self._release_engines()
                self._is_lent = True
            yield
            if self._is_lent:
                await self._give_back()

    async def _release_engines(self) -> None:
        async def sleep(name: str) -> None:
            await self._workers[name].sleep()
            self.turns.released(name)

        await asyncio.gather(*map(sleep, self.turns.end()))
        self.turns.begin()

    async def _give_back(self) -> None:
        ranks = self.turns.end()
        await self._learner.sleep()
        for rank in ranks:
            self.turns.released(rank)
        self._is_lent = False
        await asyncio.gather(*(self._workers[name].wake() for name in self.turns.begin()))

    @asynccontextmanager
    async def _alone(
        self,
        who: str,
        what: str,
        waits_for: Callable[[], str] = lambda: "",
        *,
        limit_s: float | None = None,
    ) -> AsyncIterator[None]:
        """Runs the body when nothing else changes who has the devices, and `waits_for` names
        nothing. Raises TimeoutError, which names who waits for whom."""
        limit_s = limit_s or self._others_s
        try:
            async with asyncio.timeout(limit_s):
                while self._busy or waits_for():
                    await self._changed.wait()
        except TimeoutError as error:
            reasons = " and ".join(filter(None, (self._busy, waits_for())))
            raise TimeoutError(
                f"{who} waited {limit_s:g} s for the shared devices: {reasons} has not ended"
            ) from error
        self._busy = what
        try:
            yield
        finally:
            self._busy = ""
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
