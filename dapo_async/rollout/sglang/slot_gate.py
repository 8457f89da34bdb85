"""Slots of an engine whose number may change: at most so many requests are at the server.

Used by `engine.py`. Requests enter in the order in which they came.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType


class SlotGate:
    """An asynchronous context manager: one slot is taken inside. Use it in one event loop."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def resize(self, num_slots: int) -> None:
        """With fewer slots than are taken, nothing enters until enough have left."""
        self.num_slots = num_slots
        self._let_in()

    async def __aenter__(self) -> None:
        if not self._waiting and self._taken < self.num_slots:
            self._taken += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the slot came together with the cancellation
                self._leave()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._taken -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._taken < self.num_slots:
            turn = self._waiting.popleft()
            if not turn.done():  # else its request was cancelled
                self._taken += 1
                turn.set_result(None)
