"""Turns a rank's share of the groups into packed microbatches.

In: the groups and the plan of the minibatch. Out: the tensors of each forward pass. In between:
advantages and training sequences. The learner rank calls these functions in the order of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.algorithm import group_advantages
from dapo_async.learner.batch_plan import GroupShare, RankShare
from dapo_async.model import ALONE, Axis, own_targets, send
from dapo_async.types import Completion, FinishReason, Group


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """One rollout with its advantage, ready to be packed."""

    sequence_id: int  # its position among all rollouts of the minibatch, over all ranks
    group: int  # siblings have the same number, and the same prompt: that of the first one
    prompt_ids: NDArray[np.int32]
    completion: Completion
    advantage: float
    temperature: float
    in_loss: bool  # False: overlong filtering masks it out of the loss

    @property
    def num_tokens(self) -> int:
        """The tokens that a pass computes: the last one of the response predicts nothing."""
        return len(self.prompt_ids) + self.num_own_tokens

    @property
    def num_own_tokens(self) -> int:
        """Those beside the prompt, which siblings in one microbatch share."""
        return len(self.completion.token_ids) - 1


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One forward and backward pass: T packed tokens that predict N response tokens.

    The prompt of siblings is packed once. The last token of a response is left out.
    """

    lengths: tuple[int, ...]  # of the sequences, each with its prompt
    shared: tuple[range, ...]  # the packed tokens of its prompt, if an earlier sequence has them
    token_ids: Tensor  # [T]
    predictors: Tensor  # [N] positions in T of the tokens that predict the response tokens
    targets: Tensor  # [N] the response tokens
    temperatures: Tensor  # [N]
    behaviour_logprobs: Tensor  # [N]
    behaviour_versions: Tensor  # [N]
    prefill_versions: Tensor  # [N] of the token's rollout
    advantages: Tensor  # [N]
    mask: Tensor  # [N] bool: the token counts in the loss
    sequence_ids: Tensor  # [N] the place of the token's sequence in `lengths`
    own: Tensor | None  # with a `cp` axis: the places in N of the tokens that this rank scores
    num_loss_tokens: int  # tokens that count in the loss
    num_sequences: int  # sequences that have one
    # [T, M, k] int16: the engine's experts of each token, −1 where it returned none; None: nowhere
    experts: Tensor | None = None


def training_sequences(
    groups: Sequence[Group],
    shares: Sequence[GroupShare],
    *,
    normalize_std: bool,
    overlong_filtering: bool,
) -> list[TrainingSequence]:
    """One sequence per rollout of `groups`, which have the rollouts that `shares` name.

    Advantages compare with the rewards of all siblings.
    """
    numbered = [(number, each) for number, share in enumerate(shares) for each in share.rewards]
    advantages = group_advantages(
        torch.tensor([reward for _, reward in numbered], dtype=torch.float64),
        torch.tensor([number for number, _ in numbered]),
        normalize_std=normalize_std,
    ).tolist()
    firsts = accumulate((len(share.rewards) for share in shares), initial=0)
    sequences = []
    for group, share, first in zip(groups, shares, firsts, strict=False):
        for sibling, rollout in zip(share.siblings, group.rollouts, strict=True):
            sequences.append(
                TrainingSequence(
                    sequence_id=share.first_row + sibling,
                    group=share.position,
                    prompt_ids=group.prompt.token_ids,
                    completion=rollout.completion,
                    advantage=advantages[first + sibling],
                    temperature=group.temperature,
                    in_loss=not (overlong_filtering and rollout.truncated),
                )
            )
    return sequences


def pack_share(
    sequences: Sequence[TrainingSequence],
    share: RankShare,
    *,
    device: torch.device | str = "cpu",
    cp: Axis = ALONE,
) -> list[Microbatch]:
    """The microbatch of each pass of the plan, equal on all ranks of `cp` but for `own`."""
    batches, by_id = [], {each.sequence_id: each for each in sequences}
    for rows in share.passes:
        part = [by_id[row] for row in rows] or [FILLER]
        # Neighbours of equal length share a call of the attention.
        part = sorted(part, key=lambda each: each.num_tokens)
        batches.append(pack(part, device=device, cp=cp))
    return batches


# For a rank that has nothing in a pass of the others. No token of it is in the loss.
FILLER = TrainingSequence(
    sequence_id=0,
    group=-1,
    prompt_ids=np.zeros(1, np.int32),
    completion=Completion(
        np.zeros(2, np.int32),
        np.zeros(2, np.float32),
        np.zeros(2, np.int32),
        0,
        FinishReason.STOP,
    ),
    advantage=0.0,
    temperature=1.0,
    in_loss=False,
)


def pack(
    sequences: Sequence[TrainingSequence],
    *,
    device: torch.device | str = "cpu",
    cp: Axis = ALONE,
) -> Microbatch:
    """The tensors of one forward pass over whole sequences `prompt + response`.

    The token before a response token predicts it. Siblings share the tokens of their prompt.
    """
    ids, shared, predictors = _placed(sequences)
    completions = [each.completion for each in sequences]
    counts = torch.tensor([len(completion.token_ids) for completion in completions])

    def per_token(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return send(torch.repeat_interleave(torch.tensor(values, dtype=dtype), counts), device)

    def joined(arrays: Sequence[NDArray[np.generic]], dtype: torch.dtype) -> Tensor:
        return send(torch.as_tensor(np.concatenate(arrays)).to(dtype), device)

    own = None
    if cp.size > 1:
        own = own_targets(torch.from_numpy(np.concatenate(predictors)), sum(map(len, ids)), cp)
    in_loss = [each for each in sequences if each.in_loss and len(each.completion.token_ids)]

    return Microbatch(
        lengths=tuple(each.num_tokens for each in sequences),
        shared=tuple(shared),
        token_ids=joined(ids, torch.long),
        predictors=joined(predictors, torch.long),
        targets=joined([each.token_ids for each in completions], torch.long),
        temperatures=per_token([each.temperature for each in sequences], torch.float32),
        behaviour_logprobs=joined([each.behaviour_logprobs for each in completions], torch.float32),
        behaviour_versions=joined([each.weight_versions for each in completions], torch.long),
        prefill_versions=per_token([each.prefill_version for each in completions], torch.long),
        advantages=per_token([each.advantage for each in sequences], torch.float32),
        mask=per_token([each.in_loss for each in sequences], torch.bool),
        sequence_ids=per_token(range(len(sequences)), torch.long),
        own=None if own is None else send(own, device),
        num_loss_tokens=sum(len(each.completion.token_ids) for each in in_loss),
        num_sequences=len(in_loss),
        experts=_experts(sequences, device),
    )


def _experts(sequences: Sequence[TrainingSequence], device: torch.device | str) -> Tensor | None:
    """The experts of all packed tokens, in the order of `_placed`."""
    known = [each.completion.experts for each in sequences if each.completion.experts is not None]
    if not known:
        return None
    runs, begun = [], set[int]()
    for each in sequences:
        completion = each.completion
        own, prompt = completion.experts, completion.prompt_experts
        unknown = np.full((each.num_tokens, *known[0].shape[1:]), -1, np.int16)
        parts = [unknown] if own is None or prompt is None else [prompt, own]
        every = np.concatenate([part.astype(np.int16) for part in parts])
        runs.append(every[len(each.prompt_ids) if each.group in begun else 0 :])
        begun.add(each.group)
    return send(torch.from_numpy(np.concatenate(runs)), device)


def _placed(
    sequences: Sequence[TrainingSequence],
) -> tuple[list[NDArray[np.int32]], list[range], list[NDArray[np.int64]]]:
    """The runs of packed tokens; per sequence its shared prompt and its predictors in them.

    The prompt of a group stands before the first of its sequences.
    """
    runs: list[NDArray[np.int32]] = []
    shared: list[range] = []
    predictors: list[NDArray[np.int64]] = []
    prompts: dict[int, range] = {}
    num_packed = 0
    for each in sequences:
        shared.append(prompts.get(each.group, range(0)))
        if each.group not in prompts:
            runs.append(each.prompt_ids)
            prompts[each.group] = range(num_packed, num_packed + len(each.prompt_ids))
            num_packed += len(each.prompt_ids)
        runs.append(each.completion.token_ids[:-1])
        own = np.arange(num_packed, num_packed + each.num_own_tokens)
        predictors.append(np.concatenate(([prompts[each.group][-1]], own)))
        num_packed += each.num_own_tokens
    return runs, shared, predictors
