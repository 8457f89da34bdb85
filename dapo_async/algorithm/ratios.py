"""Importance ratios from logprobs, per token or per sequence: what the loss, its corrections and its diagnostics share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # log-ratios are clamped to ± this before exp, as verl does: one absurd token must not make the loss infinite


def bounded(log_ratio: Tensor) -> Tensor:
    """Clamped to ±20; the gradient beyond is 0, and nan stays nan, so that a broken logprob is noticed."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Which sequence each packed token belongs to. A sequence lies whole within one call, in any order."""

    index: Tensor  # [T] in 0 … S − 1
    num_live: Tensor  # [S] unmasked tokens of each, at least 1 to divide by

    @classmethod
    def of(cls, sequence_ids: Tensor, *, live: Tensor) -> Sequences:
        """`sequence_ids` [T]: any integers, in any order; `live` [T] bool: the unmasked tokens."""
        names, index = torch.unique(sequence_ids, return_inverse=True)
        num_live = torch.zeros(len(names), dtype=torch.int64, device=index.device).index_add(
            0, index, live.long()
        )
        return cls(index, num_live.clamp(min=1))

    def sum(self, values: Tensor) -> Tensor:
        """Each token gets the sum of its sequence [T]; masked tokens are expected to hold 0."""
        return values.new_zeros(self.num_live.shape).index_add(0, self.index, values)[self.index]

    def mean(self, values: Tensor) -> Tensor:
        """Each token gets the mean over the unmasked tokens of its sequence [T]."""
        return self.sum(values) / self.num_live[self.index]
