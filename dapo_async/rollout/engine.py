"""The `Engine` protocol: a group request in, one completion per sibling out.

Called by `rollout/worker.py` and `evaluate/`; implemented by `ThreadedEngine` (native) and
`SGLangEngine`. A call handles a group, never a token. Weight updates are not part of it: the native
engine gets tensors, an SGLang server loads the weights itself (see `runtime/actors/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, get_args

import numpy as np
from numpy.typing import NDArray

from dapo_async.replay import TokenBook
from dapo_async.types import Completion

WeightUpdate = Literal["recompute", "keep_kv", "drain"]
"""What a weight update does to running sequences.

`recompute` their KV under the new weights, `keep_kv` of the old weights, or `drain`: finish first.
"""
WEIGHT_UPDATES: tuple[str, ...] = get_args(WeightUpdate)


class Aborted(Exception):
    """Raised by `generate` when its group was taken off the engine before its end.

    `num_tokens`: what the engine had generated for the group. `partial_completions`: as of
    EngineFault; another engine may continue them.
    """

    def __init__(
        self,
        message: str,
        num_tokens: int = 0,
        partial_completions: tuple[Completion | None, ...] = (),
    ) -> None:
        super().__init__(message)
        self.num_tokens, self.partial_completions = num_tokens, partial_completions


class EngineFault(RuntimeError):
    """The engine can't be used: its server is gone, silent or wrong.

    Another engine may generate the group. `partial_completions` has per sibling what was received:
    a complete one, one with finish reason ABORT, or None. Empty: nothing was received. The engine
    has booked the other tokens of the group as repeated.
    """

    def __init__(
        self, message: str, partial_completions: tuple[Completion | None, ...] = ()
    ) -> None:
        super().__init__(message)
        self.partial_completions = partial_completions


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a group are drawn.

    Behaviour logprobs are log-softmax(logits / temperature) over the full vocabulary, also where
    `top_p` or `top_k` leave tokens out. Temperature 0 is greedy; its logprobs are those at
    temperature 1. Greedy and truncated sampling are for evaluation only (on-policy identity).
    """

    max_tokens: int  # response tokens, the stop token included
    temperature: float
    stop_token_ids: tuple[int, ...]
    seed: int  # of the run: noise is keyed by (seed, group_id, sibling, token)
    top_p: float = 1.0
    top_k: int | None = None  # None: off

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be at least 1; ask for one token or more"
            )
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature ({self.temperature}) must be finite and not negative; "
                "1.0 samples from the model, 0 is greedy"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p ({self.top_p}) must lie in (0, 1]; 1.0 turns it off")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k ({self.top_k}) must be at least 1; null turns it off")


@dataclass(frozen=True, slots=True)
class SiblingTimes:
    """When each sibling of a group takes a slot, gets its first token, and ends; None: not yet.

    In seconds of `time.monotonic`. The engine writes them, in whatever thread it runs.
    """

    started: list[float | None]
    first_token: list[float | None]
    ended: list[float | None]

    @classmethod
    def of(cls, num_siblings: int) -> Self:
        return cls([None] * num_siblings, [None] * num_siblings, [None] * num_siblings)


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """One prompt to be answered `num_siblings` times."""

    group_id: int  # names the group and keys its noise; negative for a held-out prompt
    prompt_ids: NDArray[np.int32]  # [P]
    num_siblings: int
    sampling: SamplingParams
    # Per sibling what another engine returned, to be continued; see Admission. Empty: nothing.
    partial_completions: tuple[Completion | None, ...] = ()
    times: SiblingTimes | None = field(default=None, compare=False)  # None: nobody reads them


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What a weight update did; the handshake compares the two probes."""

    version: int
    # Logprobs of the probe prompt under the old and the new weights, [len(probe) - 1].
    probe_before: NDArray[np.float32]
    probe_after: NDArray[np.float32]
    pause_s: float  # how long no slot decoded: probes, copy and recomputation
    recomputed_tokens: int  # KV entries computed again under the new weights


@dataclass(frozen=True, slots=True)
class SlotUse:
    """Slot-seconds since the engine started; all states add up to slots × elapsed_s.

    See `slot_meter.py` for the states (time accounting). If the number of slots changes, the states
    add up to its integral over time.
    """

    slots: int  # now
    elapsed_s: float
    occupied: float  # its sequence ran
    queued: float  # its request waited at a server, mostly for memory for keys and values
    no_credit: float  # idle while the worker waited for an admission
    tail: float  # idle while the worker waited for none: mostly before an update with `drain`
    sync: float  # all slots, during weight updates
    evaluation: float = 0.0  # a sequence for a held-out prompt ran
    dead: float = 0.0  # all slots, while the engine can't be used
    asleep: float = 0.0  # all slots, while the learner has the device


@dataclass(frozen=True, slots=True)
class TimeUse:
    """Seconds since the engine started; all states add up to elapsed_s (time accounting).

    Unlike `SlotUse` this does not depend on the number of slots.
    """

    elapsed_s: float = 0.0
    running: float = 0.0  # a sequence of a training group ran
    evaluation: float = 0.0  # only sequences for held-out prompts ran
    queued: float = 0.0  # none ran, and requests waited at a server
    no_credit: float = 0.0  # none ran or waited, and the worker waited for an admission
    tail: float = 0.0  # the same, and it waited for none
    sync: float = 0.0  # weight updates
    dead: float = 0.0  # the engine was lost or had wrong weights
    asleep: float = 0.0  # the learner had the device


@dataclass(frozen=True, slots=True)
class EngineWork:
    """What an engine has computed since it started, for its use of FLOPs and of memory bandwidth.

    A token that attends to k tokens, itself included, makes k pairs. What is computed again counts
    nowhere.
    """

    steps: float = 0.0  # decode steps: each reads all weights once
    decoded: int = 0  # tokens of these steps
    decode_pairs: int = 0
    prefill_pairs: int = 0


@dataclass(frozen=True, slots=True)
class KVUse:
    """Memory for keys and values (KV) since the engine started.

    The mean share in use is full_s / elapsed_s. Cached prefixes that no sequence uses count as
    free.
    """

    elapsed_s: float = 0.0
    full_s: float = 0.0  # the share in use, integrated over time
    retractions: int = 0  # running sequences that lost their memory to others
    input_tokens: int = 0  # of the prompts that sequences began with
    cached_tokens: int = 0  # of them, those whose KV was there already


SiblingsEnded = Callable[[int], None]
"""Called with how many siblings of a group ended since its last call."""


def ignore_ends(count: int) -> None:
    """For callers of `Engine.generate` that wait for whole groups."""


class Engine(Protocol):
    """Generates groups with weights that change. Calls may overlap; each needs an event loop."""

    @property
    def num_slots(self) -> int:
        """How many sequences decode at once; with `rollout.num_slots=auto` it changes."""
        ...

    @property
    def version(self) -> int:
        """Version of the weights that sample the next token."""
        ...

    @property
    def tokens(self) -> TokenBook:
        """Counts the tokens of this engine.

        The engine books the end of those for held-out prompts, and its user that of all others.
        """
        ...

    async def generate(
        self, request: GroupRequest, siblings_ended: SiblingsEnded = ignore_ends
    ) -> tuple[Completion, ...]:
        """One completion per sibling.

        `siblings_ended` is called on the caller's event loop while the group runs. It may leave
        out the siblings that end last: the answer tells their end.

        Raises Aborted, ValueError for a request that can never fit, EngineFault, or the error that
        stopped the engine.
        """
        ...

    async def abort(self, group_ids: Iterable[int]) -> None:
        """Takes groups off the engine; their `generate` raises Aborted.

        Unknown ids are ignored: the group may just have finished.
        """
        ...

    def starving(self, on: bool) -> None:
        """The caller starts (on) or stops waiting for an admission.

        Slots that are idle meanwhile count as `no_credit`, other idle slots as `tail`.
        """
        ...

    def dead(self, on: bool) -> None:
        """The caller can't use the engine any more (on), or can use it again."""
        ...

    def slot_use(self) -> SlotUse:
        """How the slots were used since the engine started."""
        ...

    def time_use(self) -> TimeUse:
        """How the time was used since the engine started."""
        ...

    def work(self) -> EngineWork:
        """What the engine has computed since it started."""
        ...

    def kv_use(self) -> KVUse:
        """How its memory for keys and values was used since the engine started."""
        ...

    async def close(self) -> None:
        """Stops the engine; pending calls fail."""
        ...
