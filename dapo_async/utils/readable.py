"""Waits for a file descriptor, whatever its number: `select` refuses those above 1023."""

from __future__ import annotations

import select


def is_readable(descriptor: int, wait_s: float) -> bool:
    """Whether a read returns at once, data or the end, after a wait of `wait_s` at most."""
    return _is_ready(descriptor, select.POLLIN, wait_s)


def is_writable(descriptor: int, wait_s: float) -> bool:
    """Whether a write of some bytes returns at once, after a wait of `wait_s` at most."""
    return _is_ready(descriptor, select.POLLOUT, wait_s)


def _is_ready(descriptor: int, event: int, wait_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(max(0.0, 1000 * wait_s)))
