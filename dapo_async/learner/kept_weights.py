"""Copies of a rank's weights that a forward pass can use in place of the current ones.

The learner rank keeps two: the weights at the start of a step, for the proximal logprobs of later
minibatches, and those of the reference policy, for a KL term.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dapo_async.model import Decoder, reshard, shard_of


class KeptWeights:
    """A float32 copy of this rank's shards, on the device or in host memory."""

    def __init__(self, decoder: Decoder, *, device: torch.device) -> None:
        """Allocates nothing before the first `copy`."""
        self._decoder, self._device = decoder, device
        self.shards: list[Tensor] = []

    @torch.no_grad()
    def copy(self) -> None:
        """Replaces the copies by the current weights."""
        current = [shard_of(parameter) for parameter in self._decoder.parameters()]
        if not self.shards:
            self.shards = [torch.empty_like(shard, device=self._device) for shard in current]
        torch._foreach_copy_(self.shards, current)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The decoder has the kept weights meanwhile. Its weights are not gathered for a pass."""
        self._swap()
        try:
            yield
        finally:
            reshard(self._decoder)  # FSDP would use what it gathered for the pass in the next pass
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges the weights and the copies, one shard at a time."""
        assert self.shards, "`copy` comes before a use"
        for parameter, kept in zip(self._decoder.parameters(), self.shards, strict=True):
            shard = shard_of(parameter)
            current = shard.clone()
            shard.copy_(kept)
            kept.copy_(current)
