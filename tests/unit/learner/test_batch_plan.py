"""The plan of a minibatch: who trains which rollouts in which pass, with which balance."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_world import TINY

from dapo_async.learner.batch_plan import RankShare, pair_cost, share_minibatch
from dapo_async.model import ModelConfig
from dapo_async.model.cost import MOST_ATTENDED
from dapo_async.types import GroupFacts

LONGEST = 20_480  # response tokens
LIMIT = 22_528  # tokens of a microbatch
PAIR_COST = 2e-5  # of a model of 32 B parameters


def facts(prompt_tokens: int, response_tokens: tuple[int, ...]) -> GroupFacts:
    rewards = tuple(float(each % 2) for each in response_tokens)
    return GroupFacts(0, "run", 0, 1, prompt_tokens, response_tokens, rewards, rewards, ())


def drawn(kind: str, *, num_groups: int, group_size: int) -> list[GroupFacts]:
    """Groups with response lengths of a distribution; their mean is 5,000 to 10,000 tokens."""
    random = np.random.default_rng(7)
    shape = (num_groups, group_size)
    lengths = {
        "lognormal": random.lognormal(np.log(5079) - 0.32, 0.8, shape),
        "two humps": np.where(
            random.random(shape) < 0.7,
            random.lognormal(7, 0.4, shape),
            random.lognormal(9.5, 0.2, shape),
        ),
        "uniform": random.integers(10, LONGEST, shape),
    }[kind]
    prompts = random.integers(60, 400, num_groups)
    return [
        facts(int(prompt), tuple(int(each) for each in np.clip(row, 1, LONGEST)))
        for prompt, row in zip(prompts, lengths, strict=True)
    ]


def seconds(shares: list[RankShare], groups: list[GroupFacts]) -> tuple[float, float]:
    """Costs added up by hand: of all passes with their slowest rank, and the even share of all."""
    rows = [
        (group, prompt.prompt_tokens, length - 1)
        for group, prompt in enumerate(groups)
        for length in prompt.response_tokens
    ]

    def cost(numbers: tuple[int, ...]) -> float:
        prompts = {rows[number][0]: rows[number][1] for number in numbers}
        own = sum(
            count * (1 + PAIR_COST * (prompt + count / 2))
            for _, prompt, count in (rows[number] for number in numbers)
        )
        return own + sum(count * (1 + PAIR_COST * count / 2) for count in prompts.values())

    costs = [[cost(rows) for rows in share.passes] for share in shares]
    slowest = sum(max(of_pass) for of_pass in zip(*costs, strict=True))
    return slowest, sum(map(sum, costs)) / len(shares)


@pytest.mark.parametrize("kind", ["lognormal", "two humps", "uniform"])
@pytest.mark.parametrize("num_ranks", [8, 16, 32])
@pytest.mark.parametrize("group_size", [4, 16, 64])
def test_no_rank_waits_for_more_than_a_twentieth_of_a_minibatch(
    kind: str, num_ranks: int, group_size: int
) -> None:
    """One of sixteen minibatches of a step of 512 × 16 rollouts."""
    groups = drawn(kind, num_groups=512 // group_size, group_size=group_size)
    shares = share_minibatch(groups, num_ranks=num_ranks, max_tokens=LIMIT, pair_cost=PAIR_COST)
    slowest, even = seconds(shares, groups)
    assert shares[0].imbalance == pytest.approx(slowest / even)
    assert slowest <= 1.05 * even


def test_plan_of_eight_thousand_rollouts_takes_little_time() -> None:
    groups = drawn("lognormal", num_groups=512, group_size=16)
    taken = []
    for _ in range(3):
        began_s = time.process_time()
        share_minibatch(groups, num_ranks=16, max_tokens=LIMIT, pair_cost=PAIR_COST)
        taken.append(time.process_time() - began_s)
    assert min(taken) < 0.2  # 0.08 s; 0.18 s where Python collects garbage meanwhile


@st.composite
def minibatches(draw: st.DrawFn) -> list[GroupFacts]:
    lengths = st.lists(st.integers(1, 60), min_size=1, max_size=8).map(tuple)
    return draw(st.lists(st.builds(facts, st.integers(1, 40), lengths), min_size=1, max_size=12))


@settings(deadline=None, max_examples=300)
@given(minibatches(), st.integers(1, 5), st.sampled_from([1, 30, 60, 150, 1000]))
def test_every_rollout_is_trained_once_within_the_limits(
    groups: list[GroupFacts], num_ranks: int, max_tokens: int
) -> None:
    shares = share_minibatch(groups, num_ranks=num_ranks, max_tokens=max_tokens, pair_cost=0.01)
    rows = [
        (position, sibling)
        for position, group in enumerate(groups)
        for sibling in range(len(group.response_tokens))
    ]
    assert sorted(row for share in shares for each in share.passes for row in each) == [
        *range(len(rows))
    ]
    assert len({len(share.passes) for share in shares}) == 1
    for share in shares:
        named = {(each.position, sibling) for each in share.groups for sibling in each.siblings}
        assert named == {rows[row] for of_pass in share.passes for row in of_pass}
        assert [each.position for each in share.groups] == sorted(
            {each.position for each in share.groups}
        )
        for each in share.groups:
            assert rows[each.first_row] == (each.position, 0)
            assert each.rewards == groups[each.position].rewards
            assert list(each.siblings) == sorted(set(each.siblings))
        for of_pass in share.passes:
            prompts = {rows[row][0] for row in of_pass}
            own = [groups[rows[row][0]].response_tokens[rows[row][1]] - 1 for row in of_pass]
            tokens = sum(own) + sum(groups[group].prompt_tokens for group in prompts)
            attended = sum(own) + sum(groups[rows[row][0]].prompt_tokens for row in of_pass)
            assert len(of_pass) <= 1 or tokens <= max_tokens
            assert len(of_pass) <= 1 or attended <= MOST_ATTENDED * max_tokens


def test_siblings_stay_together_where_that_costs_no_balance() -> None:
    # Groups of 4 + 4 · 2 = 12 tokens.
    groups = [facts(4, (3, 3, 3, 3)) for _ in range(16)]
    shares = share_minibatch(groups, num_ranks=4, max_tokens=60, pair_cost=0.0)
    assert [len(share.groups) for share in shares] == [4, 4, 4, 4]
    assert all(each.siblings == (0, 1, 2, 3) for share in shares for each in share.groups)
    assert shares[0].imbalance == 1.0


def test_one_group_is_split_over_the_ranks_with_the_rewards_of_all_siblings() -> None:
    shares = share_minibatch([facts(2, (9, 20, 9, 20))], num_ranks=2, max_tokens=100, pair_cost=0.0)
    assert sorted(share.groups[0].siblings for share in shares) == [(0, 1), (2, 3)]
    assert {share.groups[0].rewards for share in shares} == {(1.0, 0.0, 1.0, 0.0)}


def test_rank_without_a_rollout_in_a_pass_gets_an_empty_one() -> None:
    shares = share_minibatch([facts(2, (9, 9, 9))], num_ranks=2, max_tokens=10, pair_cost=0.0)
    assert [[len(rows) for rows in share.passes] for share in shares] == [[1, 1], [1, 0]]


def test_cost_of_a_pair_is_attention_by_matrix_products() -> None:
    # Qwen2.5-32B: at 20 k tokens attention costs about a fifth of the matrix products.
    sizes = {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "model_type": "qwen2",
    }
    assert pair_cost(ModelConfig.from_dict(sizes)) == pytest.approx(2.05e-5, rel=0.02)
    # By hand: 2 layers of 16 · (2 · 16 + 2 · 8 + 3 · 24) weights and a head of 23 · 16.
    assert pair_cost(TINY) == pytest.approx(4 * 2 * 16 / (2 * (2 * 16 * 120 + 23 * 16)))
