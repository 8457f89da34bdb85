"""Learner ranks that train the same batch in several layouts, to be compared with a single rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from float64_learner import Float64Learner
from gloo import on_ranks
from learner_world import (
    LR,
    TINY,
    VERSION,
    PromptPerRollout,
    synthetic_groups,
)
from torch.distributed.tensor import DTensor

from dapo_async.algorithm import summarise
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank, read_whole_state, save_state
from dapo_async.learner.batching import pack_share
from dapo_async.learner.gradients import sum_gradients
from dapo_async.learner.rerun import LAYOUT_METRICS
from dapo_async.model import (
    Decoder,
    Mesh,
    ModelConfig,
    PackedAttention,
    build_decoder,
    fill,
    own_targets,
    reshard,
    score_tokens,
    shard_of,
)
from dapo_async.types import FinishReason, Group, StepMetrics

# A dense layer, and one whose experts are divided over the ranks.
MIXTURE: dict[str, Any] = {
    "family": "qwen3_moe",
    "qkv_bias": False,
    "qk_norm": True,
    "num_experts": 6,
    "experts_per_token": 2,
    "expert_size": 20,
    "norm_topk": True,
    "mixture_layers": (1,),
}
# Sizes do not divide: 23 tokens of vocabulary are 12 and 11 on two ranks. The families differ in
# biases, norms of queries and keys, an untied head, and one key-value head for both ranks.
EXTRAS: dict[str, dict[str, Any]] = {
    "tied with biases": {},
    "norms of heads": {"family": "qwen3", "qkv_bias": False, "qk_norm": True},
    "untied": {"tie_embeddings": False},
    "fewer heads of keys than ranks": {"num_kv_heads": 1},
    "experts": MIXTURE,
}
CONFIG = replace(TINY, num_kv_heads=2)
FORMS: tuple[dict[str, Any], ...] = (
    {"learner": {}},
    {
        "learner": {
            "num_minibatches": 2,
            "microbatch_tokens": 20,
            "recompute": "mlp",
            "zero_stage": 1,
        }
    },
    {
        "learner": {"num_minibatches": 2, "offload_optimizer": True, "zero_stage": 2},
        "algorithm": {
            "correction": "m2po",
            "overlong_filtering": True,
            "kl_coef": 0.5,
            "kl_estimator": "k2",
        },
    },
    {
        "learner": {"num_minibatches": 2},
        "algorithm": {"objective": "gspo", "entropy_bonus": 0.1},
        "model": {"num_kv_heads": 1},
    },
    {
        "learner": {"num_minibatches": 2},
        "algorithm": {"loss_mean": "sequence", "overlong_filtering": True, "kl_coef": 0.5},
    },
    # In the first of two minibatches no rank has a token in the loss.
    {
        "learner": {"num_minibatches": 2},
        "algorithm": {"overlong_filtering": True},
        "num_silent": 2,
    },
    # One rollout per microbatch: truncated ones have no token in the loss.
    {
        "learner": {"microbatch_tokens": 1, "recompute": "all", "zero_stage": 2},
        "algorithm": {"overlong_filtering": True},
        "model": {"tie_embeddings": False},
    },
    # Nine rollouts in passes of one each: on two ranks the last pass of one is a filler.
    {
        "learner": {"microbatch_tokens": 1, "zero_stage": 1},
        "algorithm": {"objective": "gspo", "sequence_band": (0.9, 1.1)},
        "num_groups": 3,
    },
)
# Tolerance of all metrics in float32 over three steps: relative, or absolute for values below 1.
REL = 2e-5


def dense_decoder(config: ModelConfig) -> Decoder:
    """Random, and the same on every rank."""
    torch.manual_seed(3)
    dense = Decoder(config)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else parameter.add_(
                torch.randn_like(parameter) * 0.1
            )
    return dense


def decoder_of(
    config: ModelConfig, mesh: Mesh, *, activations: torch.dtype | None = None
) -> Decoder:
    """This rank's part of the dense decoder."""
    weights = dict(dense_decoder(config).named_parameters())
    decoder = build_decoder(config, mesh=mesh, activations=activations)
    fill(decoder, lambda name, part: weights[name][part])
    return decoder


def uneven_groups(num_silent: int = 1) -> list[Group]:
    """Lengths from 1 to 12; overlong filtering leaves `num_silent` groups without a token in the
    loss: the second one, or the first two."""
    groups = synthetic_groups()
    for number in (1, 0)[:num_silent]:
        silent = tuple(
            replace(each, completion=replace(each.completion, finish_reason=FinishReason.LENGTH))
            for each in groups[number].rollouts
        )
        groups[number] = replace(groups[number], rollouts=silent)
    return groups


def forward_and_backward(
    mesh: Mesh, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Logprobs, entropies, and the whole gradients; 17 tokens, which two ranks share as 9 and 8."""
    decoder = decoder_of(config, mesh)
    random = np.random.default_rng(0)
    lengths = (3, 5, 9)
    ids = torch.from_numpy(random.integers(0, config.vocab_size, sum(lengths)))
    attention = PackedAttention(lengths)
    temperatures = torch.linspace(0.7, 1.3, len(ids) - 1)
    predictors = torch.arange(len(ids) - 1)
    logprobs, entropies = decoder.score(
        ids,
        attention.positions,
        attention,
        predictors=predictors,
        targets=ids[1:],
        temperatures=temperatures,
        own=own_targets(predictors, len(ids), mesh.cp) if mesh.cp.size > 1 else None,
    )
    objective = (
        logprobs * torch.linspace(-1, 1, len(logprobs))
        + entropies * torch.linspace(0.5, -1, len(logprobs))
    ).sum()
    (objective / mesh.dp.size).backward()  # ranks of one dp axis had the same tokens
    sum_gradients(decoder, mesh)
    gradients = {
        name: whole(parameter.grad)
        for name, parameter in decoder.named_parameters()
        if parameter.grad is not None
    }
    return logprobs.detach(), entropies.detach(), gradients


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rank_on(
    mesh: Mesh,
    *,
    kind: type[LearnerRank] = LearnerRank,
    algorithm: dict[str, Any] | None = None,
    activations: torch.dtype | None = None,
    model: dict[str, Any] | None = None,
    **learner: Any,
) -> LearnerRank:
    knobs = LearnerConfig(**{"lr": LR, "warmup_steps": 0, "grad_clip": 0.5, **learner})
    decoder = decoder_of(replace(CONFIG, **(model or {})), mesh, activations=activations)
    return kind(
        decoder,
        algorithm=AlgorithmConfig(**(algorithm or {})),
        learner=knobs,
        version=VERSION,
        mesh=mesh,
    )


def step_on(rank: LearnerRank, mesh: Mesh, groups: list[Group]) -> StepMetrics:
    """One step on the rank's share of the groups."""
    size, metrics = len(groups) // rank._learner.num_minibatches, StepMetrics()
    for first in range(0, len(groups), size):
        part, more = groups[first : first + size], first + size < len(groups)
        metrics = metrics + rank.minibatch(part, more=more)
    rank.end_step()
    return metrics


@dataclass
class Trained:
    """What a rank has after three steps."""

    steps: list[StepMetrics]
    weights: dict[str, torch.Tensor]  # whole


def three_steps(mesh: Mesh, form: dict[str, Any], kind: type[LearnerRank] = LearnerRank) -> Trained:
    rank = rank_on(
        mesh, kind=kind, algorithm=form.get("algorithm"), model=form.get("model"), **form["learner"]
    )
    groups = uneven_groups(form.get("num_silent", 1))[: form.get("num_groups")]
    steps = [step_on(rank, mesh, groups) for _ in range(3)]
    return Trained(
        steps,
        {name: whole(parameter.detach()) for name, parameter in rank.decoder.named_parameters()},
    )


def check_ranks_agree(ranks: list[Trained], *, per_batch: int) -> None:
    """Ranks agree bit for bit in gradient norm and weights, and count the flags of a step once.

    `per_batch` ranks train on the same groups.
    """
    for number, rank in enumerate(ranks):
        assert [each.sums.get("grad_norm", (0, 0))[0] for each in rank.steps] == [
            each.sums.get("grad_norm", (0, 0))[0] for each in ranks[0].steps
        ]
        for name, tensor in rank.weights.items():
            assert torch.equal(tensor, ranks[0].weights[name]), f"{name} on rank {number}"
        assert all(("skipped" in each.totals) == (number < per_batch) for each in rank.steps)


def start_logprobs(mesh: Mesh) -> tuple[int, bool, bool]:
    """After an update: how many logprobs the proximal pass gives, whether these are those of before
    the update, and whether the pass has changed no weight."""
    rank, groups = rank_on(mesh, num_minibatches=2, microbatch_tokens=20), uneven_groups()

    def weights() -> list[torch.Tensor]:
        return [shard_of(each).clone() for each in rank.decoder.parameters()]

    share = rank.share_of(groups[2:])
    parts = [each.part_of(groups[2:][each.position]) for each in share.groups]
    batches = pack_share(rank._sequences(parts, share), share, cp=mesh.cp)
    with torch.no_grad():
        before = [rank._forward(batch)[0] for batch in batches]
    reshard(rank.decoder)
    rank.minibatch(groups[:2], more=True)
    updated = weights()
    again = [*rank._recompute(batches, first=False).values()]
    return (
        sum(len(each) for each in again),
        all(map(torch.equal, before, again)),
        all(map(torch.equal, updated, weights())),
    )


def go_on(mesh: Mesh, folder: Path, load: Path | None) -> tuple[StepMetrics, StepMetrics]:
    """A first step, or a loaded state instead; then a second step, whose metrics are returned.

    Saves the state into `folder`/before and `folder`/after the second step.
    """
    rank = rank_on(mesh, num_minibatches=2)
    if load is None:
        step_on(rank, mesh, uneven_groups())
    else:
        score_tokens(
            rank.decoder, np.arange(5, dtype=np.int32)
        )  # what was gathered for it is no longer true afterwards
        rank.load(load)
    save_state(rank.capture_state(), folder / "before", mesh)
    metrics = step_on(rank, mesh, uneven_groups())
    save_state(rank.capture_state(), folder / "after", mesh)
    return metrics, metrics


def equal(one: Path, other: Path) -> bool:
    ours, theirs = read_whole_state(one), read_whole_state(other)
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


def check_decoder(config: ModelConfig, *, dp: int = 1, cp: int = 1, tp: int = 1) -> None:
    """A decoder on ranks has the logprobs, entropies and gradients of the whole one."""
    logprobs, entropies, gradients = forward_and_backward(Mesh(), config)
    for rank, (their_logprobs, their_entropies, theirs) in enumerate(
        on_ranks(forward_and_backward, config, dp=dp, cp=cp, tp=tp)
    ):
        torch.testing.assert_close(their_logprobs, logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(their_entropies, entropies, rtol=0, atol=1e-5)
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            gap = float((theirs[name] - gradient).abs().max() / gradient.abs().max())
            assert gap <= 1e-5, f"{name} on rank {rank}: {gap:.1e} of the largest gradient"


def check_three_steps(form: dict[str, Any], *, dp: int = 1, cp: int = 1, tp: int = 1) -> None:
    """Three steps of several ranks equal those of one.

    The ranks share the prompts of siblings; the single one does not.
    """
    alone = three_steps(Mesh(), form, PromptPerRollout)
    ranks = on_ranks(three_steps, form, dp=dp, cp=cp, tp=tp)
    check_ranks_agree(ranks, per_batch=cp * tp)
    for step in range(3):
        per_dp = [rank.steps[step] for rank in ranks[:: cp * tp]]
        ours, theirs = summarise(alone.steps[step]), summarise(sum(per_dp[1:], start=per_dp[0]))
        assert ours.keys() == theirs.keys()
        # Fractions count single tokens: one that lies at a clip's edge may fall on its other side.
        named = {
            name
            for name in ours
            if name not in LAYOUT_METRICS and not (name.endswith("_fraction") and step)
        }
        assert {name: theirs[name] for name in named} == pytest.approx(
            {name: ours[name] for name in named}, rel=REL, abs=REL
        )
        assert theirs["imbalance"] >= ours["imbalance"] == 1.0
    # Each update passes the rounding of gradients near 0 on to the next minibatch.
    tolerance = 0.005 * LR * form["learner"].get("num_minibatches", 1)
    for name, tensor in alone.weights.items():
        torch.testing.assert_close(ranks[0].weights[name], tensor, rtol=0, atol=tolerance, msg=name)


def check_against_float64(form: dict[str, Any], *, dp: int = 1, cp: int = 1, tp: int = 1) -> None:
    """Three steps equal those of `Float64Learner`, on one rank or several."""
    learner, algorithm = form["learner"], AlgorithmConfig(**form.get("algorithm", {}))
    config = replace(CONFIG, **form.get("model", {}))
    count = learner.get("num_minibatches", 1)
    naive = Float64Learner(
        config,
        dict(dense_decoder(config).named_parameters()),
        algorithm,
        lr=LR,
        weight_decay=LearnerConfig().weight_decay,
        grad_clip=0.5,
        num_minibatches=count,
    )
    # AdamW passes the rounding of gradients near 0, as those of seldom used experts, on to later
    # steps.
    later, most = (1e-3, 0.01) if config.num_experts else (REL, 0.004)
    ranks = (
        on_ranks(three_steps, form, dp=dp, cp=cp, tp=tp)
        if dp * cp * tp > 1
        else [three_steps(Mesh(), form)]
    )
    for step in range(3):
        expected = naive.step(uneven_groups())
        per_dp = [rank.steps[step] for rank in ranks[:: cp * tp]]
        measured = summarise(sum(per_dp[1:], start=per_dp[0]))
        assert {name: measured[name] for name in expected} == pytest.approx(
            expected, rel=later if step else REL, abs=later if step else REL
        )
    for name, tensor in naive.weights.items():
        # A single number whose gradient is near 0 may be off by more.
        gap = float((ranks[0].weights[name].double() - tensor).square().mean().sqrt())
        assert gap <= most * LR * count, f"{name}: {gap / LR / count:.1e} of an update"
