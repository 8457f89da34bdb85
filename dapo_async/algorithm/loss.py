"""The policy loss of one packed microbatch, from three kinds of logprobs and the advantages.

With u = π_θ/π_prox and the detached behaviour weight w = correction(π_prox/π_beh), per unmasked
token (decoupled PPO: 2110.00641, 2505.24298):

    dapo   −w · min(u·A, clip(u, 1 − clip_low, 1 + clip_high)·A)
           2503.14476
    gspo   the same with s = exp(mean over the sequence of log u) in place of u
           2507.18071; in its token form sg(s)·π_θ/sg(π_θ)
    cispo  −w · sg(clip(u, 1 − clip_low, 1 + clip_high)) · A · log π_θ
           2506.13585; clipped on both sides, as in verl

The loss is the sum over tokens divided by the token count of the whole minibatch. GRPO's mean over
responses is the same sum with weights of tokens.

Dual clip: for A < 0 the loss before w is at most −dual_clip·A.
Entropy bonus: minus entropy_bonus times the mean entropy of π_θ over the same tokens, with its
gradient (1602.01783).
KL term: plus kl_coef times the mean over the same tokens of an estimate of KL(π_θ ‖ π_ref), with
its gradient (GRPO, 2402.03300, equation 3). Tokens that a correction or `keep` drops have both
terms.

The learner calls `microbatch_loss` with options that it has checked once. `policy_loss` is the
public form with plain arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dapo_async.algorithm.corrections import behaviour_weight, outside_sequence_band
from dapo_async.algorithm.diagnostics import loss_diagnostics
from dapo_async.algorithm.objectives import Terms
from dapo_async.algorithm.options import LossInputs, LossOptions
from dapo_async.algorithm.ratios import Sequences, kl_estimate


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
    sequence_band: tuple[float | None, float | None] | None = None,
    num_tokens: float | Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_ids: int | None = None,
    keep: Tensor | None = None,
    entropies: Tensor | None = None,
    entropy_bonus: float = 0.0,
    reference_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    token_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`microbatch_loss` with plain arguments; `LossInputs` and `LossOptions` explain each of them.

    Raises ValueError on options or shapes that do not fit.
    """
    options = LossOptions(
        objective=objective,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        correction=correction,
        correction_level=correction_level,
        correction_cap=correction_cap,
        correction_floor=correction_floor,
        sequence_band=sequence_band,
        entropy_bonus=entropy_bonus,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    inputs = LossInputs(
        current_logprobs=current_logprobs,
        proximal_logprobs=proximal_logprobs,
        behaviour_logprobs=behaviour_logprobs,
        advantages=advantages,
        mask=mask,
        sequence_ids=sequence_ids,
        num_ids=num_ids,
        keep=keep,
        entropies=entropies,
        reference_logprobs=reference_logprobs,
        token_weights=token_weights,
    )
    return microbatch_loss(inputs, options, num_tokens=num_tokens)


def microbatch_loss(
    inputs: LossInputs, options: LossOptions, *, num_tokens: float | Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar loss, to be minimised, and detached sums that describe it (diagnostics.py).

    `num_tokens` is the number of unmasked tokens of the whole minibatch over all ranks; None: of
    this microbatch. Tokens that a correction or `keep` drops stay in the denominator. A mask of
    zeros gives a loss of 0 with a working backward pass (a filler microbatch). Raises ValueError if
    the options need an input that is None, or if `num_tokens` is negative.
    """
    live = inputs.mask.bool()
    kept = live if inputs.keep is None else inputs.keep.bool()  # masked tokens already have A = 0
    current, proximal, behaviour, advantage = _fill(
        inputs.current_logprobs,
        inputs.proximal_logprobs,
        inputs.behaviour_logprobs,
        inputs.advantages,
        live=live,
    )
    sequences = _sequences(inputs, options, live=live) if options.needs_sequences else None
    drift, mismatch = current - proximal, proximal - behaviour
    rejected = torch.zeros_like(live)
    if options.sequence_band is not None:
        assert sequences is not None, "needs_sequences counts the sequence band"
        rejected = outside_sequence_band(mismatch, sequences, options.sequence_band)
    corrected = behaviour_weight(
        mismatch,
        correction=options.correction,
        level=options.level,
        cap=options.correction_cap,
        floor=options.correction_floor,
        sequences=sequences,
    )
    terms = Terms(
        current,
        drift,
        advantage,
        sequences,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        dual_clip=options.dual_clip,
    )
    gain = options.rules.surrogate(terms)
    share = torch.ones_like(current.detach())
    if inputs.token_weights is not None:
        share = _fill(current, inputs.token_weights, live=live)[1]
    token_loss = -(corrected.weight * kept * ~rejected * share) * gain.value
    diagnostics = loss_diagnostics(
        token_loss,
        drift=drift,
        mismatch=mismatch,
        corrected=corrected,
        correction=options.correction,
        clips=gain.clips,
        live=live,
        kept=kept,
        rejected=rejected,
    )
    total = token_loss.sum() - _bonus(
        inputs.entropies, options.entropy_bonus, share=share, live=live
    )
    if options.kl_coef:
        estimate = _reference_kl(current, inputs.reference_logprobs, options, live=live)
        diagnostics["reference_kl_sum"] = estimate.detach().sum()
        total = total + options.kl_coef * (share * estimate).sum()
    return total / _denominator(num_tokens, live=live), diagnostics


def sequence_mean_weights(
    mask: Tensor,
    *,
    sequence_ids: Tensor,
    num_tokens: float,
    num_sequences: float,
    num_ids: int | None = None,
) -> Tensor:
    """Weights of tokens that turn the mean over tokens into GRPO's mean over responses.

    w_t = (num_tokens / num_sequences) / |o_i|, so that
    (1 / num_tokens) Σ w_t l_t = (1 / num_sequences) Σ_i (1 / |o_i|) Σ_{t in i} l_t
    (2402.03300, where every group has G responses).

    `mask`, `sequence_ids` [T] hold whole sequences; |o_i| counts unmasked tokens. The counts are
    those of the whole minibatch over all ranks: unmasked tokens, and sequences that have one
    (token-mean exactness). Masked tokens get 0. `num_ids`: as in `LossInputs`.
    """
    live = mask.bool()
    sequences = Sequences.of(sequence_ids, live=live, num_ids=num_ids)
    weights = num_tokens / max(num_sequences, 1.0) / sequences.num_live[sequences.index].float()
    return torch.where(live, weights, 0.0)


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


def _reference_kl(
    current: Tensor, reference: Tensor | None, options: LossOptions, *, live: Tensor
) -> Tensor:
    """The KL estimate of each token [T], with gradient; 0 where masked."""
    if reference is None:
        raise ValueError(
            "kl_coef needs reference_logprobs; give the logprob of every token under the reference "
            "policy, [T]"
        )
    return kl_estimate(options.kl_estimator, current - _fill(current, reference, live=live)[1])


def _fill(current: Tensor, *fixed: Tensor, live: Tensor) -> tuple[Tensor, ...]:
    """All tensors in one precision, and 0 where masked. Only the first keeps its gradient."""
    # At least float32: bfloat16 would round the ratios away.
    dtype = torch.promote_types(current.dtype, torch.float32)
    detached = (values.detach() for values in fixed)
    return tuple(values.to(dtype).masked_fill(~live, 0.0) for values in (current, *detached))


def _sequences(inputs: LossInputs, options: LossOptions, *, live: Tensor) -> Sequences:
    if inputs.sequence_ids is None:
        raise ValueError(
            f"objective {options.objective} with correction_level {options.level} and "
            f"sequence_band {options.sequence_band} needs sequence_ids; give the sequence of every "
            "token, [T]"
        )
    return Sequences.of(inputs.sequence_ids, live=live, num_ids=inputs.num_ids)


def _denominator(num_tokens: float | Tensor | None, *, live: Tensor) -> Tensor | float:
    """At least 1: a minibatch without a single token has loss 0, not nan."""
    if num_tokens is None:
        return live.sum().clamp(min=1)
    if isinstance(num_tokens, Tensor):
        return num_tokens.clamp(min=1)
    if not num_tokens >= 0:
        raise ValueError(
            f"num_tokens ({num_tokens}) must not be negative; give the unmasked tokens of the "
            "minibatch over all ranks"
        )
    return max(num_tokens, 1)
