"""Learner and native engine on one device in one process."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from gpu import mesh_of_one
from gpu_learner import ONE, groups_of, rank_on
from gpu_place import Place, distance
from native_engine_world import group, run
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.algorithm import summarise
from dapo_async.bench.made_up import made_up_group
from dapo_async.model import (
    Decoder,
    Mesh,
    PackedAttention,
    build_decoder,
    checksum,
    fill,
    predict_memory,
    score_tokens,
    shard_of,
    take_snapshot,
)
from dapo_async.rollout import GroupRequest
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.types import Completion, Group, Prompt, Rollout

pytestmark = pytest.mark.gpu
# Nats between engine and learner: their kernels round differently.
FLOAT_BOUND, HALF_BOUND = 1e-3, 0.15


def requests_of(place: Place) -> list[GroupRequest]:
    tokens = place.length // 2
    return [
        group(0, [5, 6, 7], siblings=3, max_tokens=tokens),
        group(1, [8], siblings=2, max_tokens=tokens // 2),
        group(2, range(20), siblings=4, max_tokens=tokens),
    ]


def with_rewards(
    requests: Sequence[GroupRequest], done: dict[int, tuple[Completion, ...]]
) -> list[Group]:
    groups = []
    for request in requests:
        prompt = Prompt(request.group_id, "", request.prompt_ids, "")
        rollouts = tuple(
            Rollout(completion, "", float(number % 2), float(number % 2), None)
            for number, completion in enumerate(done[request.group_id])
        )
        groups.append(Group(request.group_id, prompt, rollouts, "first", 1.0))
    return groups


@torch.no_grad()
def logprobs_of(
    decoder: Decoder, request: GroupRequest, completion: Completion
) -> NDArray[np.float32]:
    """`[T]` of the response tokens, by one packed forward pass."""
    device = decoder.rope_cos.device
    ids = torch.tensor([*request.prompt_ids, *completion.token_ids], device=device)
    attention = PackedAttention([len(ids)], device=device)
    first = len(request.prompt_ids) - 1
    logprobs, _ = decoder.score(
        ids.long(),
        attention.positions,
        attention,
        predictors=torch.arange(first, len(ids) - 1, device=device),
        targets=ids[first + 1 :].long(),
        temperatures=torch.ones(len(completion.token_ids), device=device),
    )
    values: NDArray[np.float32] = logprobs.cpu().numpy()
    return values


def test_engine_gives_each_token_the_logprob_of_its_version(place: Place) -> None:
    decoder, swapped = place.decoder(), place.decoder(seed=2)
    engine = TorchEngine(place.decoder(), num_slots=4, max_len=2 * place.length)
    requests, finished = requests_of(place), dict[int, tuple[Completion, ...]]()
    for request in requests:
        engine.submit(request)
    for _ in range(3):
        finished.update(engine.step())
    engine.update_weights(
        swapped.state_dict(), version=1, probe_ids=np.arange(1, 9, dtype=np.int32)
    )
    finished |= run(engine)
    for request in requests:
        for completion in finished[request.group_id]:
            for version, weights in enumerate((decoder, swapped)):
                rows = completion.weight_versions == version
                expected = logprobs_of(weights, request, completion)
                np.testing.assert_allclose(
                    completion.behaviour_logprobs[rows], expected[rows], atol=FLOAT_BOUND, rtol=0
                )
    seen = {int(each) for done in finished.values() for c in done for each in c.weight_versions}
    assert 1 in seen


def test_loop_of_learner_and_engine_stays_on_policy(place: Place) -> None:
    """Generate, train, publish, three times. The engine computes in half precision."""
    learner_decoder = place.decoder()
    learner_decoder.activations = place.half
    learner = rank_on(place, learner_decoder)
    engine = TorchEngine(place.decoder().to(place.half), num_slots=8, max_len=2 * place.length)
    sums, gaps = [], []
    for version in range(3):
        snapshot = take_snapshot(
            learner_decoder, version=version, probe_tokens=16, dtype=place.half
        )
        report = engine.update_weights(
            snapshot.copy.whole(), version=version, probe_ids=snapshot.probe_ids
        )
        np.testing.assert_allclose(
            report.probe_after,
            score_tokens(learner_decoder, snapshot.probe_ids),
            atol=HALF_BOUND,
            rtol=0,
        )
        sums.append(checksum(engine.weights()))
        assert sums[-1] == checksum(snapshot.copy.whole())
        requests = requests_of(place)
        done = run(engine, *requests)
        metrics = summarise(learner.step(with_rewards(requests, done)))
        assert metrics["current_log_ratio_max"] == 0.0
        gaps.append(metrics["behaviour_log_ratio_max"])
        assert metrics["skipped"] == 0
    assert len(set(sums)) == 3
    assert max(gaps) <= 10 * HALF_BOUND  # nats, the worst of all tokens
    assert learner.version == 3


OPTIONS: dict[str, dict[str, Any]] = {
    "mlp computed again": {"recompute": "mlp"},
    "layers computed again": {"recompute": "all"},
    "optimizer on the host": {"offload_optimizer": True},
    "small passes": {"microbatch_tokens": 64},
    "kernels of the head": {"kernels": "head"},
    "all kernels": {"kernels": "all"},
}


@pytest.mark.parametrize("name", [*OPTIONS, "mesh of one"])
def test_options_of_the_learner_change_only_rounding(place: Place, name: str) -> None:
    def trained(mesh: Mesh = ONE, **learner: Any) -> tuple[Tensor, float]:
        decoder = place.decoder()
        if mesh is not ONE:
            weights = decoder.state_dict()
            decoder = build_decoder(
                decoder.config, mesh=mesh, device=place.device, dtype=torch.float32
            )
            fill(decoder, lambda key, part: weights[key][part])
        decoder.activations = place.half
        before = [shard_of(each).detach().clone() for each in decoder.parameters()]
        rank = rank_on(place, decoder, mesh=mesh, **learner)
        metrics = summarise(rank.step(groups_of(place)))
        after = [shard_of(each).detach() for each in decoder.parameters()]
        moved = [(new - old).flatten() for new, old in zip(after, before, strict=True)]
        return torch.cat(moved), metrics["grad_norm"]

    expected, norm = trained()
    mesh = mesh_of_one("cuda:0" if place.on_gpu else "cpu") if name == "mesh of one" else ONE
    found, found_norm = trained(mesh, **OPTIONS.get(name, {}))
    assert abs(found_norm - norm) <= 0.02 * norm
    # Adam's first update is the sign of the gradient: near 0 a rounding flips it.
    assert distance(found, expected) <= 0.3


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA device; tests/unit/model/test_memory.py measures the CPU form",
)
@pytest.mark.parametrize("recompute", ["none", "mlp", "all"])
def test_memory_is_as_predicted(place: Place, recompute: Any) -> None:
    length, rollouts = 2048, 8
    lengths = np.full(rollouts, length - 64)
    groups = [made_up_group(0, lengths, prompt_tokens=64, vocabulary=place.sizes["vocab_size"])]
    gc.collect()  # decoders that compute again are in reference cycles
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    decoder = place.decoder()
    decoder.activations = place.half
    rank = rank_on(place, decoder, microbatch_tokens=length * rollouts, recompute=recompute)
    rank.step(groups)
    torch.cuda.reset_peak_memory_stats()
    rank.step(groups)
    measured = torch.cuda.max_memory_allocated() - held
    predicted = predict_memory(
        decoder.config,
        num_tokens=64 + rollouts * (length - 64),
        num_attended=rollouts * length,
        num_targets=rollouts * (length - 64),
        activations=place.half,
        recompute=recompute,
        cuda=True,
    )
    expected = predicted.on_device - predicted.snapshot
    assert measured == pytest.approx(expected, rel=0.1)
