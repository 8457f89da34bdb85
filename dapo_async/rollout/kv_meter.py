"""Use of an engine's memory for keys and values (KV), averaged over time.

In: tokens in use and the capacity, whenever they are known. Out: sums that `runtime/throughput.py`
turns into `kv.use`. Both engines use it.
"""

from __future__ import annotations

import threading

from dapo_async.rollout.engine import KVUse
from dapo_async.utils.state_clock import StateClock


class KVMeter:
    """Integrates the share of the KV memory in use; thread-safe."""

    def __init__(self, clock: StateClock) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._start_s = self._since_s = clock.now_s()
        self._share = self._full_s = 0.0
        self._retractions = self._input_tokens = self._cached_tokens = 0

    def holds(self, used_tokens: int, *, capacity_tokens: int) -> None:
        """From now on so many tokens have keys and values."""
        with self._lock:
            self._advance()
            self._share = used_tokens / capacity_tokens if capacity_tokens > 0 else 0.0

    def retract(self, count: int) -> None:
        """`count` running sequences lost their memory."""
        with self._lock:
            self._retractions += count

    def read_prompt(self, tokens: int, *, cached: int) -> None:
        """A sequence began with a prompt, of which `cached` tokens had keys and values already."""
        with self._lock:
            self._input_tokens += tokens
            self._cached_tokens += cached

    @property
    def share(self) -> float:
        """In use now."""
        return self._share

    def use(self) -> KVUse:
        """The sums up to now."""
        with self._lock:
            self._advance()
            return KVUse(
                elapsed_s=self._since_s - self._start_s,
                full_s=self._full_s,
                retractions=self._retractions,
                input_tokens=self._input_tokens,
                cached_tokens=self._cached_tokens,
            )

    def _advance(self) -> None:
        now_s = self._clock.now_s()
        self._full_s += self._share * (now_s - self._since_s)
        self._since_s = now_s
