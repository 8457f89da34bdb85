"""Calls to an actor that is restarted within the run: they wait for it and are repeated.

    lose ──▶ calls fail or wait ──▶ go_on ──▶ calls are made, those that failed again
                               └──▶ end ──▶ calls raise ActorDied

The supervisor calls `keep`, `lose`, `go_on` and `end`; handles make their calls through `again`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from dapo_async.runtime.handles.handle import BREAK_S, ActorDied, ActorFailed, ActorSilent

T = TypeVar("T")
DEATH_NEWS_S = 2.0  # Ray reports a death within this time


class Restarts:
    """`is_kept`: a supervisor restarts the actor. Without one, errors are raised at once."""

    def __init__(self, name: str) -> None:
        self.is_kept = False
        self._name = name
        self._is_gone = False  # it was being restarted when the supervisor ended
        self.num_losses = 0
        self._is_whole, self._is_lost = asyncio.Event(), asyncio.Event()
        self._is_whole.set()

    @property
    def is_whole(self) -> bool:
        """The actor is not being restarted."""
        return self._is_whole.is_set()

    def keep(self) -> None:
        """A supervisor restarts the actor from now on."""
        self.is_kept = True
        self._is_lost.clear()

    def lose(self) -> None:
        """The actor is lost: calls wait for `go_on`."""
        self.num_losses += 1
        self._is_whole.clear()
        self._is_lost.set()

    def go_on(self) -> None:
        """Lets the calls that wait go on."""
        self._is_lost.clear()
        self._is_whole.set()

    def end(self) -> None:
        """Nobody restarts the actor any more. One that is being restarted must not be used: it may
        be in the middle of what it does again."""
        self.is_kept = False
        self._is_gone = not self.is_whole
        self.go_on()
        self._is_lost.set()  # a call that waits to hear of its loss need not wait any longer

    async def again(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of `call`, which is repeated when a loss breaks it off."""
        while True:
            await self._is_whole.wait()
            if self._is_gone:
                raise ActorDied(self._name, "was being restarted when the run ended")
            losses = self.num_losses
            try:
                return await call()
            except (ActorDied, ActorSilent):
                if not await self.was_lost(losses):
                    raise
            except (ActorFailed, TimeoutError):
                if not await self.was_lost(losses, within_s=DEATH_NEWS_S):
                    raise

    async def was_lost(self, losses_before: int, *, within_s: float | None = None) -> bool:
        """Whether the actor was lost since then.

        The supervisor may hear of it later than the calls that the loss breaks off: it waits for a
        broken connection to come back.
        """
        if not self.is_kept:
            return False
        if self.num_losses == losses_before:
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s or BREAK_S + DEATH_NEWS_S):
                    await self._is_lost.wait()
        return self.num_losses > losses_before
