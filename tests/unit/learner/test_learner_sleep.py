"""A learner rank gives its device memory away and trains on as if it never had."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from learner_world import outcome, rank_of, synthetic_groups

from dapo_async.learner import LearnerRank


def storages(rank: LearnerRank) -> list[int]:
    """Bytes of every float tensor of the rank: weights, moments, kept weights, rotary tables."""
    kept = [rank._start_weights, *([rank._reference] if rank._reference else [])]
    tensors = [
        *rank.decoder.parameters(),
        *rank.decoder.buffers(),
        *rank._optimizer.tensors(),
        *(shard for each in kept for shard in each.shards),
    ]
    return [each.untyped_storage().nbytes() for each in tensors]


@pytest.mark.parametrize(
    "form", [{}, {"num_minibatches": 2}, {"algorithm": {"kl_coef": 0.1}}], ids=str
)
def test_steps_with_sleeps_between_them_change_no_bit(form: dict[str, Any]) -> None:
    groups = synthetic_groups()
    awake, sleeper = rank_of(**form), rank_of(**form)
    outcome(awake, groups)
    expected = outcome(awake, groups)

    outcome(sleeper, groups)
    sleeper.sleep()
    sleeper.wake()
    got = outcome(sleeper, groups)

    assert got.metrics == expected.metrics
    assert all(torch.equal(got.weights[name], each) for name, each in expected.weights.items())
    for ours, theirs in zip(got.first_moments, expected.first_moments, strict=True):
        assert torch.equal(ours, theirs)


def test_a_sleeping_rank_holds_no_memory_on_its_device() -> None:
    rank = rank_of(num_minibatches=2, algorithm={"kl_coef": 0.1})
    rank.step(synthetic_groups())
    awake = storages(rank)
    assert min(awake) > 0
    known = {id(each) for each in gc.get_objects() if type(each) is torch.Tensor}

    rank.sleep()

    assert rank.asleep
    assert storages(rank) == [0] * len(awake)
    new = [
        each
        for each in gc.get_objects()
        if type(each) is torch.Tensor and id(each) not in known and each.dtype != torch.uint8
    ]
    assert sum(each.numel() for each in new) == 0  # only the bytes on the host are new
    rank.sleep()  # nothing is left to be done
    rank.wake()
    assert storages(rank) == awake


def test_a_checkpoint_of_a_sleeping_rank_is_the_one_of_a_rank_that_is_awake() -> None:
    rank = rank_of()
    rank.step(synthetic_groups())
    before = rank.capture_state()
    rank.sleep()
    asleep = rank.capture_state()

    assert (asleep.version, asleep.updates) == (before.version, before.updates)
    assert asleep.parts.keys() == before.parts.keys()
    for name, part in before.parts.items():
        assert torch.equal(asleep.parts[name].tensor, part.tensor)
    rank.wake()
    assert not rank.asleep


def test_a_rank_does_not_sleep_in_the_midst_of_a_step() -> None:
    rank = rank_of(num_minibatches=2)
    rank.minibatch(synthetic_groups()[:2], more=True)
    with pytest.raises(AssertionError, match="is open"):
        rank.sleep()
