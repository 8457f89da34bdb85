"""The driver's connection to Ray, from connecting to the end of Ray."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from dapo_async.config import Config
from dapo_async.runtime.cluster.connect import connect, disconnect
from dapo_async.runtime.cluster.environment import LOCAL
from dapo_async.runtime.cluster.orphan_reaper import Reaper


class RayConnection:
    """Starts or joins Ray in a thread that lives as long as the run.

    Ray's processes die with the thread that started them. The default executor of asyncio would
    not do: it would be waited for without end when Ray's start hangs.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._connecting: asyncio.Future[str] | None = None
        self._reaper: Reaper | None = None  # of an own Ray

    async def open(self) -> str:
        """Returns the line that says which Ray it is.

        Raises ValueError when Ray can't be joined or is too small, and TimeoutError.
        """
        start_s = self._config.deadlines.start_s
        if self._config.ray.address == LOCAL:
            self._reaper = Reaper()
        try:
            async with asyncio.timeout(start_s):
                self._connecting = asyncio.get_running_loop().run_in_executor(
                    self._thread, connect, self._config
                )
                line = await asyncio.shield(self._connecting)
        except TimeoutError as error:
            raise TimeoutError(f"the driver waited {start_s:g} s for Ray to start") from error
        self.watch_orphans()
        return line

    def watch_orphans(self) -> None:
        """The processes of an own Ray that exist now end with this process, however it ends."""
        if self._reaper is not None:
            self._reaper.watch()

    async def close(self) -> None:
        """Ends an own Ray or leaves a joined one.

        A start that was interrupted is waited for, because half a Ray can't be shut down. A start
        that hangs is left alone.
        """
        if self._connecting is None:
            return
        started, _ = await asyncio.wait([self._connecting], timeout=self._config.deadlines.stop_s)
        if started:
            with self._reaper.hasten() if self._reaper is not None else nullcontext():
                await asyncio.get_running_loop().run_in_executor(self._thread, disconnect)
        if self._reaper is not None:
            self._reaper.dismiss()
