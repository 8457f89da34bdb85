"""Law 4 over ranks: tensor- and data-parallel gloo processes come to the single process's losses, gradients and weights; float32."""

from __future__ import annotations

import os
import time
from dataclasses import replace
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
from dapo_async.model import Decoder, Mesh, ModelConfig, PackedAttention, split_dim, token_logprobs
from dapo_async.types import FinishReason, Group

pytestmark = pytest.mark.gloo
MESHES = ((1, 2), (2, 1), (2, 2))  # dp, tp
# Odd sizes: 23 tokens of vocabulary on two ranks are 12 and 11; every family's extras: biases, norms of queries and keys, an untied head.
EXTRAS: dict[str, dict[str, Any]] = {
    "tied with biases": {},
    "norms of heads": {"family": "qwen3", "qkv_bias": False, "qk_norm": True},
    "untied": {"tie_embeddings": False},
}
FORMS = (
    {"learner": {}},
    {"learner": {"num_minibatches": 3, "microbatch_tokens": 20}},
    {"learner": {"num_minibatches": 2}, "algorithm": {"second_moment": 0.04, "overlong_filtering": True}},
    {"learner": {"num_minibatches": 2}, "algorithm": {"objective": "gspo"}},
)
REL = 2e-5  # of losses and gradient norms in the first step; later steps hand on rounding, amplified by AdamW


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
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}
    return logprobs.detach(), entropies, gradients


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
    from dapo_async.model import decoder

    config = replace(TINY, num_kv_heads=2)
    _, _, gradients = forward_and_backward(Mesh(), config)
    monkeypatch.setattr(decoder, "copy_to", lambda x, axis: x)  # f forgotten: the ranks' gradients are parts only
    (_, _, theirs), _ = on_ranks(forward_and_backward, config, tp=2)
    assert (theirs["model.norm.weight"] - gradients["model.norm.weight"]).abs().max() < 1e-5  # above the last split layer all is well
    name = "model.layers.0.input_layernorm.weight"
    assert (theirs[name] - gradients[name]).abs().max() > 1e-3


def three_steps(mesh: Mesh, form: dict[str, Any]) -> tuple[list[Any], dict[str, torch.Tensor] | None]:
    """Metrics of three steps on the rank's share, and the whole state afterwards."""
    config = replace(TINY, num_kv_heads=2)
    learner = Learner(**{"lr": LR, "warmup_steps": 0, "grad_clip": 0.5, **form["learner"]})
    algorithm = Algorithm(**form.get("algorithm", {}))
    rank = LearnerRank(decoder_of(config, mesh), algorithm=algorithm, learner=learner, seed=0, version=VERSION, mesh=mesh)
    groups = uneven_groups()
    positions = share_groups([group.num_tokens for group in groups], mesh.dp.size)[mesh.dp.rank]
    share = [groups[position] for position in positions]
    steps = [rank.step(share, positions=positions, num_groups=len(groups)) for _ in range(3)]
    return steps, rank.full_state()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("dp", "tp"), MESHES)
def test_three_steps_of_several_ranks_equal_those_of_one(dp: int, tp: int, form: dict[str, Any]) -> None:
    expected, weights = three_steps(Mesh(), form)
    answers = on_ranks(three_steps, form, dp=dp, tp=tp)
    for step in range(3):
        per_dp = [steps[step] for steps, _ in answers[::tp]]
        ours, theirs = summarise(expected[step]), summarise(sum(per_dp[1:], start=per_dp[0]))
        tolerance = REL * 30**step
        assert ours.keys() == theirs.keys()
        # Fractions count single tokens: one that lies at a clip's edge may fall on its other side.
        named = {name for name in ours if not name.endswith("_fraction")} if step else ours.keys()
        assert {name: theirs[name] for name in named} == pytest.approx({name: ours[name] for name in named}, rel=tolerance, abs=tolerance)
    assert weights is not None
    assert [state is None for _, state in answers] == [False] + [True] * (dp * tp - 1)
    for name, tensor in answers[0][1].items():
        if name.startswith("weights."):
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0.05 * LR, msg=name)
    for steps, _ in answers[1:]:  # all ranks of one tensor-parallel axis say the same
        assert [each.maxima["lr"] for each in steps] == [each.maxima["lr"] for each in answers[0][0]]


def test_gradient_of_each_rank_over_its_own_tokens_only_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_async.learner import rank

    expected, _ = three_steps(Mesh(), FORMS[0])
    monkeypatch.setattr(rank, "sum_numbers", lambda values, mesh, device: list(values))  # law 4 broken: the denominator is local
    answers = on_ranks(three_steps, FORMS[0], dp=2)
    norm = summarise(answers[0][0][0])["grad_norm"]
    assert norm != pytest.approx(summarise(expected[0])["grad_norm"], rel=1e-2)


def save_and_go_on(mesh: Mesh, state: dict[str, torch.Tensor] | None) -> tuple[Any, dict[str, torch.Tensor] | None]:
    config = replace(TINY, num_kv_heads=2)
    learner = Learner(lr=LR, warmup_steps=0, num_minibatches=2)
    rank = LearnerRank(decoder_of(config, mesh), algorithm=Algorithm(), learner=learner, seed=0, version=VERSION, mesh=mesh)
    groups = uneven_groups()
    if state is None:
        rank.step(groups)
        return None, rank.full_state()
    rank.load_state(state)
    rank.version = VERSION + 1
    metrics = rank.step(groups)
    return metrics, rank.full_state()


def test_state_of_two_ranks_loads_bit_for_bit_and_at_another_size() -> None:
    (_, state), _ = on_ranks(save_and_go_on, None, tp=2)
    (first, after), _ = on_ranks(save_and_go_on, state, tp=2)
    (again, once_more), _ = on_ranks(save_and_go_on, state, tp=2)
    assert first == again
    assert all(torch.equal(tensor, once_more[name]) for name, tensor in after.items())
    alone, _ = save_and_go_on(Mesh(), state)
    assert summarise(alone)["loss"] == pytest.approx(summarise(first)["loss"], rel=1e-4, abs=1e-6)


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
