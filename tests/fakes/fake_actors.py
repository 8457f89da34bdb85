"""Actors without processes, behind the real handles."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any


def fake_actor(**methods: Callable[..., Awaitable[Any]]) -> SimpleNamespace:
    """Stands in for Ray's handle of an actor: `actor.method.remote(…)` calls the function given.

    It does not get the number of the call: over a fake connection nothing is sent twice.
    """
    return SimpleNamespace(**{name: fake_method(method) for name, method in methods.items()})


def fake_method(method: Callable[..., Awaitable[Any]]) -> SimpleNamespace:
    """One method of such an actor."""

    def remote(*args: Any, call_id: object = None, **kwargs: Any) -> Awaitable[Any]:
        return method(*args, **kwargs)

    return SimpleNamespace(remote=remote)
