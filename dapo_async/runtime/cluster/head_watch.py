"""Notices that Ray's head (its GCS process) or the driver's own raylet is gone.

It does so while the driver can still end in order.

Ray itself ends the driver 60 seconds after the GCS, without a checkpoint or a summary. Calls to
actors go on without the GCS. Calls that need it, such as killing an actor, would wait for it.
Without the raylet of its node the driver goes on, but the actors there are gone, and nothing can
start on that node any more. Ray says so after half a minute, the raylet's port at once.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray._private import worker

from dapo_async.utils.network import split

CHECK_S = 2.0
CHECKS = 2  # in a row at which nobody listens: the raylet, or the GCS of an own Ray, is gone
GONE_S = 20.0  # a GCS that is restarted by its cluster comes back within this time
NODE_GONE = (
    "Ray's raylet on the driver's machine is dead, and so are the actors of that machine; start "
    "Ray there again and resume the run, or see logs/raylet.err in Ray's session folder"
)

HEAD_LOG = "see logs/gcs_server.err in Ray's session folder"


class RayGone(RuntimeError):
    """Ray does not work for this driver any more; the message says why, and what to do."""


class NodeGone(RayGone):
    """The driver's node has no raylet, and no actors any more."""


def head_address() -> str:
    """HOST:PORT of the GCS."""
    return str(ray.get_runtime_context().gcs_address)


def head_listens(*, timeout_s: float = 1.0) -> bool:
    """Whether a process listens at the GCS's address; it may be stopped."""
    return _listens(split(head_address()), timeout_s)


def raylet_listens(*, timeout_s: float = 1.0) -> bool:
    """The same of the raylet of the driver's node."""
    node = worker._global_node  # Ray has a public name for it only in the GCS, which may be stopped
    assert node is not None, "ray.init was not called"
    return _listens((str(node.node_ip_address), int(node.node_manager_port)), timeout_s)


def ray_listens() -> bool:
    """Whether Ray can still end actors and be shut down in order."""
    return head_listens() and raylet_listens()


def _listens(address: tuple[str, int], timeout_s: float) -> bool:
    try:
        socket.create_connection(address, timeout=timeout_s).close()
    except OSError:
        return False
    return True


async def watch_head(*, own_ray: bool) -> None:
    """Raises NodeGone when the raylet of the driver's node does not listen, or the GCS says that
    the node is dead. Raises RayGone when the GCS has not answered for `GONE_S` seconds; in an own
    Ray, whose GCS nobody restarts, as soon as it does not listen. Never returns."""
    gone_s = GONE_S
    own_node = ray.get_runtime_context().get_node_id()
    address, answered_s = head_address(), asyncio.get_running_loop().time()
    unanswered = {"raylet": 0, "head": 0}
    while True:
        await asyncio.sleep(CHECK_S)
        for name, listens in (("raylet", raylet_listens), ("head", head_listens)):
            unanswered[name] = 0 if await asyncio.to_thread(listens) else unanswered[name] + 1
        if unanswered["raylet"] == CHECKS:
            raise NodeGone(NODE_GONE)
        if own_ray and unanswered["head"] == CHECKS:
            raise RayGone(f"Ray's head (the GCS at {address}) is dead; {HEAD_LOG}")
        if unanswered["raylet"]:
            continue  # a question to the GCS may wait for the raylet, too
        nodes = None if unanswered["head"] else await _nodes(within_s=gone_s)
        now_s = asyncio.get_running_loop().time()
        if nodes is not None:
            answered_s = now_s
            if not any(node["NodeID"] == own_node and node["Alive"] for node in nodes):
                raise NodeGone(NODE_GONE)
        elif now_s - answered_s >= gone_s:
            raise RayGone(
                f"Ray's head (the GCS at {address}) did not answer for {gone_s:g} s; "
                f"restart the cluster, or {HEAD_LOG}"
            )


async def _nodes(*, within_s: float) -> Sequence[dict[str, Any]] | None:
    """Asks the GCS for the nodes, in a thread that may hang with it; None: no answer."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Sequence[dict[str, Any]] | None] = loop.create_future()

    def answered(nodes: Sequence[dict[str, Any]] | None) -> None:
        if not answer.done():
            answer.set_result(nodes)

    def ask() -> None:
        nodes = None
        with suppress(Exception):  # whatever Ray raises, the GCS has not answered
            nodes = ray.nodes()
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(answered, nodes)

    threading.Thread(target=ask, daemon=True, name="ask the GCS").start()
    done, _ = await asyncio.wait([answer], timeout=within_s)
    return answer.result() if done else None
