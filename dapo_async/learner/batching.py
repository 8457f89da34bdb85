"""Groups in, packed microbatches out: advantages first, then rows, minibatches and the tensors of each forward pass."""

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
class Row:
    """One rollout with its advantage, ready to be packed."""

    sequence_id: (
        int  # unique within the step, over all ranks: its place among all rollouts of the batch
    )
    prompt_ids: NDArray[np.int32]
    completion: Completion
    advantage: float
    temperature: float
    in_loss: bool  # False: masked out of the loss (overlong filtering), still in the diagnostics of the group

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion.token_ids)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One forward and backward pass: `T` packed tokens of whole sequences, of which the `N` response tokens are trained."""

    lengths: tuple[int, ...]  # of the sequences, ascending
    token_ids: Tensor  # [T]
    predictors: (
        Tensor  # [N] index into T of the token whose hidden state predicts each response token
    )
    targets: Tensor  # [N] the response tokens
    temperatures: Tensor  # [N]
    behaviour_logprobs: Tensor  # [N]
    behaviour_versions: Tensor  # [N]
    prefill_versions: Tensor  # [N] of the rollout that the token belongs to
    advantages: Tensor  # [N]
    mask: Tensor  # [N] bool: counts in the loss
    sequence_ids: Tensor  # [N]

    @property
    def num_sequences(self) -> int:
        """With a token in the loss."""
        return len(self.sequence_ids[self.mask].unique())


def share_groups(num_tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Which groups of a batch each data-parallel rank trains: positions in the batch, ascending, with about as many tokens for each.

    The largest group first, to the rank with the fewest tokens so far; its number decides between equals. So each has at least one.
    """
    assert len(num_tokens) >= num_ranks, (num_tokens, num_ranks)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    filled = [0] * num_ranks
    for position in sorted(
        range(len(num_tokens)), key=lambda position: (-num_tokens[position], position)
    ):
        rank = min(range(num_ranks), key=lambda rank: (filled[rank], rank))
        shares[rank].append(position)
        filled[rank] += num_tokens[position]
    return [sorted(share) for share in shares]


def rows_of(
    groups: Sequence[Group],
    *,
    normalize_std: bool,
    overlong_filtering: bool,
    positions: Sequence[int] | None = None,
) -> list[Row]:
    """One row per rollout, in the groups' order, with group-relative advantages of the shaped rewards.

    `positions` of the groups in the whole batch, where these are one rank's share; all groups have the same number of rollouts then.
    """
    rollouts = [
        (number, group, rollout)
        for number, group in enumerate(groups)
        for rollout in group.rollouts
    ]
    rewards = torch.tensor([rollout.reward for _, _, rollout in rollouts], dtype=torch.float64)
    group_ids = torch.tensor([number for number, _, _ in rollouts])
    advantages = group_advantages(rewards, group_ids, normalize_std=normalize_std).tolist()
    return [
        Row(
            sequence_id=sequence_id
            if positions is None
            else positions[number] * len(group.rollouts) + sequence_id % len(group.rollouts),
            prompt_ids=group.prompt.token_ids,
            completion=rollout.completion,
            advantage=advantage,
            temperature=group.temperature,
            in_loss=not (overlong_filtering and rollout.truncated),
        )
        for sequence_id, ((number, group, rollout), advantage) in enumerate(
            zip(rollouts, advantages, strict=True)
        )
    ]


def split_minibatches(
    rows: Sequence[Row], num_minibatches: int, *, seed: tuple[int, int], num_rows: int | None = None
) -> list[list[Row]]:
    """Deals all `num_rows` rows of the batch, shuffled by `seed` = (run seed, step), into minibatches of equal counts, and keeps these of them.

    One minibatch keeps the order. A rank's share of a minibatch may be empty.
    """
    if num_minibatches == 1:
        return [list(rows)]
    mine = {row.sequence_id: row for row in rows}
    order = np.random.default_rng(seed).permutation(len(rows) if num_rows is None else num_rows)
    return [
        [mine[index] for index in part if index in mine]
        for part in np.array_split(order, num_minibatches)
    ]


def split_microbatches(
    rows: Sequence[Row], max_tokens: int, *, parts: int = 1, device: torch.device | str = "cpu"
) -> list[Microbatch]:
    """Packs rows, sorted by length, into the fewest balanced microbatches of about at most `max_tokens`; a longer row gets its own.

    Where that would be fewer than `parts`, into about that many.
    """
    ordered = sorted(rows, key=lambda row: row.num_tokens)
    total = sum(row.num_tokens for row in ordered)
    target = total / max(parts, -(-total // max_tokens))
    packs: list[list[Row]] = [[]]
    filled = 0
    for row in ordered:
        # Cut where the balanced share is reached, or nearer to it before this row than after it; always before the limit would be passed.
        nearer = len(packs) < parts and filled + row.num_tokens - target > target - filled
        if packs[-1] and (filled + row.num_tokens > max_tokens or filled >= target or nearer):
            packs.append([])
            filled = 0
        packs[-1].append(row)
        filled += row.num_tokens
    return [pack(part, device=device) for part in packs if part]


def filler(rows: Sequence[Row], *, device: torch.device | str = "cpu") -> Microbatch:
    """The cheapest pass of a rank that has no more microbatches while others do: its shortest row, out of the loss."""
    return pack([replace(min(rows, key=lambda row: row.num_tokens), in_loss=False)], device=device)


def pack(rows: Sequence[Row], *, device: torch.device | str = "cpu") -> Microbatch:
    """The tensors of one forward pass over whole sequences `prompt + response`; a response token is predicted by the token before it."""
    ids, predictors, start = [], [], 0
    for row in rows:
        ids += [row.prompt_ids, row.completion.token_ids]
        first = start + len(row.prompt_ids) - 1
        predictors.append(np.arange(first, first + len(row.completion.token_ids)))
        start += row.num_tokens
    counts = [len(row.completion.token_ids) for row in rows]

    def per_token(
        values: Sequence[float] | Sequence[int] | Sequence[bool], dtype: torch.dtype
    ) -> Tensor:
        return torch.repeat_interleave(torch.tensor(values, dtype=dtype), torch.tensor(counts)).to(
            device
        )

    def joined(arrays: Sequence[NDArray[np.generic]], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.concatenate(arrays), device=device).to(dtype)

    completions = [row.completion for row in rows]
    return Microbatch(
        lengths=tuple(row.num_tokens for row in rows),
        token_ids=joined(ids, torch.long),
        predictors=joined(predictors, torch.long),
        targets=joined([completion.token_ids for completion in completions], torch.long),
        temperatures=per_token([row.temperature for row in rows], torch.float32),
        behaviour_logprobs=joined(
            [completion.behaviour_logprobs for completion in completions], torch.float32
        ),
        behaviour_versions=joined(
            [completion.weight_versions for completion in completions], torch.long
        ),
        prefill_versions=per_token(
            [completion.prefill_version for completion in completions], torch.long
        ),
        advantages=per_token([row.advantage for row in rows], torch.float32),
        mask=per_token([row.in_loss for row in rows], torch.bool),
        sequence_ids=per_token([row.sequence_id for row in rows], torch.long),
    )
