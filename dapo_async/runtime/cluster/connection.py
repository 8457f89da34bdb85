"""The driver's connection to Ray, from connecting to the end of Ray."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress

import psutil
import ray

from dapo_async.config import STOP_S, Config
from dapo_async.runtime.cluster.connect import connect, disconnect
from dapo_async.runtime.cluster.environment import LOCAL
from dapo_async.runtime.cluster.head_watch import ray_listens
from dapo_async.runtime.cluster.orphan_reaper import Reaper
from dapo_async.runtime.cluster.own_ray import refusal

KILL_S = 5.0  # a killed process is gone within milliseconds


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
        self._children: set[psutil.Process] = set()  # of this process, before an own Ray
        self._is_open = False

    async def open(self) -> str:
        """Returns the line that says which Ray it is.

        Raises ValueError when Ray can't be started or joined in time, or is too small.
        """
        start_s, address = self._config.deadlines.start_s, self._config.ray.address
        if address == LOCAL:
            self._children = _children()
            self._reaper = Reaper()
        try:
            async with asyncio.timeout(start_s):
                self._connecting = asyncio.get_running_loop().run_in_executor(
                    self._thread, connect, self._config
                )
                line = await asyncio.shield(self._connecting)
        except TimeoutError as error:
            late = f"not within {start_s:g} s; if this machine is slow, raise deadlines.start_s"
            raise ValueError(
                refusal(TimeoutError(late))
                if address == LOCAL
                else f"ray.address ({address}) can't be joined: {late}, or set ray.address=local"
            ) from error
        self._is_open = True
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
        started, _ = await asyncio.wait([self._connecting], timeout=STOP_S)
        if started and self._reaper is not None and ray.is_initialized() and not ray_listens():
            self._end_all()  # Ray can't end what is left of an own Ray without head or raylet
        elif started:
            with self._reaper.hasten() if self._reaper is not None else nullcontext():
                await asyncio.get_running_loop().run_in_executor(self._thread, disconnect)
        if self._reaper is not None:
            self._reaper.dismiss()
            if not self._is_open:
                self._end_all()

    def _end_all(self) -> None:
        """Kills what an own Ray has left, which Ray itself ends only at exit: of a failed start, or
        of a Ray that has lost its head or its raylet."""
        left = _children() - self._children
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=KILL_S)


def _children() -> set[psutil.Process]:
    """All processes that descend from this one."""
    return set(psutil.Process().children(recursive=True))
