"""Learner and native engine take turns on one device: what each frees, and how it goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_place import Place
from native_engine_world import group, run

from dapo_async.bench.made_up import made_up_group
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank
from dapo_async.rollout.native.engine import TorchEngine

pytestmark = pytest.mark.gpu
LEFT_BYTES = 128 * 2**20  # tables of slots, and cuBLAS's workspaces, 32 MiB per thread on H100


def allocated(place: Place) -> int:
    return torch.cuda.memory_allocated() if place.on_gpu else 0


def test_an_engine_leaves_the_device_and_continues_its_responses(place: Place) -> None:
    requests = [group(key, range(1, 9), siblings=2, max_tokens=12) for key in range(3)]
    before = allocated(place)
    engine = TorchEngine(place.decoder(), num_slots=4, max_len=place.length)
    awake = run(engine, *requests)
    for request in requests:
        engine.submit(request)
    finished = dict(engine.step())
    engine.sleep()
    assert allocated(place) - before <= LEFT_BYTES
    assert {each.untyped_storage().nbytes() for each in engine.weights().values()} == {0}
    engine.wake()
    while engine.has_work:
        finished.update(engine.step())
    for key, completions in awake.items():
        for ours, theirs in zip(finished[key], completions, strict=True):
            assert ours.token_ids[0] == theirs.token_ids[0]
            assert len(ours.token_ids) == len(theirs.token_ids)


def test_a_rank_leaves_the_device_and_comes_back_the_same(place: Place) -> None:
    lengths = np.linspace(place.length // 4, place.length // 2, 4).astype(np.int64)
    vocabulary = place.sizes["vocab_size"]
    groups = [made_up_group(key, lengths, prompt_tokens=6, vocabulary=vocabulary) for key in (0, 1)]
    knobs = LearnerConfig(lr=1e-3, warmup_steps=0, microbatch_tokens=4 * place.length)
    before = allocated(place)
    rank = LearnerRank(place.decoder(), algorithm=AlgorithmConfig(), learner=knobs)
    rank.step(groups)
    state = rank.capture_state()
    rank.sleep()
    assert allocated(place) - before <= LEFT_BYTES
    rank.wake()
    for name, part in rank.capture_state().parts.items():
        assert torch.equal(part.tensor, state.parts[name].tensor)
    rank.step(groups)
    assert rank.version == 2
