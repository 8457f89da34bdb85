"""Turns groups into packed microbatches.

In: whole groups. Out: the tensors of each forward pass. In between: advantages, training sequences,
minibatches. The learner rank calls these functions in the order of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.algorithm import group_advantages
from dapo_async.types import Completion, Group


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """One rollout with its advantage, ready to be packed."""

    sequence_id: int  # its position among all rollouts of the batch, over all ranks
    prompt_ids: NDArray[np.int32]
    completion: Completion
    advantage: float
    temperature: float
    in_loss: bool  # False: overlong filtering masks it out of the loss

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion.token_ids)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One forward and backward pass: T packed tokens of whole sequences, N of them in responses."""

    lengths: tuple[int, ...]  # of the sequences, ascending
    token_ids: Tensor  # [T]
    predictors: Tensor  # [N] positions in T of the tokens that predict the response tokens
    targets: Tensor  # [N] the response tokens
    temperatures: Tensor  # [N]
    behaviour_logprobs: Tensor  # [N]
    behaviour_versions: Tensor  # [N]
    prefill_versions: Tensor  # [N] of the token's rollout
    advantages: Tensor  # [N]
    mask: Tensor  # [N] bool: the token counts in the loss
    sequence_ids: Tensor  # [N]

    @property
    def num_sequences(self) -> int:
        """The number of sequences that have a token in the loss."""
        return len(self.sequence_ids[self.mask].unique())


def training_sequences(
    groups: Sequence[Group],
    *,
    normalize_std: bool,
    overlong_filtering: bool,
    positions: Sequence[int] | None = None,
) -> list[TrainingSequence]:
    """One sequence per rollout, in the groups' order, with advantages of the shaped rewards.

    `positions`: where the groups are in the whole batch, if they are one rank's share of it. All
    groups then have the same number of rollouts.
    """
    numbered = [(number, each) for number, group in enumerate(groups) for each in group.rollouts]
    advantages = group_advantages(
        torch.tensor([rollout.reward for _, rollout in numbered], dtype=torch.float64),
        torch.tensor([number for number, _ in numbered]),
        normalize_std=normalize_std,
    ).tolist()
    sequences = []
    for index, ((number, rollout), advantage) in enumerate(zip(numbered, advantages, strict=True)):
        group, sequence_id = groups[number], index
        if positions is not None:
            size = len(group.rollouts)
            sequence_id = positions[number] * size + index % size
        sequences.append(
            TrainingSequence(
                sequence_id=sequence_id,
                prompt_ids=group.prompt.token_ids,
                completion=rollout.completion,
                advantage=advantage,
                temperature=group.temperature,
                in_loss=not (overlong_filtering and rollout.truncated),
            )
        )
    return sequences


def split_minibatches(
    sequences: Sequence[TrainingSequence],
    num_minibatches: int,
    *,
    seed: tuple[int, int],
    batch_size: int | None = None,
) -> list[list[TrainingSequence]]:
    """Splits the sequences of the batch into minibatches of equal counts.

    The whole batch has `batch_size` sequences (None: these are all). It is shuffled by `seed` =
    (run seed, step), and each minibatch keeps those of the given sequences that fall into it. A
    rank's part of a minibatch may be empty. A single minibatch keeps the order.
    """
    if num_minibatches == 1:
        return [list(sequences)]
    mine = {sequence.sequence_id: sequence for sequence in sequences}
    size = len(sequences) if batch_size is None else batch_size
    order = np.random.default_rng(seed).permutation(size)
    return [
        [mine[index] for index in part if index in mine]
        for part in np.array_split(order, num_minibatches)
    ]


def split_microbatches(
    sequences: Sequence[TrainingSequence],
    max_tokens: int,
    *,
    parts: int = 1,
    device: torch.device | str = "cpu",
) -> list[Microbatch]:
    """Packs sequences, sorted by length, into the fewest balanced microbatches.

    Each has at most `max_tokens`; a longer sequence gets its own microbatch. If the result would be
    fewer than `parts` microbatches, it is about `parts`.
    """
    ordered = sorted(sequences, key=lambda each: each.num_tokens)
    total = sum(each.num_tokens for each in ordered)
    target = total / max(parts, -(-total // max_tokens))
    packs: list[list[TrainingSequence]] = [[]]
    filled = 0
    for sequence in ordered:
        size = sequence.num_tokens
        # Cut where the balanced share is reached, or before this sequence if that is nearer to it
        # than after; always before the limit would be passed.
        nearer = len(packs) < parts and filled + size - target > target - filled
        if packs[-1] and (filled + size > max_tokens or filled >= target or nearer):
            packs.append([])
            filled = 0
        packs[-1].append(sequence)
        filled += size
    return [pack(part, device=device) for part in packs if part]


def filler(
    sequences: Sequence[TrainingSequence], *, device: torch.device | str = "cpu"
) -> Microbatch:
    """A microbatch without a token in the loss, for a rank that has fewer than the other ranks.

    It holds the shortest sequence, so the pass is as cheap as possible.
    """
    shortest = min(sequences, key=lambda each: each.num_tokens)
    return pack([replace(shortest, in_loss=False)], device=device)


def pack(
    sequences: Sequence[TrainingSequence], *, device: torch.device | str = "cpu"
) -> Microbatch:
    """The tensors of one forward pass over whole sequences `prompt + response`.

    The token before a response token predicts it.
    """
    ids, predictors, start = [], [], 0
    for each in sequences:
        ids += [each.prompt_ids, each.completion.token_ids]
        first = start + len(each.prompt_ids) - 1
        predictors.append(np.arange(first, first + len(each.completion.token_ids)))
        start += each.num_tokens
    completions = [each.completion for each in sequences]
    counts = torch.tensor([len(completion.token_ids) for completion in completions])

    def per_token(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.repeat_interleave(torch.tensor(values, dtype=dtype), counts).to(device)

    def joined(arrays: Sequence[NDArray[np.generic]], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.concatenate(arrays), device=device).to(dtype)

    return Microbatch(
        lengths=tuple(each.num_tokens for each in sequences),
        token_ids=joined(ids, torch.long),
        predictors=joined(predictors, torch.long),
        targets=joined([each.token_ids for each in completions], torch.long),
        temperatures=per_token([each.temperature for each in sequences], torch.float32),
        behaviour_logprobs=joined([each.behaviour_logprobs for each in completions], torch.float32),
        behaviour_versions=joined([each.weight_versions for each in completions], torch.long),
        prefill_versions=per_token([each.prefill_version for each in completions], torch.long),
        advantages=per_token([each.advantage for each in sequences], torch.float32),
        mask=per_token([each.in_loss for each in sequences], torch.bool),
        sequence_ids=per_token([each.sequence_id for each in sequences], torch.long),
    )
