"""What the learner does around its passes on the device: waits, short memory, kept weights."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu_learner import groups_of, rank_on
from gpu_place import Place, distance
from learner_world import PassBeforeEveryMinibatch, outcome, rank_of, synthetic_groups
from torch import Tensor

from dapo_async.learner import LearnerRank
from dapo_async.learner.batching import Microbatch
from dapo_async.model import HostCopy

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA device; tests/unit/learner/test_host_reads.py counts reads on a CPU",
)
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16], ids=str)
def test_on_cuda_more_passes_make_no_more_waits(activations: torch.dtype) -> None:
    def waits(max_tokens: int) -> int:
        rank = rank_of(microbatch_tokens=max_tokens, device="cuda", activations=activations)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                rank.minibatch(synthetic_groups())
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(each.message) for each in caught)

    waits(100)  # the first one allocates
    assert waits(100) == waits(1) <= 4


class SmallDevice(LearnerRank):
    """The CPU form of a device that lacks memory for microbatches of more than `most` tokens."""

    most = 10**9

    def _loss(self, batch: Microbatch, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, diagnostics = super()._loss(batch, *arguments)
        if len(batch.token_ids) > self.most:
            loss.backward()  # half of its work is done when the memory is short
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss, diagnostics


def settle(place: Place) -> None:
    """Leaves only what is in use on the device."""
    gc.collect()  # decoders that compute again are in reference cycles
    if place.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def memory_limit(place: Place, num_bytes: float | None) -> Iterator[None]:
    """On CUDA this process has only so much device memory meanwhile; None: all."""
    if num_bytes is None or not place.on_gpu:
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(num_bytes / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_rank_whose_device_lacks_memory_halves_its_passes(place: Place) -> None:
    """The whole minibatch is one pass that does not fit. On CUDA the limit is between what it needs
    and what half of it needs."""
    groups = groups_of(place, 9)
    tokens = sum(rollout.num_tokens for group in groups for rollout in group.rollouts)

    def trained(limit: float | None, max_tokens: int) -> tuple[Tensor, int, float]:
        """How the weights moved in a step, halvings, and the bytes that were reserved at most."""
        settle(place)
        decoder = place.decoder()
        decoder.activations = place.half
        start = [each.detach().cpu().clone() for each in decoder.parameters()]
        rank = rank_on(place, decoder, kind=SmallDevice, microbatch_tokens=max_tokens)
        assert isinstance(rank, SmallDevice)
        if limit is not None and not place.on_gpu:
            rank.most = tokens * 3 // 4
        settle(place)
        with memory_limit(place, limit):
            rank.step(groups)
        reserved = torch.cuda.max_memory_reserved() if place.on_gpu else 0
        end = [each.detach().cpu() for each in decoder.parameters()]
        moved = [(new - old).flatten() for new, old in zip(end, start, strict=True)]
        return torch.cat(moved), rank.num_halvings, float(reserved)

    _, none, whole_bytes = trained(None, 2 * tokens)
    right, _, half_bytes = trained(None, tokens // 2 + place.length)
    found, halvings, _ = trained((whole_bytes + half_bytes) / 2, 2 * tokens)
    assert (none, halvings) == (0, 1)
    # Adam's first update is the sign of the gradient: near 0 a rounding flips it.
    assert distance(found, right) <= 0.3


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "on the host"])
def test_weights_kept_from_the_start_of_a_step_give_its_proximal_logprobs(
    place: Place, offload: bool
) -> None:
    """Against a pass before the first of two minibatches; the KL term has kept weights, too."""
    form: dict[str, Any] = {
        "num_minibatches": 2,
        "offload_optimizer": offload,
        "algorithm": {"kl_coef": 0.1},
        "device": place.device,
    }
    groups = synthetic_groups()
    kept, before = rank_of(**form), rank_of(kind=PassBeforeEveryMinibatch, **form)
    found, expected = outcome(kept, groups), outcome(before, groups)
    for name in ("loss", "grad_norm", "behaviour_kl_k3", "clip_high_fraction", "reference_kl"):
        assert found.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4, abs=1e-6)
    places = {each.device.type for each in kept._start_weights.shards}
    assert places == {"cpu" if offload else place.device}


def test_released_tensors_free_the_device_and_come_back_the_same(place: Place) -> None:
    count = 2**24 if place.on_gpu else 2**10
    joined = torch.randn(count, device=place.device)
    halves, right = joined.chunk(2), joined.cpu().clone()
    before = torch.cuda.memory_allocated() if place.on_gpu else 0
    host = HostCopy()
    for _ in range(2):  # the second time in the memory of the first
        host.release([joined, *halves])
        assert host.num_bytes == 4 * count
        if place.on_gpu:
            assert torch.cuda.memory_allocated() <= before - 4 * count
        assert torch.equal(host.view(halves[1]), right[count // 2 :])
        host.restore()
        assert joined.device.type == place.device
        assert torch.equal(joined.cpu(), right)
    halves[0].zero_()  # still a view
    assert not joined[: count // 2].any()
