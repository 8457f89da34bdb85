"""What the replay actor knows of each rollout worker, beside its groups.

- `balance`: response tokens that its processes have brought, less those that they got
- `num_lost`: its processes that are gone; calls of an older process change nothing
- `suspended`: workers that are admitted nothing
- the calls that were made: a worker repeats a call whose answer was lost with a replay actor, and
  a call that was made before must not be made again

Each change is a note in the journal. Pure bookkeeping.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

KEPT_CALLS = 64  # of one worker; it has far fewer in flight
Note = Callable[..., None]


class WorkerBook:
    """`note(kind, **fields)` writes a change to the journal."""

    def __init__(self, note: Note) -> None:
        self.num_lost: Counter[str] = Counter()
        self.balance: Counter[str] = Counter()
        self.suspended: set[str] = set()
        # By worker: the numbers of its newest calls.
        self._calls: defaultdict[str, set[int]] = defaultdict(set)
        self._note = note

    def is_lost(self, worker: str, start: int) -> bool:
        """Whether the worker's process that was started after `start` others is gone."""
        return start < self.num_lost[worker]

    def lose(self, worker: str, start: int) -> None:
        self._apply("lost", w=worker, start=start)

    def suspend(self, worker: str, on: bool) -> None:
        self._apply("suspend", w=worker, on=on)

    def was_made(self, worker: str, number: int) -> bool:
        """Whether the call with this number was made before. -1: a call without a number."""
        return number in self._calls[worker]

    def call(self, worker: str, number: int, *, tokens: int) -> None:
        """Books a call, and the response tokens that came with it.

        Numbers of later processes of a worker must be higher.
        """
        if number >= 0 or tokens:
            self._apply("call", w=worker, n=number, b=tokens)

    def add_tokens(self, worker: str, tokens: int) -> None:
        if tokens:
            self._apply("tokens", w=worker, b=tokens)

    def _apply(self, kind: str, **fields: Any) -> None:
        self.repeat(kind, fields)
        self._note(kind, **fields)

    def repeat(self, kind: str, fields: Mapping[str, Any]) -> None:
        """A change as a note has it."""
        worker = fields["w"]
        match kind:
            case "lost":
                self.num_lost[worker] = fields["start"] + 1
            case "suspend":
                (self.suspended.add if fields["on"] else self.suspended.discard)(worker)
            case "call":
                self.balance[worker] += fields["b"]
                self._keep_call(worker, fields["n"])
            case "tokens":
                self.balance[worker] += fields["b"]

    def _keep_call(self, worker: str, number: int) -> None:
        calls = self._calls[worker]
        if number >= 0:
            calls.add(number)
        while len(calls) > KEPT_CALLS:
            calls.remove(min(calls))

    def image(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "num_lost": dict(self.num_lost),
            "balance": dict(self.balance),
            "suspended": sorted(self.suspended),
            "calls": {worker: sorted(calls) for worker, calls in self._calls.items()},
        }

    def load(self, image: Mapping[str, Any]) -> None:
        self.num_lost, self.balance = Counter(image["num_lost"]), Counter(image["balance"])
        self.suspended = set(image["suspended"])
        for worker, calls in image["calls"].items():
            self._calls[worker] = set(calls)
