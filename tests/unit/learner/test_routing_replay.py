"""Routing replay: the learner uses the experts that the engine chose, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_engine_world import group, run, tiny_decoder
from torch import Tensor

from dapo_async.algorithm import summarise
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank
from dapo_async.learner.metrics import ExpertLoad
from dapo_async.model import Decoder, Mesh, PackedAttention, take_snapshot
from dapo_async.model.mixture import Routing
from dapo_async.replay.group_io import (
    pack_group,
    read_groups,
    take_rollouts,
    unpack_group,
    write_groups,
)
from dapo_async.rollout import EngineFault
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.sglang.stream import ResponseStream, joined
from dapo_async.types import Completion, FinishReason, Group, Prompt, Rollout

Experts = np.ndarray[Any, np.dtype[Any]] | None
PROMPTS = ([5, 6, 7], [1], [9, 9, 30, 2])
FAMILY = "qwen3_moe"


def same(one: Experts, other: Experts) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and bool(np.array_equal(one, other))


def generated(engine: TorchEngine) -> list[Group]:
    """Three groups of three on four slots."""
    requests = [
        group(key, prompt, siblings=3, max_tokens=20, stop=tuple(range(55, 61)))
        for key, prompt in enumerate(PROMPTS)
    ]
    finished = run(engine, *requests)
    groups = []
    for request in requests:
        rollouts = tuple(
            Rollout(completion, "", 0.0, float(number), None)
            for number, completion in enumerate(finished[request.group_id])
        )
        prompt = Prompt(request.group_id, "", request.prompt_ids, "")
        groups.append(Group(request.group_id, prompt, rollouts, "first", 1.0))
    return groups


def engine_of(decoder: Decoder) -> TorchEngine:
    return TorchEngine(decoder, num_slots=4, max_len=64, returns_experts=True)


def mismatch(decoder: Decoder, groups: list[Group], *, replay: bool) -> dict[str, float]:
    rank = LearnerRank(
        decoder,
        algorithm=AlgorithmConfig(),
        learner=LearnerConfig(microbatch_tokens=40, routing_replay=replay),
    )
    return summarise(rank.step(groups))


@contextmanager
def flipped_choices() -> Iterator[None]:
    """Routers choose the neighbours of their experts for every second token of a pass."""
    original = Routing.experts

    def experts(self: Routing, number: int, own: Tensor) -> Tensor:
        flipped = own.clone()
        flipped[::2] = (own[::2] + 1) % 6
        return original(self, number, flipped)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Routing, "experts", experts)
        yield


def test_with_replay_the_learner_agrees_with_an_engine_whose_choices_were_flipped() -> None:
    with flipped_choices():
        groups = generated(engine_of(tiny_decoder(FAMILY)))
    completion = groups[0].rollouts[1].completion
    assert completion.experts is not None
    assert completion.prompt_experts is not None
    assert completion.experts.shape == (len(completion.token_ids), 2, 2)
    assert completion.prompt_experts.shape == (2, 2, 2)
    assert completion.experts.dtype == np.uint8
    replayed = mismatch(tiny_decoder(FAMILY), groups, replay=True)
    free = mismatch(tiny_decoder(FAMILY), groups, replay=False)
    assert replayed["behaviour_log_ratio_max"] <= 1e-5
    assert replayed["experts_replaced"] > 0.2
    assert free["behaviour_log_ratio_max"] > 0.1
    assert free["experts_replaced"] == 0


def test_with_replay_bfloat16_noise_flips_no_choice() -> None:
    """The engine computes in bfloat16, the learner with the same weights in float32."""
    engine = engine_of(tiny_decoder(FAMILY, num_experts=32, num_experts_per_tok=4).bfloat16())
    groups = generated(engine)

    def learner() -> Decoder:
        decoder = tiny_decoder(FAMILY, num_experts=32, num_experts_per_tok=4)
        return decoder.bfloat16().float()

    replayed, free = (mismatch(learner(), groups, replay=replay) for replay in (True, False))
    assert replayed["experts_replaced"] > 0, "no choice lay within the noise"
    gap, without = replayed["behaviour_log_ratio_max"], free["behaviour_log_ratio_max"]
    assert gap < without / 2


def test_tokens_keep_the_choices_of_the_version_that_sampled_them() -> None:
    engine = engine_of(tiny_decoder(FAMILY))
    request = group(0, [3, 4, 5], siblings=2, max_tokens=12)
    engine.submit(request)
    for _ in range(6):
        engine.step()
    weights = take_snapshot(tiny_decoder(FAMILY, seed=2), version=1, probe_tokens=1).copy.whole()
    engine.update_weights(weights, version=1, probe_ids=np.arange(4, dtype=np.int32))
    finished: list[Completion] = []
    while engine.has_work:
        for _, completions in engine.step():
            finished += completions
    assert len(finished) == 2
    for completion in finished:
        ids = torch.tensor([3, 4, 5, *completion.token_ids.tolist()])[:-1]
        attention = PackedAttention([len(ids)])
        of_version = []
        for seed in (1, 2):
            routing = Routing()
            tiny_decoder(FAMILY, seed=seed)(ids, attention.positions, attention, routing)
            of_version.append(routing.chosen().numpy()[2:].astype(np.uint8))
        assert set(completion.weight_versions.tolist()) == {0, 1}
        expected = np.stack(
            [of_version[version][n] for n, version in enumerate(completion.weight_versions)]
        )
        assert same(completion.experts, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_experts_travel_with_the_group_and_are_stored(dtype: type, tmp_path: Path) -> None:
    (first, second, _), random = (
        generated(engine_of(tiny_decoder(FAMILY))),
        np.random.default_rng(0),
    )
    rollouts = []
    for number, rollout in enumerate(first.rollouts):
        experts: Any = random.integers(0, 300, (rollout.num_tokens, 3, 2)).astype(dtype)
        of_prompt: Any = np.arange(2 * 3 * 2).reshape(2, 3, 2).astype(dtype)
        completion = replace(
            rollout.completion,
            experts=None if number == 1 else experts,  # an engine may have returned none
            prompt_experts=of_prompt,
        )
        rollouts.append(replace(rollout, completion=completion))
    groups = [replace(first, rollouts=tuple(rollouts)), second]
    write_groups(tmp_path / "groups", groups)
    packed = [unpack_group(pack_group(each)) for each in groups]
    for read in (packed, read_groups(tmp_path / "groups")):
        for one, other in zip(groups, read, strict=True):
            for mine, theirs in zip(one.rollouts, other.rollouts, strict=True):
                for name in ("token_ids", "experts", "prompt_experts"):
                    ours = getattr(mine.completion, name)
                    assert same(ours, getattr(theirs.completion, name)), name
    part = unpack_group(take_rollouts(pack_group(groups[0]), [2]))
    (kept,) = part.rollouts
    assert same(kept.completion.experts, rollouts[2].completion.experts)
    assert same(kept.completion.prompt_experts, rollouts[0].completion.prompt_experts)


def test_experts_of_a_server_are_checked_and_a_continued_response_has_new_ones() -> None:
    model = tiny_decoder(FAMILY, mlp_only_layers=[0]).config  # a server has rows for all layers
    every = np.arange(6 * 2 * 2, dtype=np.int32).reshape(6, 2, 2) % 6
    stream = ResponseStream("name", prompt_tokens=5, sent_version=0)
    stream.token_ids, stream.logprobs, stream.versions = [7, 8], [-1.0, -2.0], [0, 0]
    with pytest.raises(EngineFault, match="--enable-return-routed-experts"):
        stream.take_experts(None, model)
    with pytest.raises(EngineFault, match=r"returned 20 experts instead of \(6, 2, 2\)"):
        stream.take_experts(every[:5].tobytes(), model)
    with pytest.raises(EngineFault, match="beyond the model's 6"):
        stream.take_experts((every + 1).tobytes(), model)
    stream.take_experts(every.tobytes(), model)
    rest = stream.partial()
    assert rest.experts is not None
    assert same(rest.experts, every[4:, 1:].astype(np.uint8))
    partial = Completion(
        np.array([1, 2], np.int32),
        np.zeros(2, np.float32),
        np.zeros(2, np.int32),
        0,
        FinishReason.ABORT,
    )
    whole = joined(partial, rest)
    assert same(whole.prompt_experts, every[:2, 1:].astype(np.uint8))
    assert same(whole.experts, every[2:, 1:].astype(np.uint8))


def test_load_counts_the_most_used_and_the_unused_experts_of_each_layer() -> None:
    model = tiny_decoder(FAMILY).config
    routing, load = Routing(), ExpertLoad(model)
    routing.experts(0, torch.tensor([[0, 1], [0, 2], [0, 1]]))
    routing.experts(1, torch.tensor([[0, 1], [2, 3], [4, 5]]))
    load.add(routing)
    values = load.metrics(load.whole(Mesh()).tolist()).flat()
    assert values == pytest.approx(
        {
            "expert_load.0": 3.0,
            "expert_load.1": 1.0,
            "expert_load_max": 3.0,
            "experts_dead.0": 0.5,
            "experts_dead.1": 0.0,
            "experts_dead_max": 0.5,
            "experts_replaced": 0.0,
        }
    )
