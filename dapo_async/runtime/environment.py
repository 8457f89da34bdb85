"""What Ray reads from the environment when it is imported, so it is set before: the one module of this room that may not import Ray."""

from __future__ import annotations

import os
import secrets

LOCAL = "local"  # ray.address of an own Ray


def prepare(address: str) -> None:
    """Sets the environment of this process, which every process of an own Ray inherits. Call it before anything imports Ray."""
    # Nothing is reported to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray gives its workers niceness 15: any other busy process would starve them. The actors are the work here, not the background.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if address == LOCAL:
        # Ray listens on every interface, whatever address it is given: only who has this token, made for this run alone, gets in.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
