"""Importance ratios from logprobs, per token or per sequence.

Used by the loss, its corrections and its diagnostics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # preflight checks the options of the loss without torch
    from torch import Tensor

# Log-ratios are clamped to ± this before exp, as in verl: a single token must not make the loss
# infinite.
LOG_RATIO_LIMIT = 20.0


def bounded(log_ratio: Tensor) -> Tensor:
    """Clamped to ±20. The gradient beyond is 0; nan stays nan, so that a broken logprob shows."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def kl_estimate(estimator: str, log_ratio: Tensor) -> Tensor:
    """An estimate of KL(π_θ ‖ π_ref) per token that π_θ has sampled, with gradient.

    `log_ratio` d = log π_θ − log π_ref. Source: Schulman, "Approximating KL Divergence" (2020).

        k1  d                 its gradient has the mean 0 on policy: it only adds noise to a loss
        k2  d² / 2            its gradient is that of the KL divergence on policy
        k3  e^−d − 1 + d      never negative; the form of GRPO (2402.03300, equation 4)

    d is bounded to ±20, as every log-ratio here.
    """
    gap = bounded(log_ratio)
    if estimator == "k1":
        return gap
    return gap.square() / 2 if estimator == "k2" else (-gap).exp() - 1 + gap


@dataclass(frozen=True, slots=True)
class Sequences:
    """Which sequence each packed token belongs to. Every sequence is whole, in any order."""

    index: Tensor  # [T] in 0 … S − 1
    num_live: Tensor  # [S] unmasked tokens of each sequence, at least 1

    @classmethod
    def of(cls, sequence_ids: Tensor, *, live: Tensor, num_ids: int | None = None) -> Sequences:
        """`sequence_ids` [T] in any order; `live` [T] bool: the unmasked tokens.

        The ids are int64 in 0 … num_ids − 1. None: any integers, for which the host has to wait
        until the device has counted them.
        """
        index = sequence_ids
        if num_ids is None:
            ids, index = sequence_ids.unique(return_inverse=True)
            num_ids = len(ids)
        zeros = index.new_zeros(num_ids)  # int64
        return cls(index, zeros.index_add(0, index, live.long()).clamp(min=1))

    def sum(self, values: Tensor) -> Tensor:
        """Each token gets the sum over its sequence [T]. Masked tokens must hold 0."""
        return values.new_zeros(self.num_live.shape).index_add(0, self.index, values)[self.index]

    def mean(self, values: Tensor) -> Tensor:
        """Each token gets the mean over the unmasked tokens of its sequence [T]."""
        return self.sum(values) / self.num_live[self.index]
