"""Copies between the host and a device, through pinned memory.

`send`: a copy from pageable memory makes the host wait until the device has done all its work
before. From pinned memory the copy takes its place among that work, and the host goes on. The
learner's batching and the attention call it.

`Fetcher`: whole weights for files. Torch rounds each pinned block up to a power of two and keeps
it, so pinned copies of all weights would need up to twice their memory, for the rest of the run. So
they pass through two small blocks into pageable memory.

None of it has run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` of the host on `device`; on a CPU the same tensor."""
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Fetcher:
    """Copies tensors of a device into host memory, through two blocks of its own.

    While the device fills one block, the host empties the other. Copies run on the current stream.
    """

    def __init__(self, device: torch.device, *, block_bytes: int = 2**26) -> None:
        """`block_bytes`: a power of two, or torch reserves more."""
        self._on_gpu = device.type == "cuda"
        self._blocks = [
            torch.empty(block_bytes, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)
        ]

    @torch.no_grad()
    def fetch(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in pageable host memory, complete on return."""
        source = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
        target = host.reshape(-1).view(torch.uint8)
        filled: tuple[Tensor, Tensor, Any] | None = None
        size = len(self._blocks[0])
        pairs = zip(source.split(size), target.split(size), strict=True)
        for number, (part, place) in enumerate(pairs):
            block = self._blocks[number % 2][: len(part)]
            block.copy_(part, non_blocking=self._on_gpu)
            done = None
            if self._on_gpu:
                done = torch.cuda.Event()
                done.record()
            if filled is not None:
                _empty(*filled)
            filled = block, place, done
        if filled is not None:
            _empty(*filled)
        return host


def _empty(block: Tensor, place: Tensor, filled: Any) -> None:
    if filled is not None:
        filled.synchronize()
    place.copy_(block)
