"""Draws tokens by inverting the distribution function, with counter-based noise.

The noise is keyed by (seed, group, sibling, token). So a token depends only on its logits and its
key, not on its slot, its neighbours or the order of refills: resumed runs can repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK_TOKENS = 64
_ONE_LEVEL_TOKENS = 1024  # up to this vocabulary one search over all tokens is faster
# 52 bits, not 53: u · total then rounds to less than total, so that every search ends on a token.
_UNIFORM_BITS = 52
_LARGEST_UNIFORM = 1.0 - 2.0**-_UNIFORM_BITS


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def keyed_uniforms(
    seed: int, *, group_id: int, siblings: Sequence[int], num_tokens: int
) -> NDArray[np.float64]:
    """Uniforms in [0, 1) with 52 bits, `[len(siblings), num_tokens]`.

    Row i, column t is keyed by (seed, group_id, siblings[i], t):
    h ← mix(h + golden · (x + 1)) modulo 2⁶⁴ for x = seed, group_id, sibling, token in turn; mix is
    the finaliser of SplitMix64 (Steele et al. 2014).
    """
    golden = np.uint64(_GOLDEN)
    words = np.zeros(1, np.uint64)
    for scalar in (seed, group_id):
        words = _mix(words + np.uint64(_GOLDEN * (scalar + 1) & _WORD))
    sibling_words = (np.asarray(siblings, dtype=np.uint64) + np.uint64(1)) * golden
    token_words = np.arange(1, num_tokens + 1, dtype=np.uint64) * golden
    words = _mix(words + sibling_words)
    words = _mix(words[:, None] + token_words)
    return (words >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float64) * 2.0**-_UNIFORM_BITS


def draw_tokens(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulated probability exceeds u · total; `[N, V], [N] → [N]`.

    In a large vocabulary the search has two levels, first among blocks of tokens, then within one
    block: cumulating all tokens in float64 takes 10 to 80 times as long. A token of probability
    zero is never drawn. Rows that are not finite give an arbitrary token.
    """
    if probabilities.shape[-1] <= _ONE_LEVEL_TOKENS:
        token, _ = _invert(probabilities.cumsum(-1, dtype=torch.float64), uniforms[:, None])
        return token.squeeze(-1)
    excess = -probabilities.shape[-1] % _BLOCK_TOKENS
    padded = pad(probabilities, (0, excess)) if excess else probabilities
    blocks = padded.view(len(padded), -1, _BLOCK_TOKENS)
    masses = blocks.sum(-1)
    ends = masses.cumsum(-1, dtype=torch.float64)
    block, target = _invert(ends, uniforms[:, None])
    # How far into its block the target lies, in [0, 1). Rounding may leave this interval; the clamp
    # makes sure that the second search ends on a token.
    into = (target - ends.gather(-1, block)) / masses.gather(-1, block) + 1.0
    into.clamp_(0.0, _LARGEST_UNIFORM)
    chosen = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK_TOKENS)).squeeze(1)
    within, _ = _invert(chosen.cumsum(-1, dtype=torch.float64), into)
    return (block * _BLOCK_TOKENS + within).squeeze(-1).clamp_(max=probabilities.shape[-1] - 1)


def _invert(ends: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose `ends [N, M]` exceeds the target u · total, and the target, `[N, 1]`."""
    target = uniforms * ends[:, -1:]
    index = torch.searchsorted(ends, target, right=True)
    return index.clamp_(max=ends.shape[-1] - 1), target  # NaN leads past the end


def truncate(probabilities: Tensor, *, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Sets the probability of all tokens that may not be drawn to 0; `[N, V] → [N, V]`.

    Keeps the `top_k [N]` likeliest tokens, and of these the fewest that hold `top_p [N]` of their
    mass. The result is not normalised again. For evaluation only.
    """
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(ranked.shape[-1], device=ranked.device)
    ranked = ranked.masked_fill(ranks >= top_k[:, None], 0.0)
    before = ranked.cumsum(-1) - ranked
    ranked = ranked.masked_fill(before >= top_p[:, None] * ranked.sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, ranked)
