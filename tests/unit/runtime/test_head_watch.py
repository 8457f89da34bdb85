"""The watch over Ray's head and the driver's own raylet. A stand-in takes the place of Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_async.runtime.cluster import head_watch
from dapo_async.runtime.cluster.head_watch import NodeGone, RayGone, watch_head

OWN, OTHER = "node-of-the-driver", "another-node"


def nodes(**alive: bool) -> list[dict[str, Any]]:
    names = {"own": OWN, "other": OTHER}
    return [{"NodeID": names[name], "Alive": is_alive} for name, is_alive in alive.items()]


@pytest.fixture
def ray_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Takes what stands in for `ray.nodes`."""

    def use(ask: Callable[[], Any]) -> None:
        context = SimpleNamespace(gcs_address="127.0.0.1:6379", get_node_id=lambda: OWN)
        ray = SimpleNamespace(nodes=ask, get_runtime_context=lambda: context)
        monkeypatch.setattr(head_watch, "ray", ray)
        monkeypatch.setattr(head_watch, "head_listens", lambda: True)
        monkeypatch.setattr(head_watch, "raylet_listens", lambda: True)
        monkeypatch.setattr(head_watch, "CHECK_S", 0.01)
        monkeypatch.setattr(head_watch, "GONE_S", 0.2)

    return use


def watched(*, seconds: float, own_ray: bool = False) -> None:
    """Raises what the watch raises, TimeoutError if it raises nothing for these seconds."""
    asyncio.run(asyncio.wait_for(watch_head(own_ray=own_ray), seconds))


def test_loss_of_another_node_does_not_end_the_watch(
    ray_with: Callable[[Callable[[], Any]], None],
) -> None:
    answers = [nodes(own=True, other=True)]
    ray_with(lambda: answers.pop() if answers else nodes(own=True, other=False))
    with pytest.raises(TimeoutError):
        watched(seconds=0.5)
    assert not answers


def test_loss_of_the_drivers_own_raylet_is_named(
    ray_with: Callable[[Callable[[], Any]], None],
) -> None:
    answers = [nodes(own=True, other=True)]
    ray_with(lambda: answers.pop() if answers else nodes(own=False, other=True))
    with pytest.raises(RayGone, match="raylet on the driver's machine is dead"):
        watched(seconds=10.0)


def test_raylet_that_does_not_listen_is_gone_before_ray_says_so(
    ray_with: Callable[[Callable[[], Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_with(lambda: nodes(own=True))
    once = [False]
    monkeypatch.setattr(head_watch, "raylet_listens", lambda: once.pop() if once else True)
    with pytest.raises(TimeoutError):  # busy for a moment
        watched(seconds=0.3)
    silent = threading.Event()
    ray_with(silent.wait)  # the question to the GCS waits for the raylet, too
    monkeypatch.setattr(head_watch, "raylet_listens", lambda: False)
    monkeypatch.setattr(head_watch, "GONE_S", 60.0)
    with pytest.raises(NodeGone, match="raylet on the driver's machine is dead"):
        watched(seconds=10.0)
    silent.set()


def test_head_that_does_not_answer_is_gone_after_the_limit(
    ray_with: Callable[[Callable[[], Any]], None],
) -> None:
    silent = threading.Event()
    ray_with(silent.wait)
    with pytest.raises(RayGone, match=r"GCS at 127.0.0.1:6379\) did not answer for 0.2 s"):
        watched(seconds=10.0)
    silent.set()


def test_head_that_answers_again_in_time_is_not_gone(
    ray_with: Callable[[Callable[[], Any]], None],
) -> None:
    asked = 0

    def ask() -> list[dict[str, Any]]:
        nonlocal asked
        asked += 1
        if asked % 2:
            raise RuntimeError("the GCS is away")
        return nodes(own=True)

    ray_with(ask)
    with pytest.raises(TimeoutError):
        watched(seconds=1.0)
    assert asked > 3


def test_only_the_head_of_an_own_ray_is_gone_as_soon_as_it_does_not_listen(
    ray_with: Callable[[Callable[[], Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_with(lambda: nodes(own=True))
    monkeypatch.setattr(head_watch, "head_listens", lambda: False)
    monkeypatch.setattr(head_watch, "GONE_S", 60.0)
    with pytest.raises(RayGone, match=r"GCS at 127.0.0.1:6379\) is dead; see logs/gcs_server.err"):
        watched(seconds=10.0, own_ray=True)
    with pytest.raises(TimeoutError):
        watched(seconds=0.5)
