"""Notices that Ray's head (its GCS process) is gone, while the driver can still end in order.

Ray itself ends the driver 60 seconds after the GCS, without a checkpoint or a summary. Calls to
actors go on without the GCS. Calls that need it, such as killing an actor, would wait for it.
"""

from __future__ import annotations

import asyncio
import socket
import threading

import ray

from dapo_async.utils.network import split

CHECK_S = 2.0
GONE_S = 20.0  # a GCS that is restarted by its cluster comes back within this time


class RayGone(RuntimeError):
    """The GCS does not answer; the message says for how long, and what to do."""


def head_address() -> str:
    """HOST:PORT of the GCS."""
    return str(ray.get_runtime_context().gcs_address)


def head_listens(*, timeout_s: float = 1.0) -> bool:
    """Whether a process listens at the GCS's address; it may be stopped."""
    try:
        socket.create_connection(split(head_address()), timeout=timeout_s).close()
    except OSError:
        return False
    return True


async def watch_head() -> None:
    """Raises RayGone when the GCS has not answered for `GONE_S` seconds; never returns."""
    gone_s = GONE_S
    address, answered_s = head_address(), asyncio.get_running_loop().time()
    while True:
        await asyncio.sleep(CHECK_S)
        now_s = asyncio.get_running_loop().time
        if await _answers(within_s=gone_s):
            answered_s = now_s()
        elif now_s() - answered_s >= gone_s:
            raise RayGone(
                f"Ray's head (the GCS at {address}) did not answer for {gone_s:g} s; "
                "restart the cluster, or see logs/gcs_server.err in Ray's session folder"
            )


async def _answers(*, within_s: float) -> bool:
    """Asks the GCS for the nodes, in a thread that may hang with it."""
    if not await asyncio.to_thread(head_listens):
        return False
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bool] = loop.create_future()

    def answered() -> None:
        if not answer.done():
            answer.set_result(True)

    def ask() -> None:
        try:
            ray.nodes()
        except Exception:  # noqa: BLE001 (whatever Ray raises, the GCS has not answered)
            return
        loop.call_soon_threadsafe(answered)

    threading.Thread(target=ask, daemon=True, name="ask the GCS").start()
    done, _ = await asyncio.wait([answer], timeout=within_s)
    return bool(done)
