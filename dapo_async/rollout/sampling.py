"""Drawing tokens: counter-based noise keyed by (seed, key, sibling, token), and the inverse of the distribution function.

A token depends on its own logits and its own key alone: not on slot, neighbours or the order of refills (law 7).
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(word: int) -> int:
    """The int64 with the same 64 bits: torch has no unsigned arithmetic, but its multiplication wraps alike."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mix(words: Tensor) -> Tensor:
    words = (words ^ _shifted(words, 30)) * _signed(_MULTIPLIERS[0])
    words = (words ^ _shifted(words, 27)) * _signed(_MULTIPLIERS[1])
    return words ^ _shifted(words, 31)


def keyed_uniforms(seed: int, *, key: int, siblings: Tensor, num_tokens: int) -> Tensor:
    """Uniforms in [0, 1) with 52 bits, float64 `[len(siblings), num_tokens]`: row i, column t belong to (seed, key, siblings[i], t).

    h ← mix(h + golden · (x + 1)) for x = seed, key, sibling, token in turn, with the finaliser of SplitMix64 (Steele et al. 2014).
    """
    golden = _signed(_GOLDEN)
    words = torch.zeros((), dtype=torch.int64, device=siblings.device)
    for scalar in (seed, key):
        words = _mix(words + _signed(_GOLDEN * (scalar + 1)))
    words = _mix(words + (siblings.to(torch.int64) + 1) * golden)
    tokens = torch.arange(1, num_tokens + 1, device=siblings.device)
    words = _mix(words[:, None] + tokens * golden)
    # 52 and not 53 bits: u · total then rounds to less than total, so that the search below always ends on a token.
    return _shifted(words, 12).to(torch.float64) * 2.0**-52


def draw_tokens(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse of the distribution function: the first token whose cumulated probability exceeds u · total; `[N, V], [N] → [N]`.

    Cumulated in float64. A token of probability zero is never drawn: the sum does not grow there.
    """
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True).squeeze(-1)


def truncate(probabilities: Tensor, *, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Keeps the `top_k [N]` likeliest tokens, of these the fewest that hold `top_p [N]` of their mass; the rest becomes 0. `[N, V] → [N, V]`.

    The result is not normalised again. For evaluation only.
    """
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    ranked = ranked.masked_fill(torch.arange(ranked.shape[-1], device=ranked.device) >= top_k[:, None], 0.0)
    before = ranked.cumsum(-1) - ranked
    ranked = ranked.masked_fill(before >= top_p[:, None] * ranked.sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, ranked)
