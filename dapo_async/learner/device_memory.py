"""Tells the errors by which a device or the host reports that memory is short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MESSAGES = ("can't allocate memory", "not enough memory")  # of torch's allocator on the CPU


class WeightsBroken(RuntimeError):
    """An error has left weights that belong to no version; smaller passes do not mend that."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed, and nothing else is wrong."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, WeightsBroken):
        return False
    return isinstance(error, RuntimeError) and any(each in str(error) for each in MESSAGES)


@contextmanager
def whole_or_broken(state: str) -> Iterator[None]:
    """Work that must be done whole. Raises WeightsBroken, with the `state` that is left, for any
    error in it."""
    try:
        yield
    except Exception as error:
        raise WeightsBroken(
            f"{state}, because of {type(error).__name__}: {str(error)[:200]}; resume from the "
            "newest checkpoint, and lower learner.microbatch_tokens if memory was short"
        ) from error
