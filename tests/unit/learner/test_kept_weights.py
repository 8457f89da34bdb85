"""Memory that runs out around the kept weights: all of them are exchanged, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from learner_world import rank_of, synthetic_groups
from torch import Tensor

from dapo_async.learner import LearnerRank, kept_weights, optimizer
from dapo_async.learner.batching import Microbatch
from dapo_async.learner.device_memory import WeightsBroken, is_out_of_memory
from dapo_async.learner.kept_weights import exchange
from dapo_async.learner.optimizer import ShardedAdamW

FORMS: dict[str, dict[str, Any]] = {
    "reference": {"algorithm": {"kl_coef": 0.5}},
    "start": {"num_minibatches": 2},
    "start and reference": {"algorithm": {"kl_coef": 0.5}, "num_minibatches": 2},
}
SHORT = "CUDA out of memory. Tried to allocate 2.00 GiB"


def weights_of(rank: LearnerRank) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in rank.decoder.parameters()]


def close(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(one, other, strict=True))


def fails_at(
    monkeypatch: pytest.MonkeyPatch, numbers: Sequence[int], count: list[int]
) -> Callable[..., None]:
    """`Tensor.copy_` of a device that lacks memory at the copies `numbers` of the exchanges.

    It has written half of the target by then.
    """
    original = Tensor.copy_

    def copy_(self: Tensor, source: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        count[0] += 1
        if count[0] in numbers:
            half = len(self) // 2
            original(self[:half], source[:half])
            raise torch.OutOfMemoryError(SHORT)
        return original(self, source, *args, **kwargs)

    def exchanged(*args: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "copy_", copy_)
            exchange(*args)

    return exchanged


def pairs_of(num_pairs: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6), torch.randn(6)) for _ in range(num_pairs)]


@pytest.mark.parametrize("number", range(1, 10))
def test_a_copy_that_fails_leaves_both_sides_as_they_were(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pairs_of()
    before = [(one.clone(), other.clone()) for one, other in pairs]
    with pytest.raises(torch.OutOfMemoryError):
        fails_at(monkeypatch, [number], [0])(pairs, torch.empty(6))
    for (one, other), (one_before, other_before) in zip(pairs, before, strict=True):
        assert torch.equal(one, one_before)
        assert torch.equal(other, other_before)


def test_weights_that_cannot_be_put_back_are_no_shortage_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(WeightsBroken, match="are those of another policy, because of OutOfM") as at:
        fails_at(monkeypatch, [5, 6], [0])(pairs_of(), torch.empty(6))
    assert not is_out_of_memory(at.value)
    assert not is_out_of_memory(WeightsBroken("not enough memory"))


def test_an_exchange_in_small_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, whole = synthetic_groups(), rank_of(**FORMS["start and reference"])
    whole.step(groups)
    monkeypatch.setattr(kept_weights, "EXCHANGED", 7)
    pieces = rank_of(**FORMS["start and reference"])
    pieces.step(groups)
    assert all(map(torch.equal, weights_of(pieces), weights_of(whole)))


class SmallInThePass(LearnerRank):
    """Its device lacks memory for the first forward pass without gradient."""

    num_failed = 0

    def _forward(self, batch: Microbatch, *args: Any) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled() and not self.num_failed:
            self.num_failed += 1
            raise torch.OutOfMemoryError(SHORT)
        return super()._forward(batch, *args)


@pytest.mark.parametrize("form", FORMS)
def test_a_shortage_in_the_pass_of_other_weights_changes_no_number(form: str) -> None:
    groups = synthetic_groups()
    enough, small = rank_of(**FORMS[form]), rank_of(kind=SmallInThePass, **FORMS[form])
    expected, done = enough.step(groups).flat(), small.step(groups).flat()
    assert isinstance(small, SmallInThePass)
    assert small.num_failed == 1
    assert done["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert close(weights_of(small), weights_of(enough))


@pytest.mark.parametrize("form", FORMS)
def test_a_shortage_at_any_shard_of_the_exchange_changes_no_number(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, enough, count = synthetic_groups(), rank_of(**FORMS[form]), [0]
    monkeypatch.setattr(kept_weights, "exchange", fails_at(monkeypatch, [], count))
    enough.step(groups)
    num_shards = len(weights_of(enough))
    assert count[0] in (6 * num_shards, 18 * num_shards)  # there and back, once or three times
    for number in range(1, 3 * num_shards + 1, 7):  # each of the three copies, many shards
        rank = rank_of(**FORMS[form])
        monkeypatch.setattr(kept_weights, "exchange", fails_at(monkeypatch, [number], [0]))
        rank.step(groups)
        assert rank.num_halvings == 1
        assert close(weights_of(rank), weights_of(enough))


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_that_cannot_put_its_weights_back_ends_and_saves_nothing(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, rank = synthetic_groups(), rank_of(**FORMS[form])
    num_copies = 3 * len(weights_of(rank))
    failing = fails_at(monkeypatch, [num_copies + 2], [0])
    monkeypatch.setattr(kept_weights, "exchange", failing)
    with pytest.raises(WeightsBroken, match="weights of another policy are in the decoder"):
        rank.step(groups)
    assert rank.num_halvings == 0
    rank.num_updates = 0
    with pytest.raises(WeightsBroken, match="resume from the newest checkpoint"):
        rank.capture_state()


def test_a_shortage_in_the_midst_of_an_update_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second try would update some of the weights twice."""
    rank = rank_of()
    calls: list[int] = []
    original: Callable[..., None] = vars(optimizer)["adamw"]

    def adamw(weights: list[Tensor], *args: Any, **kwargs: Any) -> None:
        calls.append(len(weights))
        if len(calls) == 2:
            raise torch.OutOfMemoryError(SHORT)
        original(weights, *args, **kwargs)

    monkeypatch.setattr(optimizer, "adamw", adamw)
    with pytest.raises(WeightsBroken, match="some of the weights have had their update and others"):
        rank.step(synthetic_groups())
    assert len(calls) == 2
    with pytest.raises(WeightsBroken):
        rank.capture_state()


def test_a_shortage_before_an_update_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, enough, rank = synthetic_groups(), rank_of(), rank_of()
    enough.step(groups)
    original, calls = ShardedAdamW._fresh, [0]

    def fresh(self: ShardedAdamW, name: str, *, updates: int) -> dict[str, Tensor]:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError(SHORT)
        return original(self, name, updates=updates)

    monkeypatch.setattr(ShardedAdamW, "_fresh", fresh)
    rank.step(groups)
    assert rank.num_halvings == 1
    assert close(weights_of(rank), weights_of(enough))
