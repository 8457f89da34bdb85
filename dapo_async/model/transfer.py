"""Copies from the host to a device that nothing waits for.

A copy from pageable memory makes the host wait until the device has done all its work before. From
pinned memory the copy takes its place among that work, and the host goes on. The learner's batching
and the attention call it. It has not run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` of the host on `device`; on a CPU the same tensor."""
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
