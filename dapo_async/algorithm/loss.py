"""The objective: three kinds of logprobs and advantages of one packed microbatch come in, its share of the loss leaves; the learner calls it.

With u = π_θ/π_prox and the detached behaviour weight w = correction(π_prox/π_beh), per unmasked token (decoupled PPO: 2110.00641, 2505.24298):

    dapo   −w · min(u·A, clip(u, 1 − clip_low, 1 + clip_high)·A)                         2503.14476
    gspo   the same with s = exp(mean over the sequence of log u) in place of u          2507.18071; token form sg(s)·π_θ/sg(π_θ)
    cispo  −w · sg(clip(u, 1 − clip_low, 1 + clip_high)) · A · log π_θ                   2506.13585; two-sided, as verl does

summed over tokens and divided by the token count of the whole minibatch; GRPO's mean over responses is had by weights of tokens.
Dual clip: for A < 0 the loss before w is at most −dual_clip·A.
Entropy bonus: minus entropy_bonus times the mean entropy of π_θ over the same tokens, with its gradient (1602.01783).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dapo_async.algorithm.corrections import behaviour_weight
from dapo_async.algorithm.diagnostics import loss_diagnostics
from dapo_async.algorithm.objectives import OBJECTIVES, Terms
from dapo_async.algorithm.options import check_loss_options
from dapo_async.algorithm.ratios import Sequences


def policy_loss(
    current_logprobs: Tensor,
    *,
    proximal_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    objective: str = "dapo",
    dual_clip: float | None = None,
    correction: str = "truncate",
    correction_level: str | None = None,
    correction_cap: float | None = 2.0,
    correction_floor: float | None = None,
    num_tokens: float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    keep: Tensor | None = None,
    entropies: Tensor | None = None,
    entropy_bonus: float = 0.0,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar loss, to be minimised, and detached sums of what it did (named in diagnostics.py); formulas and sources: the top of this file.

    All tensors packed [T]; the gradient flows into `current_logprobs`, and with an `entropy_bonus` into `entropies`. `mask` 0: the token gives
    nothing to loss, gradient or diagnostics, even where its logprobs are nan; a mask of zeros gives a loss of 0 with a working backward (a filler
    microbatch).
    `correction` truncate | mask | none at `correction_level` token | sequence | sequence_mean (None: token, or sequence for gspo): corrections.py.
    `num_tokens`: unmasked tokens of the whole minibatch over all ranks; None: those of this call. Tokens that a correction or `keep` [T] bool
    (second_moment_mask) drops stay in the denominator. `sequence_ids` [T]: any integers; sequence forms need it, and each sequence whole in one call.
    `token_weights` [T] multiply each token's loss and entropy (`sequence_mean_weights`). Raises ValueError on options or shapes that do not fit.
    """
    level = check_loss_options(
        objective,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        correction=correction,
        correction_level=correction_level,
        correction_cap=correction_cap,
        correction_floor=correction_floor,
        entropy_bonus=entropy_bonus,
    )
    per_token = {
        "proximal_logprobs": proximal_logprobs,
        "behaviour_logprobs": behaviour_logprobs,
        "advantages": advantages,
    }
    _check_shapes(
        current_logprobs,
        **per_token,
        mask=mask,
        sequence_ids=sequence_ids,
        keep=keep,
        entropies=entropies,
        token_weights=token_weights,
    )
    live = mask.bool()
    kept = live if keep is None else keep.bool()  # masked tokens already have A = 0
    current, proximal, behaviour, advantage = _fill(
        current_logprobs, *per_token.values(), live=live
    )
    uses_sequences = OBJECTIVES[objective].of_sequences or (
        correction != "none" and level != "token"
    )
    sequences = (
        _sequences(sequence_ids, live=live, objective=objective, level=level)
        if uses_sequences
        else None
    )
    drift, mismatch = current - proximal, proximal - behaviour
    corrected = behaviour_weight(
        mismatch,
        correction=correction,
        level=level,
        cap=correction_cap,
        floor=correction_floor,
        sequences=sequences,
    )
    terms = Terms(
        current,
        drift,
        advantage,
        sequences,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    gain = OBJECTIVES[objective].surrogate(terms)
    share = (
        torch.ones_like(current.detach())
        if token_weights is None
        else _fill(current, token_weights, live=live)[1]
    )
    token_loss = -(corrected.weight * kept * share) * gain.value
    diagnostics = loss_diagnostics(
        token_loss,
        drift=drift,
        mismatch=mismatch,
        corrected=corrected,
        correction=correction,
        clips=gain.clips,
        live=live,
        kept=kept,
    )
    return (
        token_loss.sum() - _bonus(entropies, entropy_bonus, share=share, live=live)
    ) / _denominator(num_tokens, live=live), diagnostics


def sequence_mean_weights(
    mask: Tensor, *, sequence_ids: Tensor, num_tokens: float, num_sequences: float
) -> Tensor:
    """GRPO's mean as weights of tokens: with them the mean over tokens is the mean over responses of each response's mean over its own tokens.

    w_t = (num_tokens / num_sequences) / |o_i|, so that (1 / num_tokens) Σ w_t l_t = (1 / num_sequences) Σ_i (1 / |o_i|) Σ_{t in i} l_t
    (2402.03300, where every group has G responses). `mask`, `sequence_ids` [T]: every sequence whole; |o_i| its unmasked tokens. The counts are those
    of the whole minibatch over all ranks: unmasked tokens, and sequences that have one (law 4). Masked tokens get 0.
    """
    live = mask.bool()
    _, places = torch.unique(sequence_ids, return_inverse=True)
    lengths = torch.zeros(len(mask), device=mask.device).index_add_(0, places, live.float())
    return torch.where(
        live, num_tokens / max(num_sequences, 1.0) / lengths[places].clamp(min=1.0), 0.0
    )


def _bonus(
    entropies: Tensor | None, entropy_bonus: float, *, share: Tensor, live: Tensor
) -> Tensor | float:
    if not entropy_bonus:
        return 0.0
    if entropies is None:
        raise ValueError(
            "entropy_bonus needs entropies; give the entropy of pi_theta at every token, [T]"
        )
    return entropy_bonus * (share * _fill(entropies, live=live)[0]).sum()


def _fill(current: Tensor, *fixed: Tensor, live: Tensor) -> tuple[Tensor, ...]:
    """All in one precision and 0 where masked, so that garbage there meets no arithmetic; only the first keeps its gradient."""
    dtype = torch.promote_types(
        current.dtype, torch.float32
    )  # bfloat16 would round the ratios away
    return tuple(
        values.to(dtype).masked_fill(~live, 0.0)
        for values in (current, *(values.detach() for values in fixed))
    )


def _sequences(
    sequence_ids: Tensor | None, *, live: Tensor, objective: str, level: str
) -> Sequences:
    if sequence_ids is None:
        raise ValueError(
            f"objective {objective} with correction_level {level} needs sequence_ids; give the sequence of every token, [T]"
        )
    return Sequences.of(sequence_ids, live=live)


def _denominator(num_tokens: float | Tensor | None, *, live: Tensor) -> Tensor | float:
    """At least 1: a minibatch without a single token has loss 0, not nan."""
    if num_tokens is None:
        return live.sum().clamp(min=1)
    if isinstance(num_tokens, Tensor):
        return num_tokens.clamp(min=1)
    if not num_tokens >= 0:
        raise ValueError(
            f"num_tokens ({num_tokens}) must not be negative; give the unmasked tokens of the minibatch over all ranks"
        )
    return max(num_tokens, 1)


def _check_shapes(current: Tensor, **others: Tensor | None) -> None:
    for name, values in others.items():
        if values is not None and (values.ndim != 1 or values.shape != current.shape):
            raise ValueError(
                f"{name} {tuple(values.shape)} must have the shape [T] of current_logprobs {tuple(current.shape)}; pack one entry per token"
            )
