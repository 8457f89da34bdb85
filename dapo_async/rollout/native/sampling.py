"""Drawing tokens: counter-based noise keyed by (seed, key, sibling, token), and the inverse of the distribution function.

A token depends on its own logits and its own key alone: not on slot, neighbours or the order of refills (law 7).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK_TOKENS = 64
# 52 bits and not 53: u · total then rounds to less than total, so that every search ends on a token.
_UNIFORM_BITS = 52
_LARGEST_UNIFORM = 1.0 - 2.0**-_UNIFORM_BITS


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def keyed_uniforms(seed: int, *, key: int, siblings: range, num_tokens: int) -> NDArray[np.float64]:
    """Uniforms in [0, 1) with 52 bits, `[len(siblings), num_tokens]`: row i, column t belong to (seed, key, siblings[i], t).

    h ← mix(h + golden · (x + 1)) for x = seed, key, sibling, token in turn, modulo 2⁶⁴, with the finaliser of SplitMix64 (Steele et al. 2014).
    """
    words = np.zeros(1, np.uint64)
    for scalar in (seed, key):
        words = _mix(words + np.uint64(_GOLDEN * (scalar + 1) & _WORD))
    words = _mix(
        words
        + np.arange(siblings.start + 1, siblings.stop + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    )
    words = _mix(
        words[:, None] + np.arange(1, num_tokens + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    )
    return (words >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float64) * 2.0**-_UNIFORM_BITS


def draw_tokens(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse of the distribution function: the first token whose cumulated probability exceeds u · total; `[N, V], [N] → [N]`.

    In two levels, first among blocks of tokens, then within one: cumulating all in float64 takes 10 to 80 times as long. A token of probability
    zero is never drawn: the sum does not grow there. Rows that are not finite give an arbitrary token.
    """
    excess = -probabilities.shape[-1] % _BLOCK_TOKENS
    padded = pad(probabilities, (0, excess)) if excess else probabilities
    blocks = padded.view(len(padded), -1, _BLOCK_TOKENS)
    masses = blocks.sum(-1)
    ends = masses.cumsum(-1, dtype=torch.float64)
    block, target = _invert(ends, uniforms[:, None])
    into = (target - ends.gather(-1, block)) / masses.gather(
        -1, block
    ) + 1.0  # how far into its block the target lies, in [0, 1)
    # Rounding may leave the interval; the largest uniform makes sure again that the search ends on a token.
    chosen = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK_TOKENS)).squeeze(1)
    within, _ = _invert(chosen.cumsum(-1, dtype=torch.float64), into.clamp_(0.0, _LARGEST_UNIFORM))
    return (block * _BLOCK_TOKENS + within).squeeze(-1).clamp_(max=probabilities.shape[-1] - 1)


def _invert(ends: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose `ends [N, M]` exceeds the target u · total, and the target; `[N, 1]` both."""
    target = uniforms * ends[:, -1:]
    return torch.searchsorted(ends, target, right=True).clamp_(
        max=ends.shape[-1] - 1
    ), target  # NaN leads past the end


def truncate(probabilities: Tensor, *, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Keeps the `top_k [N]` likeliest tokens, of these the fewest that hold `top_p [N]` of their mass; the rest becomes 0. `[N, V] → [N, V]`.

    The result is not normalised again. For evaluation only.
    """
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    ranked = ranked.masked_fill(
        torch.arange(ranked.shape[-1], device=ranked.device) >= top_k[:, None], 0.0
    )
    before = ranked.cumsum(-1) - ranked
    ranked = ranked.masked_fill(before >= top_p[:, None] * ranked.sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, ranked)
