"""Actors without processes, behind the real handles."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any


def fake_actor(**methods: Callable[..., Awaitable[Any]]) -> SimpleNamespace:
    """Stands in for Ray's handle of an actor: `actor.method.remote(…)` calls the function given."""
    return SimpleNamespace(
        **{name: SimpleNamespace(remote=method) for name, method in methods.items()}
    )
