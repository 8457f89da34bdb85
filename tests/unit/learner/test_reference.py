"""The frozen reference policy of a KL term, across updates and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_world import dense_logprobs, outcome, rank_of, reference, synthetic_groups

from dapo_async.learner import LearnerRank, save_state
from dapo_async.model import Mesh

FORM: dict[str, Any] = {"algorithm": {"kl_coef": 0.5}, "num_minibatches": 2}


def test_the_estimate_is_of_the_frozen_policy_after_every_update() -> None:
    groups, frozen = synthetic_groups(), reference()
    rank = rank_of(**FORM)
    rank.step(groups)
    pairs = [(group, rollout) for group in groups for rollout in group.rollouts]

    def logprobs(decoder: Any) -> np.ndarray[Any, Any]:
        parts = [
            dense_logprobs(
                decoder, group.prompt.token_ids, rollout.completion.token_ids, group.temperature
            )[0]
            for group, rollout in pairs
        ]
        return torch.cat(parts).detach().numpy()

    rank._learner = rank_of(**FORM | {"num_minibatches": 1})._learner
    gap = logprobs(rank.decoder) - logprobs(frozen)
    metrics = outcome(rank, groups).metrics
    assert metrics["reference_kl"] == pytest.approx((np.exp(-gap) - 1 + gap).mean(), rel=1e-4)
    assert metrics["reference_kl"] > 0.01


def test_no_reference_is_kept_and_no_number_is_named_without_a_kl_term() -> None:
    rank = rank_of()
    assert rank._reference is None
    assert "reference_kl" not in outcome(rank, synthetic_groups()).metrics


def saved(rank: LearnerRank, folder: Path) -> Path:
    save_state(rank.capture_state(), folder, Mesh())
    return folder


def test_a_resumed_rank_keeps_the_base_model_as_its_reference(tmp_path: Path) -> None:
    groups, rank, resumed = synthetic_groups(), rank_of(**FORM), rank_of(**FORM)
    rank.step(groups)
    resumed.load(saved(rank, tmp_path))
    expected, done = outcome(rank, groups), outcome(resumed, groups)
    assert done.metrics == expected.metrics
    assert all(torch.equal(each, done.weights[name]) for name, each in expected.weights.items())


def test_a_resume_with_another_base_model_is_refused(tmp_path: Path) -> None:
    folder = saved(rank_of(**FORM), tmp_path)
    other = rank_of(**FORM)
    other._reference_sum = "0" * 16
    with pytest.raises(ValueError, match="the reference policy of the KL term has changed: the "):
        other.load(folder)
    rank_of().load(folder)  # without a KL term nothing is compared
