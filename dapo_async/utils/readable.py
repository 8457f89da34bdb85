"""Waits for a file descriptor, whatever its number: `select` refuses those above 1023."""

from __future__ import annotations

import select


def is_readable(descriptor: int, wait_s: float) -> bool:
    """Whether a read returns at once, data or the end, after a wait of `wait_s` at most."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, 1000 * wait_s)))
