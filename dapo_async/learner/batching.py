"""Turns groups into packed microbatches.

In: whole groups. Out: the tensors of each forward pass. In between: advantages and training
sequences. The learner rank calls these functions in the order of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.algorithm import group_advantages
from dapo_async.types import Completion, Group

# Attention works on every sequence with its whole prompt. These are at most so many times the
# tokens of a microbatch, which bounds its memory.
MOST_ATTENDED = 2
SMALL_GROUP = 0.25  # of a microbatch: it is packed as one unit


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """One rollout with its advantage, ready to be packed."""

    sequence_id: int  # its position among all rollouts of the minibatch, over all ranks
    group: int  # siblings have the same number, and the same prompt
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

    `positions`: where the groups are in the minibatch, if they are one rank's share of it. All
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
                group=number,
                prompt_ids=group.prompt.token_ids,
                completion=rollout.completion,
                advantage=advantage,
                temperature=group.temperature,
                in_loss=not (overlong_filtering and rollout.truncated),
            )
        )
    return sequences


def split_microbatches(
    sequences: Sequence[TrainingSequence],
    max_tokens: int,
    *,
    parts: int = 1,
    device: torch.device | str = "cpu",
) -> list[Microbatch]:
    """Packs sequences into the fewest balanced microbatches.

    Each has at most `max_tokens` tokens, where siblings count their prompt once; a longer sequence
    gets its own microbatch. If the result would be fewer than `parts` microbatches, it is about
    `parts`. A small group stays together, and so do most siblings of a large one.
    """
    rest = sorted(sequences, key=lambda each: (each.group, each.num_tokens))
    packs: list[Microbatch] = []
    while rest:
        part = _first_part(rest, max_tokens, parts=parts - len(packs))
        rest = rest[len(part) :]
        # Neighbours of equal length share a call of the attention.
        packs.append(pack(sorted(part, key=lambda each: each.num_tokens), device=device))
    return packs


def _first_part(
    ordered: Sequence[TrainingSequence], max_tokens: int, *, parts: int
) -> list[TrainingSequence]:
    """The first of the ordered sequences, for one microbatch.

    Ends where the balanced share is reached, or before a unit if that is nearer to it than after;
    always before a limit would be passed.
    """
    groups = [[*siblings] for _, siblings in groupby(ordered, key=lambda each: each.group)]
    total = sum(_Filling().size_with(siblings) for siblings in groups)
    target = total / max(parts, -(-total // max_tokens))
    part = _Filling()
    for siblings in groups:
        small = _Filling().size_with(siblings) <= target * SMALL_GROUP
        for unit in [siblings] if small else [[each] for each in siblings]:
            size = part.size_with(unit)
            nearer = parts > 1 and size - target > target - part.num_tokens
            too_many = part.attended_with(unit) > MOST_ATTENDED * max_tokens or size > max_tokens
            if part.sequences and (too_many or nearer or part.num_tokens >= target):
                return part.sequences
            part.add(unit)
    return part.sequences


class _Filling:
    """A microbatch while sequences are put into it, several siblings at a time."""

    def __init__(self) -> None:
        self.sequences: list[TrainingSequence] = []
        self.num_tokens = 0  # the prompt of siblings counts once
        self.num_attended = 0  # it counts for each of them
        self._groups: set[int] = set()

    def size_with(self, siblings: Sequence[TrainingSequence]) -> int:
        first = siblings[0]
        prompt = 0 if first.group in self._groups else len(first.prompt_ids)
        return self.num_tokens + prompt + sum(each.num_own_tokens for each in siblings)

    def attended_with(self, siblings: Sequence[TrainingSequence]) -> int:
        return self.num_attended + sum(each.num_tokens for each in siblings)

    def add(self, siblings: Sequence[TrainingSequence]) -> None:
        self.num_tokens = self.size_with(siblings)
        self.num_attended = self.attended_with(siblings)
        self._groups.add(siblings[0].group)
        self.sequences += siblings


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

    The token before a response token predicts it. Siblings share the tokens of their prompt.
    """
    ids, shared, predictors = _placed(sequences)
    completions = [each.completion for each in sequences]
    counts = torch.tensor([len(completion.token_ids) for completion in completions])

    def per_token(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.repeat_interleave(torch.tensor(values, dtype=dtype), counts).to(device)

    def joined(arrays: Sequence[NDArray[np.generic]], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.concatenate(arrays), device=device).to(dtype)

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
        sequence_ids=per_token([each.sequence_id for each in sequences], torch.long),
    )


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
