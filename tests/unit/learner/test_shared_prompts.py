"""Siblings share the tokens of their prompt in a pass.

Losses, gradients and weights are those of rollouts that are packed with a prompt each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from learner_world import (
    LR,
    PromptPerRollout,
    StepOutcome,
    dense_attention,
    microbatches_of,
    outcome,
    rank_of,
    sequences_of,
    synthetic_groups,
)
from torch import Tensor

from dapo_async.learner import LearnerRank
from dapo_async.learner.batch_plan import RankShare
from dapo_async.learner.batching import TrainingSequence, pack
from dapo_async.model import PackedAttention
from dapo_async.model.attention import take_rows
from dapo_async.model.cost import MOST_ATTENDED
from dapo_async.model.varlen import varlen_kernel
from dapo_async.types import Completion, FinishReason, Group

FORMS: list[dict[str, Any]] = [
    {},
    {"recompute": True},
    {"algorithm": {"entropy_bonus": 0.3, "loss_mean": "sequence"}},
    {"algorithm": {"objective": "gspo", "overlong_filtering": True}},
    {"num_minibatches": 3},  # with proximal passes over the later minibatches
    {"num_minibatches": 4, "algorithm": {"correction": "m2po"}},  # one group in each
]
LENGTHS = (5, 3, 9, 4)
SHARED = (range(0), range(3), range(0), range(8, 11))  # the second asks for nothing


def groups_with_a_short_prompt() -> list[Group]:
    """Four temperatures, prompts of 1, 3, 4 and 5 tokens, responses of 1 to 12 tokens."""
    first, *others = synthetic_groups()
    prompt = replace(first.prompt, token_ids=first.prompt.token_ids[:1])
    return [replace(first, prompt=prompt, temperature=1.1), *others]


def rows_of(groups: Sequence[Group]) -> list[TrainingSequence]:
    return sequences_of(groups)


def assert_same(one: StepOutcome, other: StepOutcome, *, updates: int) -> None:
    # Rounding of gradients near 0 changes AdamW's updates by a small part of LR.
    tolerance = 2e-5 * updates
    assert one.metrics == pytest.approx(other.metrics, rel=tolerance, abs=tolerance)
    for name, ours in one.weights.items():
        torch.testing.assert_close(
            ours, other.weights[name], rtol=0, atol=0.01 * LR * updates, msg=name
        )


@pytest.mark.parametrize("microbatch_tokens", [1, 20, 40, 10_000])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_step_with_shared_prompts_equals_one_without(
    form: dict[str, Any], microbatch_tokens: int
) -> None:
    groups = groups_with_a_short_prompt()
    knobs = {**form, "microbatch_tokens": microbatch_tokens}
    shared = outcome(rank_of(**knobs), groups)
    alone = outcome(rank_of(kind=PromptPerRollout, **knobs), groups)
    updates = form.get("num_minibatches", 1)
    assert_same(shared, alone, updates=updates)
    if updates == 1:
        for ours, theirs in zip(shared.first_moments, alone.first_moments, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


class SiblingsWithAForeignPrompt(LearnerRank):
    """A broken learner: all rollouts share the prompt of the first group."""

    def _sequences(self, groups: Sequence[Group], share: RankShare) -> list[TrainingSequence]:
        return [replace(each, group=0) for each in super()._sequences(groups, share)]


def test_a_prompt_shared_with_another_group_is_detected() -> None:
    groups = [
        replace(group, prompt=replace(group.prompt, token_ids=group.prompt.token_ids[:1]))
        for group in synthetic_groups()
    ]
    assert len({int(group.prompt.token_ids[0]) for group in groups}) > 1
    broken = outcome(rank_of(kind=SiblingsWithAForeignPrompt), groups)
    with pytest.raises(AssertionError):
        assert_same(broken, outcome(rank_of(kind=PromptPerRollout), groups), updates=1)


def test_a_prompt_is_packed_once_and_predicts_the_first_token_of_each_sibling() -> None:
    rows = [row for row in rows_of(groups_with_a_short_prompt()) if row.group == 0]
    batch = pack(rows)  # a prompt of one token, responses of 1, 9 and 4 tokens
    assert batch.lengths == (1, 9, 4)
    assert batch.shared == (range(0), range(1), range(1))
    assert len(batch.token_ids) == 1 + 0 + 8 + 3
    assert batch.predictors.tolist() == [0, 0, *range(1, 9), 0, *range(9, 12)]
    responses = np.concatenate([row.completion.token_ids for row in rows])
    assert batch.targets.tolist() == responses.tolist()


def packed_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    heads = (4, 2, 2)  # of queries, keys, values
    query, key, value = (torch.randn(15, count, 8, dtype=dtype) for count in heads)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def dense_result(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One dense attention per sequence of LENGTHS, with its shared tokens in front."""
    parts = [[*range(5)], [*range(5, 14)], [8, 9, 10, 14]]
    whole = [dense_attention(0, query[rows], key[rows], value[rows]) for rows in parts]
    return torch.cat((whole[0], whole[1], whole[2][3:]))


def assert_attention_is_dense(attention: PackedAttention) -> None:
    inputs, weights = packed_inputs(), torch.linspace(-1, 1, 15 * 4 * 8, dtype=torch.float64)
    mixed = attention(0, *inputs)
    expected = dense_result(*inputs)
    torch.testing.assert_close(mixed, expected)
    ours = torch.autograd.grad(mixed.flatten() @ weights, inputs)
    theirs = torch.autograd.grad(expected.flatten() @ weights, inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_attention_over_shared_tokens_is_that_of_each_whole_sequence() -> None:
    attention = PackedAttention(LENGTHS, shared=SHARED)
    assert attention.positions.tolist() == [*range(5), *range(9), 3]
    assert_attention_is_dense(attention)


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    most_queries: int,
    most_keys: int,
    **options: Any,
) -> Tensor:
    """What the kernels document: a causal mask that is aligned to the last key of a sequence."""
    assert options in ({"causal": True}, {"window_size": (-1, 0), "enable_gqa": True})
    assert (most_queries, most_keys) == (9, 9)
    results = []
    for number in range(len(query_offsets) - 1):
        own = slice(*query_offsets[number : number + 2].tolist())
        past = slice(*key_offsets[number : number + 2].tolist())
        missing = past.stop - past.start - (own.stop - own.start)
        padded = torch.cat((query.new_zeros(missing, *query.shape[1:]), query[own]))
        results.append(dense_attention(0, padded, key[past], value[past])[missing:])
    return torch.cat(results)


@pytest.mark.parametrize("library", ["flash_attn_interface", "flash_attn", "torch"])
def test_varlen_kernels_get_own_queries_and_the_keys_of_whole_sequences(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library != "torch":
        module: Any = ModuleType(library)
        module.__spec__, module.flash_attn_varlen_func = object(), varlen
        monkeypatch.setitem(sys.modules, library, module)
    else:

        def varlen_attn(
            *tensors: Any, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False
        ) -> Tensor:
            return varlen(*tensors, window_size=window_size, enable_gqa=enable_gqa)

        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    attention = PackedAttention(LENGTHS, shared=SHARED)
    assert attention._limits[2:] == (9, 9)  # made here, on the CPU
    attention.device = torch.device("cuda")  # chooses the kernels
    varlen_kernel.cache_clear()  # a process looks for them once
    try:
        assert_attention_is_dense(attention)
        assert_attention_is_dense(attention)
        assert varlen_kernel.cache_info().misses == 1
    finally:
        varlen_kernel.cache_clear()


def test_gradients_of_a_row_that_is_taken_often_add_up_in_float32() -> None:
    x = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.tensor([256.0] + [1.0] * 63, dtype=torch.bfloat16)[:, None]
    rows = torch.zeros(64, dtype=torch.long)
    take_rows(x, rows).backward(gradient)
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [320.0, 0.0]  # 319 to eight bits
    (rounded,) = torch.autograd.grad(x[rows], x, gradient)
    assert float(rounded[0]) == 256.0  # 256 + 1 is 256 in bfloat16


def test_64_siblings_share_a_prompt_in_bfloat16_without_a_loss_of_precision() -> None:
    group = synthetic_groups()[3]
    siblings = tuple(
        replace(group.rollouts[number % 3], reward=float(number % 5 == 0)) for number in range(64)
    )
    groups = [replace(group, rollouts=siblings)]

    def gradient(kind: type[LearnerRank], activations: torch.dtype) -> Tensor:
        done = outcome(rank_of(kind=kind, activations=activations, grad_clip=1e9), groups)
        return torch.cat([moment.flatten() for moment in done.first_moments])

    exact = gradient(PromptPerRollout, torch.float32)
    errors = {
        kind: float((gradient(kind, torch.bfloat16) - exact).norm() / exact.norm())
        for kind in (LearnerRank, PromptPerRollout)
    }
    assert errors[LearnerRank] < 1.2 * errors[PromptPerRollout] < 0.2


def sequence(number: int, group: int, prompt: int, response: int) -> TrainingSequence:
    """A sequence with a prompt and a response of so many tokens."""
    arrays = np.zeros(response, np.float32), np.zeros(response, np.int32)
    completion = Completion(np.zeros(response, np.int32), *arrays, 0, FinishReason.STOP)
    return TrainingSequence(
        number, group, np.full(prompt, group, np.int32), completion, 1.0, 1.0, in_loss=True
    )


def random_rows(random: np.random.Generator) -> list[TrainingSequence]:
    """Groups of different sizes, with prompts and responses of 1 to 40 tokens."""
    rows: list[TrainingSequence] = []
    for group in range(int(random.integers(1, 12))):
        prompt = int(random.integers(1, 41))
        for _ in range(int(random.integers(1, 20))):
            rows.append(sequence(len(rows), group, prompt, int(random.integers(1, 41))))
    return rows


@pytest.mark.parametrize("max_tokens", [1, 50, 100, 400])
def test_microbatches_keep_the_limit_and_repeat_few_prompts(max_tokens: int) -> None:
    random = np.random.default_rng(max_tokens)
    for _ in range(30):
        rows = random_rows(random)
        batches = microbatches_of(rows, max_tokens)
        assert sum(len(batch.lengths) for batch in batches) == len(rows)
        prompts = 0
        for batch in batches:
            assert len(batch.token_ids) <= max_tokens or len(batch.lengths) == 1
            assert sum(batch.lengths) <= MOST_ATTENDED * max_tokens or len(batch.lengths) == 1
            prompts += sum(not prefix for prefix in batch.shared)
        # About one prompt per microbatch is a repeated one.
        assert prompts <= len({row.group for row in rows}) + 1.25 * len(batches)


def test_a_small_group_stays_in_one_microbatch() -> None:
    # Ten groups of 4 + 4 · 2 = 12 tokens: 120 in all.
    rows = [sequence(4 * group + number, group, 4, 3) for group in range(10) for number in range(4)]
    batches = microbatches_of(rows, 70)
    assert [len(batch.token_ids) for batch in batches] == [60, 60]
    assert [sum(not prefix for prefix in batch.shared) for batch in batches] == [5, 5]
