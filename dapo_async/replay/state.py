"""The states of an admitted group: the buffer keeps one of these per group id until the group's credit waits for weights or is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Generating:
    worker: str
    deadline: int  # version served at admission + max_staleness: the attested one can only be later, unless an engine is at fault
    goes_on: bool = False  # with what a lost engine had told of it, which the deadline counts in


@dataclass(frozen=True, slots=True)
class Buffered:
    worker: str
    deadline: int  # oldest_version + max_staleness
    oldest_version: int  # as its engine attested, per token
    num_tokens: int  # prompt and response tokens of all siblings
    payload: Any  # opaque: what the train batch refers to


@dataclass(frozen=True, slots=True)
class Taken:
    version: int  # of the learner at the take
    group: Buffered  # until the step is done: a checkpoint of a run that ends within it keeps the group
