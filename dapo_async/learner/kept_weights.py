"""Copies of a rank's weights that a forward pass can use in place of the current ones.

The learner rank keeps two: the weights at the start of a step, for the proximal logprobs of later
minibatches, and those of the reference policy, for a KL term.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dapo_async.learner.device_memory import whole_or_broken
from dapo_async.model import Decoder, reshard, shard_of

EXCHANGED = 2**24  # float32 numbers at a time, which need 64 MiB beside the weights
Pair = tuple[Tensor, Tensor]  # a piece of the weights, and the same piece of the copies; both [N]


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
        """The decoder has the kept weights meanwhile. Its weights are not gathered for a pass.

        An error here, or in the pass, leaves the current weights in the decoder: a pass for which
        memory is short can be made again. Raises WeightsBroken if they can't be put back.
        """
        pairs = self._pairs()
        # All that the two exchanges allocate, before the first one.
        spare = pairs[0][0].new_empty(max(len(weights) for weights, _ in pairs))
        exchange(pairs, spare)
        try:
            yield
        finally:
            with whole_or_broken("the weights of another policy are in the decoder"):
                reshard(self._decoder)  # FSDP would use what it gathered in the next pass
                exchange(pairs, spare)

    def _pairs(self) -> list[Pair]:
        """The shards and their copies in pieces."""
        assert self.shards, "`copy` comes before a use"
        current = (shard_of(parameter).view(-1) for parameter in self._decoder.parameters())
        return [
            pair
            for shard, kept in zip(current, self.shards, strict=True)
            for pair in zip(shard.split(EXCHANGED), kept.view(-1).split(EXCHANGED), strict=True)
        ]


@torch.no_grad()
def exchange(pairs: list[Pair], spare: Tensor) -> None:
    """Exchanges the two sides of all pairs, or of none if a copy fails.

    `spare` has room for the largest piece. Nothing else is allocated. Raises what the copy raised,
    or WeightsBroken if the pairs before it can't be put back.
    """
    for number, (one, other) in enumerate(pairs):
        held, done = spare[: len(one)], 0
        try:
            for target, source in ((held, one), (one, other), (other, held)):
                target.copy_(source)
                done += 1
        except Exception:
            with whole_or_broken("some of the weights are those of another policy"):
                # What failed may be half written; the other two are whole.
                if done == 2:
                    other.copy_(one)
                if done >= 1:
                    one.copy_(held)
                exchange(pairs[:number], spare)
            raise
