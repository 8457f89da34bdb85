"""Tells the errors by which a device or the host reports that memory is short."""

from __future__ import annotations

import torch

MESSAGES = ("can't allocate memory", "not enough memory")  # of torch's allocator on the CPU


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in MESSAGES)
