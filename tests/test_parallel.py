"""Law 4 over ranks: tensor- and data-parallel gloo processes come to the single process's losses, gradients and weights; float32."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from gloo import TIMEOUT_S, on_ranks
from learner_world import LR, TINY, VERSION, rank_of, synthetic_groups, tiny_decoder

from dapo_async.algorithm import summarise
from dapo_async.config import Algorithm, Learner
from dapo_async.learner import LearnerRank
from dapo_async.learner.batching import share_groups
from dapo_async.model import Axis, Decoder, Mesh, ModelConfig, PackedAttention, split_dim, token_logprobs
from dapo_async.types import FinishReason, Group, StepMetrics

pytestmark = pytest.mark.gloo
MESHES = ((1, 2), (2, 1), (2, 2))  # dp, tp
# Odd sizes: 23 tokens of vocabulary on two ranks are 12 and 11; every family's extras: biases, norms of queries and keys, an untied head.
EXTRAS: dict[str, dict[str, Any]] = {
    "tied with biases": {},
    "norms of heads": {"family": "qwen3", "qkv_bias": False, "qk_norm": True},
    "untied": {"tie_embeddings": False},
}
CONFIG = replace(TINY, num_kv_heads=2)
FORMS = (
    {"learner": {}},
    {"learner": {"num_minibatches": 3, "microbatch_tokens": 20, "recompute_layers": 1}},
    {"learner": {"num_minibatches": 2}, "algorithm": {"second_moment": 0.04, "overlong_filtering": True}},
    {"learner": {"num_minibatches": 2}, "algorithm": {"objective": "gspo", "entropy_bonus": 0.1}},
    {"learner": {"num_minibatches": 2}, "algorithm": {"loss_mean": "sequence", "overlong_filtering": True}},
    # One rollout per minibatch: with dp = 2 one rank has nothing but fillers in it. Where the rollout is truncated nobody has a token in the loss.
    {"learner": {"num_minibatches": 12}, "algorithm": {"overlong_filtering": True}},
    # One rollout per microbatch: those of the truncated ones have no token in the loss, and the ranks have different numbers of them.
    {"learner": {"microbatch_tokens": 1}, "algorithm": {"overlong_filtering": True}},
)
REL = 2e-5  # of losses, gradient norms and all other metrics in float32, over three steps; relative, or absolute where they are below 1


def decoder_of(config: ModelConfig, mesh: Mesh) -> Decoder:
    """The shard of a random dense decoder that is the same on every rank."""
    torch.manual_seed(3)
    dense = Decoder(config)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    decoder = Decoder(config, mesh.tp)
    weights = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(shard(weights[name], name, mesh))
    return decoder


def shard(tensor: torch.Tensor, name: str, mesh: Mesh) -> torch.Tensor:
    dim = split_dim(name)
    if dim is None:
        return tensor
    part = mesh.tp.share(tensor.shape[dim])
    return tensor.narrow(dim, part.start, part.stop - part.start)


def uneven_groups() -> list[Group]:
    """Non-symmetric data: lengths from 1 to 12, one group whose rollouts are all truncated, so that overlong filtering leaves it without a token."""
    groups = synthetic_groups()
    silent = tuple(replace(rollout, completion=replace(rollout.completion, finish_reason=FinishReason.LENGTH)) for rollout in groups[1].rollouts)
    return [groups[0], replace(groups[1], rollouts=silent), *groups[2:]]


def forward_and_backward(mesh: Mesh, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    decoder = decoder_of(config, mesh)
    random = np.random.default_rng(0)
    lengths = (3, 5, 9)
    ids = torch.from_numpy(random.integers(0, config.vocab_size, sum(lengths)))
    attention = PackedAttention(lengths)
    hidden = decoder(ids, attention.positions, attention)
    temperatures = torch.linspace(0.7, 1.3, len(ids) - 1)
    start = decoder.model.embed_tokens.share.start
    logprobs, entropies = token_logprobs(hidden[:-1], decoder.head_weight, ids[1:], temperatures, chunk_tokens=7, tp=mesh.tp, vocab_start=start)
    (logprobs * torch.linspace(-1, 1, len(logprobs)) + entropies * torch.linspace(0.5, -1, len(logprobs))).sum().backward()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}
    return logprobs.detach(), entropies.detach(), gradients


@pytest.mark.parametrize("extra", EXTRAS)
def test_decoder_split_over_two_ranks_has_the_logprobs_entropies_and_gradients_of_the_whole(extra: str) -> None:
    config = replace(TINY, num_kv_heads=2, **EXTRAS[extra])
    logprobs, entropies, gradients = forward_and_backward(Mesh(), config)
    for rank, (their_logprobs, their_entropies, theirs) in enumerate(on_ranks(forward_and_backward, config, tp=2)):
        torch.testing.assert_close(their_logprobs, logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(their_entropies, entropies, rtol=0, atol=1e-5)
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            dim = split_dim(name)
            expected = gradient if dim is None else gradient.tensor_split(2, dim)[rank]
            gap = float((theirs[name] - expected).abs().max() / gradient.abs().max())
            assert gap <= 1e-5, f"{name} on rank {rank}: {gap:.1e} of the largest gradient"


def test_gradient_without_the_sum_behind_a_split_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_async.model import layers

    _, _, gradients = forward_and_backward(Mesh(), CONFIG)
    monkeypatch.setattr(layers, "copy_to", lambda x, axis: x)  # f forgotten: the ranks' gradients are parts only
    (_, _, theirs), _ = on_ranks(forward_and_backward, CONFIG, tp=2)
    assert (theirs["model.norm.weight"] - gradients["model.norm.weight"]).abs().max() < 1e-5  # above the last split layer all is well
    name = "model.layers.0.input_layernorm.weight"
    assert (theirs[name] - gradients[name]).abs().max() > 1e-3


def rank_on(mesh: Mesh, *, algorithm: dict[str, Any] | None = None, activations: torch.dtype = torch.float32, **learner: Any) -> LearnerRank:
    knobs = Learner(**{"lr": LR, "warmup_steps": 0, "grad_clip": 0.5, **learner})
    decoder = decoder_of(CONFIG, mesh)
    return LearnerRank(decoder, algorithm=Algorithm(**(algorithm or {})), learner=knobs, seed=0, version=VERSION, activations=activations, mesh=mesh)


def step_on(rank: LearnerRank, mesh: Mesh, groups: list[Group]) -> StepMetrics:
    """One step on the rank's share of the groups."""
    positions = share_groups([group.num_tokens for group in groups], mesh.dp.size)[mesh.dp.rank]
    return rank.step([groups[position] for position in positions], positions=positions, num_groups=len(groups))


@dataclass
class Trained:
    """What a rank has after three steps."""

    steps: list[StepMetrics]
    weights: dict[str, torch.Tensor]  # its shards
    state: dict[str, torch.Tensor] | None


def three_steps(mesh: Mesh, form: dict[str, Any]) -> Trained:
    rank = rank_on(mesh, algorithm=form.get("algorithm"), **form["learner"])
    steps = [step_on(rank, mesh, uneven_groups()) for _ in range(3)]
    return Trained(steps, {name: parameter.detach() for name, parameter in rank.decoder.named_parameters()}, rank.full_state())


def check_ranks_agree(ranks: list[Trained], *, tp: int) -> None:
    """Bit for bit: the gradient norm on all ranks, all shards along dp, whole parameters along tp; and the flags of a step are counted once."""
    for number, rank in enumerate(ranks):
        assert [each.sums.get("grad_norm", (0, 0))[0] for each in rank.steps] == [each.sums.get("grad_norm", (0, 0))[0] for each in ranks[0].steps]
        for name, tensor in rank.weights.items():
            same = ranks[number % tp] if split_dim(name) is not None else ranks[0]
            assert torch.equal(tensor, same.weights[name]), f"{name} on rank {number}"
        assert all(("skipped" in each.totals) == (number < tp) for each in rank.steps)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("dp", "tp"), MESHES)
def test_three_steps_of_several_ranks_equal_those_of_one(dp: int, tp: int, form: dict[str, Any]) -> None:
    alone, ranks = three_steps(Mesh(), form), on_ranks(three_steps, form, dp=dp, tp=tp)
    check_ranks_agree(ranks, tp=tp)
    amplified = 10 if form["learner"].get("num_minibatches", 1) == 12 else 1  # AdamW hands the rounding of each of the 36 updates on
    for step in range(3):
        per_dp = [rank.steps[step] for rank in ranks[::tp]]
        ours, theirs = summarise(alone.steps[step]), summarise(sum(per_dp[1:], start=per_dp[0]))
        tolerance = REL * amplified
        assert ours.keys() == theirs.keys()
        # Fractions count single tokens: one that lies at a clip's edge may fall on its other side.
        named = {name for name in ours if not name.endswith("_fraction")} if step or amplified > 1 else ours.keys()
        assert {name: theirs[name] for name in named} == pytest.approx({name: ours[name] for name in named}, rel=tolerance, abs=tolerance)
    assert [rank.state is None for rank in ranks] == [False] + [True] * (dp * tp - 1)
    assert alone.state is not None
    assert ranks[0].state.keys() == alone.state.keys()
    for name, tensor in alone.state.items():
        if name.startswith("weights."):
            torch.testing.assert_close(ranks[0].state[name], tensor, rtol=0, atol=0.005 * amplified * LR, msg=name)


def test_agreement_check_notices_a_rank_that_drifts_by_one_bit() -> None:
    ranks = on_ranks(three_steps, FORMS[0], tp=2)
    check_ranks_agree(ranks, tp=2)
    norm = ranks[1].weights["model.norm.weight"]
    norm[3] = torch.nextafter(norm[3], torch.tensor(2.0))
    with pytest.raises(AssertionError, match=r"model\.norm\.weight on rank 1"):
        check_ranks_agree(ranks, tp=2)


def count_passes(mesh: Mesh) -> list[int]:
    """Microbatches of each minibatch, as the rank runs them."""
    rank, counts = rank_on(mesh, num_minibatches=12), []
    update = rank._update
    rank._update = lambda minibatch, *rest, **more: (counts.append(len(minibatch)), update(minibatch, *rest, **more))[1]  # type: ignore[method-assign]
    step_on(rank, mesh, uneven_groups())
    return counts


def test_every_rank_runs_as_many_microbatches_as_the_others() -> None:
    assert on_ranks(count_passes, dp=2) == [[1] * 12] * 2


def test_ranks_without_fillers_would_run_different_numbers_of_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LearnerRank, "_fill_up", lambda self, minibatches, rows: None)
    first, second = on_ranks(count_passes, dp=2)
    assert [one + other for one, other in zip(first, second, strict=True)] == [1] * 12  # each rollout is on one rank alone
    assert first != second


def one_bad_rank(mesh: Mesh) -> tuple[StepMetrics, bool]:
    """A step with one behaviour logprob that is not a number, and whether it left every weight alone."""
    groups = uneven_groups()
    completion = groups[3].rollouts[2].completion
    bad = replace(groups[3].rollouts[2], completion=replace(completion, behaviour_logprobs=np.full_like(completion.behaviour_logprobs, np.nan)))
    rank = rank_on(mesh)
    before = {name: parameter.detach().clone() for name, parameter in rank.decoder.named_parameters()}
    metrics = step_on(rank, mesh, [*groups[:3], replace(groups[3], rollouts=(*groups[3].rollouts[:2], bad))])
    return metrics, all(torch.equal(parameter, before[name]) for name, parameter in rank.decoder.named_parameters())


def test_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_counted_once() -> None:
    ranks = on_ranks(one_bad_rank, dp=2, tp=2)
    assert all(untouched for _, untouched in ranks)
    (first, _), _, (second, _), _ = ranks
    assert (first + second).totals["skipped"] == (first + second).totals["non_finite"] == 1.0
    assert "grad_norm" not in (first + second).sums


def test_rank_that_only_looks_at_its_own_numbers_would_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_async.learner import rank

    # Neither the gradient nor the loss is shared: law 4 and the skip are broken together.
    monkeypatch.setattr(rank, "sum_gradients", lambda parameters, dp: None)
    monkeypatch.setattr(rank, "sum_numbers", lambda values, mesh, device: list(values))
    assert sorted(untouched for _, untouched in on_ranks(one_bad_rank, dp=2)) == [False, True]


def half_precision(mesh: Mesh) -> StepMetrics:
    return step_on(rank_on(mesh, activations=torch.bfloat16), mesh, uneven_groups())


def test_bfloat16_activations_cross_the_ranks() -> None:
    alone, (first, *_) = summarise(half_precision(Mesh())), on_ranks(half_precision, tp=2)
    assert summarise(first)["grad_norm"] == pytest.approx(alone["grad_norm"], rel=0.05)  # eight bits of mantissa
    assert summarise(first)["loss"] == pytest.approx(alone["loss"], rel=0.05, abs=0.01)


def test_gradient_of_each_rank_over_its_own_tokens_only_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_async.learner import rank

    alone = three_steps(Mesh(), FORMS[0])
    monkeypatch.setattr(rank, "sum_numbers", lambda values, mesh, device: list(values))  # law 4 broken: the denominator is local
    first, _ = on_ranks(three_steps, FORMS[0], dp=2)
    assert summarise(first.steps[0])["grad_norm"] != pytest.approx(summarise(alone.steps[0])["grad_norm"], rel=1e-2)


State = dict[str, torch.Tensor]


def go_on(mesh: Mesh, state: State | None) -> tuple[State | None, StepMetrics, State | None]:
    """A step, or a loaded state in its place; the state then, the metrics of the step after, the state at the end."""
    rank = rank_on(mesh, num_minibatches=2)
    if state is None:
        step_on(rank, mesh, uneven_groups())
    else:
        rank.load_state(state)
        rank.version = VERSION + 1
    return rank.full_state(), step_on(rank, mesh, uneven_groups()), rank.full_state()


def equal(one: State | None, other: State | None) -> bool:
    assert one is not None
    assert other is not None
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 2)])
def test_ranks_that_load_a_state_go_on_bit_for_bit_as_those_that_gave_it(dp: int, tp: int) -> None:
    gave, loaded = on_ranks(go_on, None, dp=dp, tp=tp), on_ranks(go_on, on_ranks(go_on, None, dp=dp, tp=tp)[0][0], dp=dp, tp=tp)
    assert [metrics for _, metrics, _ in loaded] == [metrics for _, metrics, _ in gave]
    (before, _, after), *_ = gave
    assert equal(loaded[0][0], before)
    assert equal(loaded[0][2], after)
    assert after is not None
    assert after["updates"] == 4
    forgetful = on_ranks(go_on, {**before, "exp_avg.model.norm.weight": torch.zeros(16)}, dp=dp, tp=tp)  # one moment lost is seen
    assert not equal(forgetful[0][2], after)


def test_state_loads_at_any_other_size_whole_and_without_a_change() -> None:
    (state, *_), _ = on_ranks(go_on, None, tp=2)
    same, metrics, _ = go_on(Mesh(), state)
    assert equal(same, state)
    (again, theirs, _), _ = on_ranks(go_on, same, dp=2)
    assert equal(again, state)
    (once_more, _, _), *_ = on_ranks(go_on, same, dp=2, tp=2)
    assert equal(once_more, state)
    assert theirs.sums["grad_norm"][0] == pytest.approx(metrics.sums["grad_norm"][0], rel=1e-3)


def exchanges(mesh: Mesh, chunk_tokens: int) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """How often a forward and backward pass of the head talks to the other ranks; logprobs, entropies and the gradient of hidden states."""
    calls: list[str] = []

    class Group:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(mesh.tp.group, name)

    tp = Axis(mesh.tp.rank, mesh.tp.size, Group())
    random = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(9, 6, generator=random).requires_grad_(), torch.randn(23, 6, generator=random)
    targets, temperature = torch.randint(0, 23, (9,), generator=random), torch.linspace(0.5, 2.0, 9)
    share = tp.share(23)
    logprobs, entropies = token_logprobs(hidden, weight[share], targets, temperature, chunk_tokens=chunk_tokens, tp=tp, vocab_start=share.start)
    (logprobs.square() + entropies.square()).sum().backward()
    assert hidden.grad is not None
    return len(calls), logprobs.detach(), entropies.detach(), hidden.grad


def test_head_of_four_uneven_shards_talks_as_often_whatever_the_number_of_chunks() -> None:
    _, logprobs, entropies, gradient = exchanges(Mesh(), 100)
    for chunk_tokens in (2, 100):
        for calls, *theirs in on_ranks(exchanges, chunk_tokens, tp=4):
            assert calls == 2  # the numbers of each token, the gradient
            for ours, other in zip((logprobs, entropies, gradient), theirs, strict=True):
                torch.testing.assert_close(other, ours, rtol=1e-5, atol=1e-5)


def vanish(mesh: Mesh) -> float:
    """The second rank ends without a word; how many seconds the first one waits for it."""
    began_s = time.monotonic()
    if mesh.tp.rank == 1:
        os._exit(7)
    try:
        mesh.tp.sum(torch.ones(4))
    except RuntimeError:
        return time.monotonic() - began_s
    raise AssertionError("nobody was there to add up with")


def test_rank_that_dies_fails_the_others_long_before_the_deadline() -> None:
    waited_s, _ = on_ranks(vanish, tp=2, dying=[1])
    assert waited_s < TIMEOUT_S / 2


def test_groups_are_shared_by_tokens_and_everybody_gets_one() -> None:
    assert share_groups([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert share_groups([4, 4, 4, 4], 2) == [[0, 2], [1, 3]]
    assert share_groups([9, 1], 2) == [[0], [1]]
    assert share_groups([3, 2, 1], 1) == [[0, 1, 2]]


def test_sizes_that_do_not_split_name_those_that_do() -> None:
    config = replace(TINY, num_heads=8, num_kv_heads=4, intermediate_size=24)
    config.check_split(4)
    with pytest.raises(ValueError, match=r"learner.tensor_parallel \(3\) must divide .*num_key_value_heads 4.*set it to one of 1, 2, 4"):
        config.check_split(3)


def test_rank_of_the_learners_own_tests_is_a_mesh_of_one() -> None:
    assert rank_of()._mesh == Mesh()
    assert tiny_decoder().tp.size == 1
