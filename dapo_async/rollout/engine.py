"""What every engine promises: a group request in, one completion per sibling out (L2). A call is per group, never per token.

Called by `rollout/worker.py` and `evaluate/`; kept by `ThreadedEngine` (torch) and by `SGLangEngine`. How new weights come to an engine is its
own affair, and that of its host in `runtime/`: the torch engine is handed tensors, SGLang's server fetches them itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from dapo_async.types import Completion

WeightUpdate = Literal["recompute", "keep_kv", "drain"]
"""What a swap does to running sequences: `recompute` their KV under the new weights, `keep_kv` of the old ones, or `drain`: finish them first."""
WEIGHT_UPDATES: tuple[str, ...] = get_args(WeightUpdate)


class Aborted(Exception):
    """Raised by `generate` of a group that was taken off the engine before its end."""


class EngineFault(RuntimeError):
    """An engine that cannot be used as it is: its server is gone, silent or wrong. A group that raises it may be generated elsewhere.

    `partial_completions` per sibling: what was told of it before, whole or with the reason ABORT; None: nothing. Empty: nothing of any.
    """

    def __init__(
        self, message: str, partial_completions: tuple[Completion | None, ...] = ()
    ) -> None:
        super().__init__(message)
        self.partial_completions = partial_completions


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a group are drawn.

    Behaviour logprobs are log-softmax(logits / temperature) over the full vocabulary, whatever `top_p` and `top_k` leave out. Temperature 0
    is greedy; its logprobs are those at temperature 1. Greedy and truncated sampling are for evaluation only (law 3).
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
                f"temperature ({self.temperature}) must be finite and not negative; 1.0 samples from the model, 0 is greedy"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p ({self.top_p}) must lie in (0, 1]; 1.0 turns it off")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k ({self.top_k}) must be at least 1; null turns it off")


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """One prompt to be answered `num_siblings` times."""

    group_id: int  # names the group and keys its noise
    prompt_ids: NDArray[np.int32]  # [P]
    num_siblings: int
    sampling: SamplingParams
    partial_completions: tuple[
        Completion | None, ...
    ] = ()  # see Admission: where a response is to be gone on with


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What a weight swap did; the two probes let the publisher tell the new weights from the old (law 5)."""

    version: int
    probe_before: NDArray[
        np.float32
    ]  # [len(probe) - 1] logprobs of the probe prompt under the weights just before the swap
    probe_after: NDArray[np.float32]  # the same just after
    pause_s: float  # how long no slot decoded: probes, copy and recomputation
    recomputed_tokens: int  # KV entries computed again under the new weights


@dataclass(frozen=True, slots=True)
class SlotUse:
    """Law 6 in slot-seconds since the engine started: `occupied + no_credit + tail + sync = slots × elapsed_s`."""

    slots: int
    elapsed_s: float
    occupied: float
    no_credit: float  # idle while an admission was being waited for, beside occupied slots or not
    tail: float  # idle with nothing asked for: the last siblings of the groups held here still run, or nobody asks at all
    sync: float  # all slots, while weights were swapped


class Engine(Protocol):
    """A generator of groups with live weights. All calls may overlap; each is made from an event loop."""

    @property
    def num_slots(self) -> int:
        """How many sequences decode at once."""
        ...

    @property
    def version(self) -> int:
        """Version of the weights that the next token is sampled from."""
        ...

    async def generate(self, request: GroupRequest) -> tuple[Completion, ...]:
        """One completion per sibling. Raises Aborted, ValueError for a request that can never fit, or whatever stopped the engine."""
        ...

    async def abort(self, group_ids: Iterable[int]) -> None:
        """Takes groups off the engine; their `generate` raises Aborted. Unknown ids are ignored: they may just have finished."""
        ...

    def starving(self, on: bool) -> None:
        """Tells the engine from when to when its caller waits for an admission: what is idle meanwhile is without credit, else tail (law 6)."""
        ...

    def slot_use(self) -> SlotUse: ...

    async def close(self) -> None:
        """Stops the engine; pending calls fail."""
        ...
