"""Token-mean exactness over ranks.

Tensor- and data-parallel gloo processes get the losses, gradients and weights of one process, in
float32.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parallel_world
import pytest
import torch
from gloo import TIMEOUT_S, on_ranks
from learner_world import (
    LR,
    TINY,
    TINY_JSON,
    VERSION,
    PassBeforeEveryMinibatch,
    rank_of,
    tiny_decoder,
)
from parallel_world import (
    CONFIG,
    EXTRAS,
    FORMS,
    REL,
    Trained,
    check_decoder,
    check_ranks_agree,
    check_three_steps,
    decoder_of,
    dense_decoder,
    equal,
    forward_and_backward,
    go_on,
    rank_on,
    start_logprobs,
    step_on,
    three_steps,
    uneven_groups,
    whole,
)
from safetensors import safe_open
from safetensors.torch import save_file

from dapo_async.algorithm import summarise
from dapo_async.algorithm.guards import Guard
from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank, save_state
from dapo_async.learner.batching import Microbatch
from dapo_async.learner.metrics import PassSums
from dapo_async.learner.rank import MinibatchCounts
from dapo_async.model import (
    Axis,
    Layout,
    Mesh,
    ModelConfig,
    PackedAttention,
    ShardCopy,
    buckets,
    checksum,
    checksum_of_parts,
    hf,
    load_decoder,
    part_of,
    save_weights,
    shard_copy,
    shard_of,
    token_logprobs,
)
from dapo_async.types import StepMetrics
from dapo_async.weights import hashes_of_copy
from dapo_async.weights.server_hashes import server_hashes
from dapo_async.weights.tensor_proof import ROUND

pytestmark = pytest.mark.gloo
# Odd heads, sequence ratios, an entropy gradient, a KL term, several passes with a filler.
SLICED: dict[str, Any] = {
    "learner": {"num_minibatches": 2, "microbatch_tokens": 20, "zero_stage": 2},
    "algorithm": {"objective": "gspo", "entropy_bonus": 0.1, "kl_coef": 0.5},
    "model": {"num_heads": 3, "num_kv_heads": 1},
}
MESHES = ((1, 2), (2, 1), (2, 2))  # dp, tp


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 2)])
def test_a_split_decoder_has_the_logprobs_entropies_and_gradients_of_the_whole(
    dp: int, tp: int, extra: str
) -> None:
    check_decoder(replace(CONFIG, **EXTRAS[extra]), dp=dp, tp=tp)


def test_ranks_with_slices_of_three_heads_equal_a_single_rank() -> None:
    """Context parallelism; `tests/nightly/test_context_parallel.py` has all forms and layouts."""
    check_three_steps(SLICED, cp=2)


def test_four_ranks_share_two_heads_of_keys_and_values() -> None:
    config = replace(TINY, num_heads=4, num_kv_heads=2)
    logprobs, _, gradients = forward_and_backward(Mesh(), config)
    for their_logprobs, _, theirs in on_ranks(forward_and_backward, config, tp=4):
        torch.testing.assert_close(their_logprobs, logprobs, rtol=0, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                theirs[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max())
            )


def test_a_gradient_of_gathered_tokens_without_the_sum_is_detected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dapo_async.model import tensor_parallel

    _, _, gradients = forward_and_backward(Mesh(), CONFIG)

    # The backward pass of gathering drops the other ranks' shares.
    def own(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return tensor_parallel._padded(gradient, ctx.tp).chunk(ctx.tp.size)[ctx.tp.rank], None, None

    monkeypatch.setattr(tensor_parallel._GatherTokens, "backward", staticmethod(own))
    (_, _, theirs), _ = on_ranks(forward_and_backward, CONFIG, tp=2)
    name = "model.layers.0.input_layernorm.weight"
    assert (theirs[name] - gradients[name]).abs().max() > 1e-3


def test_a_gradient_of_own_tokens_only_in_a_whole_parameter_is_detected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, gradients = forward_and_backward(Mesh(), CONFIG)
    monkeypatch.setattr(parallel_world, "sum_gradients", lambda decoder, mesh: None)
    (_, _, theirs), _ = on_ranks(forward_and_backward, CONFIG, tp=2)
    assert (theirs["model.norm.weight"] - gradients["model.norm.weight"]).abs().max() > 1e-3
    name = "model.layers.0.mlp.up_proj.weight"
    assert (theirs[name] - gradients[name]).abs().max() < 1e-5 * gradients[name].abs().max()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("dp", "tp"), MESHES)
def test_three_steps_of_several_ranks_equal_those_of_one(
    dp: int, tp: int, form: dict[str, Any]
) -> None:
    check_three_steps(form, dp=dp, tp=tp)


def with_and_without_the_extra_pass(mesh: Mesh) -> list[tuple[Trained, Trained]]:
    """By number of minibatches: the learner, and one with a proximal pass for every microbatch."""
    forms = [
        {"learner": {"num_minibatches": count, "microbatch_tokens": 20}, "algorithm": algorithm}
        for count, algorithm in ((1, {}), (2, {"correction": "mask"}))
    ]
    return [
        (three_steps(mesh, form), three_steps(mesh, form, PassBeforeEveryMinibatch))
        for form in forms
    ]


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 2)])
def test_leaving_out_the_first_proximal_pass_changes_no_bit_on_any_rank(dp: int, tp: int) -> None:
    for results in on_ranks(with_and_without_the_extra_pass, dp=dp, tp=tp):
        for one, other in results:
            assert [each.flat() for each in one.steps] == [each.flat() for each in other.steps]
            for name, tensor in one.weights.items():
                assert torch.equal(tensor, other.weights[name]), name


@pytest.mark.parametrize(("dp", "tp"), MESHES)
def test_proximal_logprobs_of_a_later_minibatch_are_those_of_the_start_of_the_step(
    dp: int, tp: int
) -> None:
    for count, same, unchanged in on_ranks(start_logprobs, dp=dp, tp=tp):
        assert (count > 0, same, unchanged) == (True, True, True)


def test_agreement_check_notices_a_rank_that_drifts_by_one_bit() -> None:
    ranks = on_ranks(three_steps, FORMS[0], tp=2)
    check_ranks_agree(ranks, per_batch=2)
    norm = ranks[1].weights["model.norm.weight"]
    norm[3] = torch.nextafter(norm[3], torch.tensor(2.0))
    with pytest.raises(AssertionError, match=r"model\.norm\.weight on rank 1"):
        check_ranks_agree(ranks, per_batch=2)


def count_passes(mesh: Mesh) -> list[int]:
    """Microbatches of each minibatch, as the rank would run them."""
    counts: list[int] = []
    rank = rank_on(
        mesh, num_minibatches=2, microbatch_tokens=20, algorithm={"proximal": "behaviour"}
    )

    def update(
        minibatch: Sequence[Microbatch], *_: Any, **__: Any
    ) -> tuple[StepMetrics, tuple[Guard, ...]]:
        counts.append(len(minibatch))
        return StepMetrics(), ()

    setattr(rank, "_update", update)  # noqa: B010 (mypy refuses to assign a method)
    step_on(rank, mesh, uneven_groups())
    return counts


def test_every_rank_runs_as_many_microbatches_as_the_others() -> None:
    first, second = on_ranks(count_passes, dp=2)
    assert first == second
    assert max(first) > 1


def one_bad_rank(mesh: Mesh) -> tuple[StepMetrics, bool]:
    """A step with one behaviour logprob that is nan, and whether it changed no weight."""
    groups = uneven_groups()
    completion = groups[3].rollouts[2].completion
    bad = replace(
        groups[3].rollouts[2],
        completion=replace(
            completion, behaviour_logprobs=np.full_like(completion.behaviour_logprobs, np.nan)
        ),
    )
    rank = rank_on(mesh)
    before = {
        name: shard_of(parameter).clone() for name, parameter in rank.decoder.named_parameters()
    }
    metrics = step_on(
        rank, mesh, [*groups[:3], replace(groups[3], rollouts=(*groups[3].rollouts[:2], bad))]
    )
    return metrics, all(
        torch.equal(shard_of(parameter), before[name])
        for name, parameter in rank.decoder.named_parameters()
    )


def test_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_counted_once() -> None:
    ranks = on_ranks(one_bad_rank, dp=2, tp=2)
    assert all(untouched for _, untouched in ranks)
    (first, _), _, (second, _), _ = ranks
    assert (first + second).totals["skipped"] == (first + second).totals["non_finite"] == 1.0
    assert "grad_norm" not in (first + second).sums


def test_a_rank_that_checks_only_its_own_numbers_would_train_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dapo_async.learner import rank

    # Neither the norm nor the loss is shared: the skip is each rank's own.
    read = PassSums.read
    monkeypatch.setattr(rank, "clip_gradients", lambda decoder, max_norm, mesh: torch.ones(()))
    monkeypatch.setattr(PassSums, "read", lambda self, norm, mesh: read(self, norm, Mesh()))
    assert sorted(untouched for _, untouched in on_ranks(one_bad_rank, dp=2)) == [False, True]


class SmallRank(LearnerRank):
    """The last rank lacks memory for microbatches of more than 30 tokens."""

    def _loss(self, batch: Microbatch, *arguments: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        if self._mesh.every.rank == self._mesh.every.size - 1 and len(batch.token_ids) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super()._loss(batch, *arguments)


def short_of_memory(mesh: Mesh, num_halvings: int) -> Trained | str:
    """Weights and metrics after one minibatch, or what was raised."""
    rank = rank_on(mesh, kind=SmallRank)
    try:
        metrics = rank.minibatch(uneven_groups(), num_halvings=num_halvings)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    parameters = rank.decoder.named_parameters()
    return Trained([metrics], {name: whole(each.detach()) for name, each in parameters})


def test_all_ranks_start_again_in_halves_when_one_of_them_lacks_memory() -> None:
    """As `LearnerGroup` does: the ranks are ended, and new ones get one more halving."""
    *others, small = on_ranks(short_of_memory, 0, dp=2, tp=2)
    assert re.match(r"MemoryShort: the learner's device lacks memory for a microbatch: \d+", small)
    assert all(each.startswith("RuntimeError: ") for each in others), "they waited in the pass"
    # Three times, so that some passes are empty, and not as many on each rank.
    ranks, alone = on_ranks(short_of_memory, 3, dp=2, tp=2), three_steps(Mesh(), {"learner": {}})
    first, _, second, _ = (rank.steps[0] for rank in ranks)
    ours, theirs = summarise(alone.steps[0]), summarise(first + second)
    for name in ("loss", "grad_norm", "entropy", "tokens"):
        assert theirs[name] == pytest.approx(ours[name], rel=REL, abs=REL), name
    for name, tensor in ranks[0].weights.items():
        assert all(torch.equal(tensor, rank.weights[name]) for rank in ranks), name


def half_precision(mesh: Mesh) -> StepMetrics:
    return step_on(rank_on(mesh, activations=torch.bfloat16), mesh, uneven_groups())


def test_bfloat16_activations_cross_the_ranks() -> None:
    alone, (first, *_) = summarise(half_precision(Mesh())), on_ranks(half_precision, tp=2)
    assert summarise(first)["grad_norm"] == pytest.approx(
        alone["grad_norm"], rel=0.05
    )  # eight bits of mantissa
    assert summarise(first)["loss"] == pytest.approx(alone["loss"], rel=0.05, abs=0.01)


def often_seen_row(mesh: Mesh, activations: torch.dtype) -> torch.Tensor:
    """The embedding's gradient of a token at 1,500 positions, each with its own weight."""
    decoder = decoder_of(replace(CONFIG, tie_embeddings=False), mesh, activations=activations)
    lengths = (30,) * 50
    ids, attention = torch.full((1500,), 5), PackedAttention(lengths)
    targets = torch.arange(1500) % 23
    logprobs, _ = decoder.score(
        ids,
        attention.positions,
        attention,
        predictors=torch.arange(1500),
        targets=targets,
        temperatures=torch.ones(1500),
    )
    ((logprobs * torch.linspace(0.5, 1.5, 1500)).sum() / mesh.dp.size).backward()
    gradient = decoder.model.embed_tokens.weight.grad
    assert gradient is not None
    return whole(gradient)[5].float()


def test_gradients_of_a_frequent_token_add_up_in_float32_on_ranks_too() -> None:
    exact = often_seen_row(Mesh(), torch.float32)

    def error(gradient: torch.Tensor) -> float:
        return float((gradient - exact).norm() / exact.norm())

    alone, (ranks, _) = (
        error(often_seen_row(Mesh(), torch.bfloat16)),
        on_ranks(often_seen_row, torch.bfloat16, dp=2),
    )
    assert alone < 0.06  # the layers' own rounding
    assert error(ranks) < 1.5 * alone


def test_a_loss_divided_by_the_tokens_of_each_rank_is_detected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def local(
        self: LearnerRank,
        minibatch: Sequence[Microbatch],
        *,
        num_rollouts: int,
        num_truncated: int,
    ) -> MinibatchCounts:
        return MinibatchCounts(
            sum(batch.num_loss_tokens for batch in minibatch),
            sum(batch.num_sequences for batch in minibatch),
            num_rollouts,
            num_truncated,
        )

    alone = three_steps(Mesh(), FORMS[0])
    monkeypatch.setattr(LearnerRank, "_counts", local)
    first, _ = on_ranks(three_steps, FORMS[0], dp=2)
    assert summarise(first.steps[0])["grad_norm"] != pytest.approx(
        summarise(alone.steps[0])["grad_norm"], rel=1e-2
    )


State = dict[str, torch.Tensor]


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 2)])
def test_ranks_that_load_a_state_go_on_bit_for_bit_as_those_that_gave_it(
    dp: int, tp: int, tmp_path: Path
) -> None:
    gave = on_ranks(go_on, tmp_path / "gave", None, dp=dp, tp=tp)
    loaded = on_ranks(go_on, tmp_path / "loaded", tmp_path / "gave" / "before", dp=dp, tp=tp)
    assert loaded == gave
    assert (
        len([*(tmp_path / "gave" / "before").glob("*.safetensors")]) == dp * tp
    )  # each rank wrote its own part
    assert equal(tmp_path / "loaded" / "before", tmp_path / "gave" / "before")
    assert equal(tmp_path / "loaded" / "after", tmp_path / "gave" / "after")
    counts = json.loads((tmp_path / "loaded" / "after" / "learner.json").read_text())
    assert (counts["version"], counts["updates"], len(counts["files"])) == (VERSION + 2, 4, dp * tp)
    for file in (tmp_path / "gave" / "before").glob("*.safetensors"):  # one moment lost is seen
        with safe_open(file, framework="pt") as parts:
            tensors, notes = (
                {name: parts.get_tensor(name) for name in parts.keys()},  # noqa: SIM118
                parts.metadata(),
            )
        tensors = {
            name: tensor * (name != "exp_avg.model.norm.weight") for name, tensor in tensors.items()
        }
        save_file(tensors, file, metadata=notes)
    on_ranks(go_on, tmp_path / "forgetful", tmp_path / "gave" / "before", dp=dp, tp=tp)
    assert not equal(tmp_path / "forgetful" / "after", tmp_path / "gave" / "after")


def test_state_loads_at_any_other_size_whole_and_without_a_change(tmp_path: Path) -> None:
    on_ranks(go_on, tmp_path / "1x2", None, tp=2)
    given = tmp_path / "1x2" / "before"
    metrics, _ = go_on(Mesh(), tmp_path / "alone", given)
    (theirs, _), *_ = on_ranks(go_on, tmp_path / "2x1", tmp_path / "alone" / "before", dp=2)
    on_ranks(go_on, tmp_path / "2x2", tmp_path / "2x1" / "before", dp=2, tp=2)
    on_ranks(go_on, tmp_path / "1x2 again", tmp_path / "2x2" / "before", tp=2)
    for size in ("alone", "2x1", "2x2", "1x2 again"):
        assert equal(tmp_path / size / "before", given), size
    assert theirs.sums["grad_norm"][0] == pytest.approx(metrics.sums["grad_norm"][0], rel=1e-3)


def copied(mesh: Mesh) -> tuple[str, State, dict[int, State], dict[str, str]]:
    """The checksum of this rank's copy, the whole weights on the host, the units it owns when the
    ranks of `tp` share them, and its hashes for a server. The decoder is changed after the copy."""
    decoder = rank_on(mesh, model={"tie_embeddings": False, "num_kv_heads": 1}).decoder
    content = checksum_of_parts(decoder, mesh, torch.bfloat16)
    copy = ShardCopy.of(decoder, Layout.of(decoder, mesh), torch.bfloat16)
    for parameter in decoder.parameters():
        shard_of(parameter).zero_()
    units = dict(copy.stream(mesh.publishing, num_owners=mesh.tp.size))
    whole = copy.whole(mesh.publishing)
    assert not mesh.is_first or content == checksum(whole)
    # Other units, whose parameters are no neighbours.
    ends = dict(copy.stream(mesh.publishing, num_owners=mesh.every.size, units=[(3, 0), (2,)]))
    assert [*ends] == [each for each in (0, 1) if each % mesh.every.size == mesh.every.rank]
    hashes: dict[str, str] = {}
    for version in range(ROUND):
        (some,) = hashes_of_copy(
            copy, mesh.publishing, tensor_parallel=1, cuda=False, version=version
        )
        hashes |= some
    units |= {-1 - number: each for number, each in ends.items()}
    return copy.checksum(), whole, units, hashes


@pytest.mark.parametrize(("dp", "tp"), MESHES)
def test_copies_of_the_shards_make_the_whole_weights_on_their_owners(
    dp: int, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        buckets, "__kwdefaults__", {**(buckets.__kwdefaults__ or {}), "limit": 500}
    )  # many units
    monkeypatch.setattr(shard_copy, "BUCKET_ELEMENTS", 300)  # most of them in several pieces
    ranks = on_ranks(copied, dp=dp, tp=tp)
    content, alone, units, hashes = copied(Mesh())
    (_, first, *_), *others = ranks
    assert list(first) == list(alone)
    assert all(torch.equal(tensor, alone[name]) for name, tensor in first.items())
    assert [whole for _, whole, *_ in others] == [{}] * (dp * tp - 1)
    shares = [int(each, 16) for each, *_ in ranks]
    assert f"{sum(shares) % 2**64:016x}" == content == checksum(alone)
    assert [*units][:4] == [0, 1, 2, 3]
    for number, unit in units.items():
        holders = [rank for rank, (_, _, own, _) in enumerate(ranks) if number in own]
        assert holders == [number % tp if number >= 0 else -1 - number]
        own = ranks[holders[0]][2][number]
        assert list(own) == list(unit)
        assert all(torch.equal(tensor, unit[name]) for name, tensor in own.items())
    names = sorted(name for *_, own in ranks for name in own)
    assert names == sorted(hashes)  # each by one rank
    assert all(own.items() <= hashes.items() for *_, own in ranks)
    assert hashes == server_hashes(alone, CONFIG, tensor_parallel=1, cuda=False)[0]


def uneven_parts(mesh: Mesh, folder: Path, vocab_size: int) -> tuple[dict[str, int], State]:
    """The rows of each tensor on this rank, and the whole weights; saves the state in `folder`."""
    config = replace(CONFIG, vocab_size=vocab_size)
    decoder, dense = decoder_of(config, mesh), dict(dense_decoder(config).named_parameters())
    for name, parameter in decoder.named_parameters():
        assert torch.equal(shard_of(parameter), dense[name][part_of(parameter)]), name
    rank = LearnerRank(
        decoder,
        algorithm=AlgorithmConfig(),
        learner=LearnerConfig(lr=LR, warmup_steps=0),
        mesh=mesh,
    )
    for parameter in decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    rank._optimizer.step(lr=LR)
    save_state(rank.capture_state(), folder, mesh)
    copy = ShardCopy.of(decoder, Layout.of(decoder, mesh), torch.float32)
    weights = copy.whole(mesh.publishing)
    content = checksum_of_parts(decoder, mesh, torch.float32)
    assert not mesh.is_first or content == checksum(weights)
    rows = {name: len(shard_of(parameter)) for name, parameter in decoder.named_parameters()}
    return rows, weights


@pytest.mark.parametrize(("vocab_size", "dp", "tp"), [(13, 3, 2), (23, 4, 1)])
def test_uneven_parts_are_loaded_gathered_and_saved(
    vocab_size: int, dp: int, tp: int, tmp_path: Path
) -> None:
    _, alone = uneven_parts(Mesh(), tmp_path / "alone", vocab_size)
    ranks = on_ranks(uneven_parts, tmp_path / "ranks", vocab_size, dp=dp, tp=tp)
    rows = [held["model.embed_tokens.weight"] for held, _ in ranks]
    assert (
        rows == {13: [3, 2, 3, 2, 1, 2], 23: [6, 6, 6, 5]}[vocab_size]
    )  # 13 = 7 + 6 on tp, each of them cut in three
    assert equal(tmp_path / "ranks", tmp_path / "alone")
    assert all(torch.equal(tensor, ranks[0][1][name]) for name, tensor in alone.items())


class Counting:
    """safe_open's file, counting the bytes that are read of it."""

    read = 0

    def __init__(self, path: Path, framework: str) -> None:
        self._file = safe_open(path, framework).__enter__()

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *_: object) -> None: ...

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_slice(self, name: str) -> Any:
        file = self._file.get_slice(name)

        class Slice:
            get_shape = staticmethod(file.get_shape)

            def __getitem__(self, part: tuple[slice, ...]) -> torch.Tensor:
                tensor: torch.Tensor = file[part]
                Counting.read += tensor.nbytes
                return tensor

        return Slice()


def load_counted(mesh: Mesh, folder: Path) -> int:
    """Bytes of weights that a rank reads to load its part of a folder, which is the right one."""
    decoder = load_decoder(folder, mesh=mesh)
    dense = dict(dense_decoder(decoder.config).named_parameters())
    for name, parameter in decoder.named_parameters():
        assert torch.equal(shard_of(parameter), dense[name][part_of(parameter)]), name
    return Counting.read


def test_ranks_read_their_parts_of_a_folder_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**TINY_JSON, "num_key_value_heads": 2, "tie_word_embeddings": False})
    )
    weights = dict(dense_decoder(ModelConfig.from_folder(tmp_path)).named_parameters())
    save_weights(weights, tmp_path)
    monkeypatch.setattr(hf, "safe_open", Counting)
    whole_on_tp = sum(tensor.nbytes for name, tensor in weights.items() if "norm" in name)
    assert (
        sum(on_ranks(load_counted, tmp_path, dp=2, tp=2))
        == sum(tensor.nbytes for tensor in weights.values()) + whole_on_tp
    )


def exchanges(
    mesh: Mesh, chunk_tokens: int
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The number of collectives of the head's two passes, logprobs, entropies, and the gradient.

    The gradient is that of the hidden states.
    """
    calls: list[str] = []

    class Group:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(mesh.tp.group, name)

    tp = Axis(mesh.tp.rank, mesh.tp.size, Group())
    random = torch.Generator().manual_seed(1)
    hidden, weight = (
        torch.randn(9, 6, generator=random).requires_grad_(),
        torch.randn(23, 6, generator=random),
    )
    targets, temperature = torch.randint(0, 23, (9,), generator=random), torch.linspace(0.5, 2.0, 9)
    share = tp.share(23)
    logprobs, entropies = token_logprobs(
        hidden,
        weight[share],
        targets,
        temperature,
        chunk_tokens=chunk_tokens,
        tp=tp,
        vocab_start=share.start,
    )
    (logprobs.square() + entropies.square()).sum().backward()
    assert hidden.grad is not None
    return len(calls), logprobs.detach(), entropies.detach(), hidden.grad


def test_a_head_of_four_uneven_shards_communicates_once_for_any_number_of_chunks() -> None:
    _, logprobs, entropies, gradient = exchanges(Mesh(), 100)
    for chunk_tokens in (2, 100):
        ranks = on_ranks(exchanges, chunk_tokens, tp=4)
        for calls, their_logprobs, their_entropies, _ in ranks:
            assert calls == 1  # the numbers of each token
            torch.testing.assert_close(their_logprobs, logprobs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(their_entropies, entropies, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            sum(shares for *_, shares in ranks), gradient, rtol=1e-5, atol=1e-5
        )


def vanish(mesh: Mesh) -> float:
    """The second rank exits; returns how many seconds the first one waits for it."""
    began_s = time.monotonic()
    if mesh.tp.rank == 1:
        os._exit(7)
    try:
        mesh.tp.sum(torch.ones(4))
    except RuntimeError:
        return time.monotonic() - began_s
    raise AssertionError("the sum succeeded without the second rank")


def test_rank_that_dies_fails_the_others_long_before_the_deadline() -> None:
    waited_s, _ = on_ranks(vanish, tp=2, dying=[1])
    assert waited_s < TIMEOUT_S / 2


def test_sizes_that_do_not_split_name_those_that_do() -> None:
    config = replace(TINY, num_heads=8, num_kv_heads=4, intermediate_size=24)
    config.check_split(8)  # two ranks to a head of keys and values
    with pytest.raises(
        ValueError,
        match=r"tensor_parallel \(3\) must divide .*num_key_value_heads 4.*one of 1, 2, 4, 8",
    ):
        config.check_split(3)
    with pytest.raises(ValueError, match=r"set it to one of 1, 2$"):
        replace(config, vocab_size=9, num_kv_heads=8).check_split(
            8
        )  # the last ranks would have no token


def test_rank_of_the_learners_own_tests_is_a_mesh_of_one() -> None:
    assert rank_of()._mesh == Mesh()
    assert tiny_decoder().tp.size == 1
