"""Calls to an actor that is restarted within the run: they wait for it and are repeated.

    lose ──▶ calls fail or wait ──▶ go_on ──▶ calls are made, those that failed again

The supervisor calls `lose` and `go_on`; handles make their calls through `again`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from dapo_async.runtime.handles.handle import ActorDied, ActorFailed

T = TypeVar("T")
DEATH_NEWS_S = 2.0  # Ray reports a death within this time


class Restarts:
    """`is_kept`: a supervisor restarts the actor. Without one, errors are raised at once."""

    def __init__(self) -> None:
        self.is_kept = False
        self.num_losses = 0
        self._is_whole, self._is_lost = asyncio.Event(), asyncio.Event()
        self._is_whole.set()

    @property
    def is_whole(self) -> bool:
        """The actor is not being restarted."""
        return self._is_whole.is_set()

    def lose(self) -> None:
        """The actor is lost: calls wait for `go_on`."""
        self.num_losses += 1
        self._is_whole.clear()
        self._is_lost.set()

    def go_on(self) -> None:
        """Lets the calls that wait go on."""
        self._is_lost.clear()
        self._is_whole.set()

    async def again(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of `call`, which is repeated when a loss breaks it off."""
        while True:
            await self._is_whole.wait()
            losses = self.num_losses
            try:
                return await call()
            except (ActorDied, ActorFailed, TimeoutError):
                if not await self.was_lost(losses):
                    raise

    async def was_lost(self, losses_before: int) -> bool:
        """Whether the actor was lost since then.

        The supervisor may hear of it a little later than the calls that the loss breaks off.
        """
        if not self.is_kept:
            return False
        if self.num_losses == losses_before:
            with suppress(TimeoutError):
                async with asyncio.timeout(DEATH_NEWS_S):
                    await self._is_lost.wait()
        return self.num_losses > losses_before
