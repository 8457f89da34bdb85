"""A minibatch that breaks a rule, and one that does not fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from learner_world import rank_of, synthetic_groups
from torch import Tensor

from dapo_async.learner import LearnerRank
from dapo_async.learner.batch_plan import RankShare, halved
from dapo_async.learner.batching import Microbatch
from dapo_async.types import FinishReason, Group, StepMetrics


def parameters_of(rank: LearnerRank) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in rank.decoder.parameters()]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def all_cut() -> list[Group]:
    """24 rollouts, all of them truncated."""
    groups = synthetic_groups() * 2
    return [
        replace(
            group,
            rollouts=tuple(
                replace(
                    rollout,
                    completion=replace(rollout.completion, finish_reason=FinishReason.LENGTH),
                )
                for rollout in group.rollouts
            ),
        )
        for group in groups
    ]


@pytest.mark.parametrize("mode", ["warn", "skip", "stop"])
@pytest.mark.parametrize(
    ("groups", "rule"),
    [(all_cut(), "all_truncated"), (synthetic_groups(noise=4.0), "exploding_ratio")],
    ids=["all_truncated", "exploding_ratio"],
)
def test_only_warn_makes_an_update_with_a_batch_that_breaks_a_rule(
    mode: str, groups: list[Group], rule: str
) -> None:
    rank = rank_of()
    rank._guards = mode
    before = parameters_of(rank)
    totals = rank.step(groups).totals
    assert totals[f"guard.{rule}"] == 1.0
    assert totals["non_finite"] == 0.0
    assert totals["held"] == totals["skipped"] == float(mode != "warn")
    assert equal(before, parameters_of(rank)) == (mode != "warn")
    assert rank.version == 4  # the step is counted


def test_a_healthy_batch_breaks_no_rule() -> None:
    totals = rank_of().step(synthetic_groups()).totals
    rules = ("exploding_ratio", "few_effective", "all_truncated")
    assert [totals[f"guard.{rule}"] for rule in rules] == [0.0] * 3
    assert totals["held"] == 0.0


def test_halves_have_the_same_rollouts_and_every_pass_becomes_two() -> None:
    """So data-parallel ranks, which exchange in each pass, keep equal numbers of passes."""
    share = RankShare((), ((0, 1, 2, 3, 4), (5,), ()), imbalance=1.0)
    assert halved(share).passes == ((0, 1, 2), (3, 4), (5,), (), (), ())
    twice = halved(halved(share)).passes
    assert [rows for rows in twice if rows] == [(0, 1), (2,), (3,), (4,), (5,)]
    assert len(twice) == 12


class SmallDevice(LearnerRank):
    """Its device lacks memory for microbatches of more than `most` tokens."""

    most = 10**9
    num_failed = 0

    def _loss(self, batch: Microbatch, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, diagnostics = super()._loss(batch, *arguments)
        if len(batch.token_ids) > self.most:
            loss.backward()  # half of its work is done when the memory is short
            self.num_failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss, diagnostics


def check_same_step(one: StepMetrics, other: StepMetrics) -> None:
    first, second = one.flat(), other.flat()
    for name in ("loss", "grad_norm", "entropy", "tokens", "behaviour_ratio", "accuracy"):
        assert first[name] == pytest.approx(second[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize(("num_minibatches", "most"), [(1, 50), (2, 35)])
def test_loss_and_gradient_are_those_of_a_device_with_enough_memory(
    num_minibatches: int, most: int
) -> None:
    groups = synthetic_groups()
    enough = rank_of(num_minibatches=num_minibatches)
    small = rank_of(kind=SmallDevice, num_minibatches=num_minibatches)
    assert isinstance(small, SmallDevice)
    small.most = most
    check_same_step(small.step(groups), enough.step(groups))
    assert small.num_failed == 1  # later minibatches are halved from the start
    for ours, theirs in zip(parameters_of(small), parameters_of(enough), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    check_same_step(small.step(groups), enough.step(groups))
    assert small.num_failed == 1


def test_a_microbatch_that_does_not_fit_in_halves_either_is_named() -> None:
    small = rank_of(kind=SmallDevice)
    assert isinstance(small, SmallDevice)
    small.most, before = 3, parameters_of(small)
    with pytest.raises(
        RuntimeError,
        match=r"device lacks memory for a microbatch: 12 rollouts of at most \d+ tokens in 2 "
        r"passes \(CUDA out of memory.*\); lower learner\.microbatch_tokens \(16384\), set ",
    ):
        small.step(synthetic_groups())
    assert equal(before, parameters_of(small))


def test_another_error_is_not_tried_again() -> None:
    class Broken(LearnerRank):
        num_calls = 0

        def _loss(self, *_: Any) -> tuple[Tensor, dict[str, Tensor]]:
            self.num_calls += 1
            raise RuntimeError("the driver is shutting down")

    broken = rank_of(kind=Broken)
    assert isinstance(broken, Broken)
    with pytest.raises(RuntimeError, match="shutting down"):
        broken.step(synthetic_groups())
    assert broken.num_calls == 1
