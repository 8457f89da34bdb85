"""How tokens and heads are divided over context-parallel ranks, without processes."""

from __future__ import annotations

import pytest
import torch

from dapo_async.model import Axis, own_targets
from dapo_async.model.context_parallel import own_tokens
from dapo_async.model.head_split import HeadSplit

# Query heads, key-value heads, ranks.
HEADS = ((4, 2, 2), (3, 1, 2), (3, 3, 2), (6, 2, 4), (14, 2, 4), (28, 4, 8), (40, 8, 8), (2, 1, 3))


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), HEADS)
def test_each_query_head_meets_its_key_head_on_one_rank(
    heads: int, kv_heads: int, ranks: int
) -> None:
    split = HeadSplit.of(heads, kv_heads, ranks)
    sent = split.kv_heads or tuple(range(kv_heads))
    assert len(sent) == ranks * split.keys
    for head in range(heads):
        rank, place = divmod(head, split.queries)
        serves = split.queries // split.keys
        assert sent[rank * split.keys + place // serves] == head * kv_heads // heads


def test_heads_that_divide_are_sent_once() -> None:
    assert HeadSplit.of(28, 4, 4) == HeadSplit(queries=7, keys=1, kv_heads=None)
    assert HeadSplit.of(32, 8, 2) == HeadSplit(queries=16, keys=4, kv_heads=None)
    few = HeadSplit.of(32, 4, 8)
    assert (few.queries, few.keys, few.kv_heads) == (4, 1, (0, 0, 1, 1, 2, 2, 3, 3))


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8])
def test_slices_have_every_token_and_every_target_once(num_tokens: int) -> None:
    ids, ranks = torch.arange(1, num_tokens + 1), [Axis(rank, 3) for rank in range(3)]
    slices = [own_tokens(ids, rank) for rank in ranks]
    assert len({len(each) for each in slices}) == 1, "an exchange needs equal slices"
    assert [each for each in torch.cat(slices).tolist() if each] == ids.tolist()
    predictors = torch.tensor([0, 0, *range(num_tokens)])  # siblings share a predictor
    places = [own_targets(predictors, num_tokens, rank) for rank in ranks]
    assert sorted(torch.cat(places).tolist()) == list(range(len(predictors)))
    for own, rank in zip(places, ranks, strict=True):
        first = rank.rank * len(slices[0])
        assert all(first <= each < first + len(slices[0]) for each in predictors[own])
