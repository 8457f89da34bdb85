"""What SGLang servers hash weights to, and the handshakes that compare it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from weights_world import TINY, FakeEngine, FakeLearner, make_publisher, publish

from dapo_async.model import ModelConfig
from dapo_async.weights import Announcement, Attestation
from dapo_async.weights.publisher import HandshakeError, Publisher
from dapo_async.weights.server_hashes import (
    cuda_hash,
    drawn,
    expert_parallel_of,
    server_hashes,
    server_names,
)
from dapo_async.weights.tensor_proof import kind_of

DOWN = "model.layers.0.mlp.down_proj.weight"
QKV = "model.layers.0.self_attn.qkv_proj.weight"


def hashes_of(learner: FakeLearner, ranks: int = 2) -> tuple[dict[str, str], ...]:
    """As the servers of the learner's weights compute them."""
    weights = {name: each.detach() for name, each in learner.model.state_dict().items()}
    given = server_hashes(weights, TINY, tensor_parallel=ranks, cuda=False)
    return tuple(dict(each) for each in given)


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def test_a_rank_of_a_server_has_its_part_of_each_joined_or_split_tensor() -> None:
    config = replace(TINY, num_heads=4, num_kv_heads=1, head_dim=4, vocab_size=70)
    torch.manual_seed(0)
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    weights = {
        "model.embed_tokens.weight": torch.randn(70, 6),
        f"{attention}q_proj.weight": torch.randn(16, 6),
        f"{attention}k_proj.weight": torch.randn(4, 6),
        f"{attention}v_proj.weight": torch.randn(4, 6),
        f"{attention}o_proj.weight": torch.randn(6, 16),
        f"{mlp}gate_proj.weight": torch.randn(8, 6),
        f"{mlp}up_proj.weight": torch.randn(8, 6),
        f"{mlp}down_proj.weight": torch.randn(6, 8),
        "model.norm.weight": torch.randn(6),
    }
    _, second = server_hashes(weights, config, tensor_parallel=2, cuda=False)
    embedding = torch.cat((weights["model.embed_tokens.weight"], torch.zeros(58, 6)))
    assert (
        second
        == {
            "model.embed_tokens.weight": sha(embedding[64:]),
            f"{attention}qkv_proj.weight": sha(
                torch.cat(
                    (
                        weights[f"{attention}q_proj.weight"][8:],
                        weights[f"{attention}k_proj.weight"],  # the one head, on both ranks
                        weights[f"{attention}v_proj.weight"],
                    )
                )
            ),
            f"{attention}o_proj.weight": sha(weights[f"{attention}o_proj.weight"][:, 8:]),
            f"{mlp}gate_up_proj.weight": sha(
                torch.cat(
                    (weights[f"{mlp}gate_proj.weight"][4:], weights[f"{mlp}up_proj.weight"][4:])
                )
            ),
            f"{mlp}down_proj.weight": sha(weights[f"{mlp}down_proj.weight"][:, 4:]),
            "model.norm.weight": sha(weights["model.norm.weight"]),
        }
    )


def mixture(num_experts: int = 4) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A layer of experts, one by one; rows and columns of all of them differ."""
    config = replace(TINY, num_experts=num_experts, experts_per_token=2, expert_size=4)
    torch.manual_seed(0)
    return config, {
        f"model.layers.0.mlp.experts.{expert}.{module}.weight": torch.randn(shape)
        for expert in range(num_experts)
        for module, shape in (("gate_proj", (4, 6)), ("up_proj", (4, 6)), ("down_proj", (6, 4)))
    }


@pytest.mark.parametrize(("ep", "experts", "inner"), [(1, range(4), 0), (2, range(2), 1)])
def test_a_rank_of_a_server_has_its_part_of_the_stacked_experts(
    ep: int, experts: range, inner: int
) -> None:
    """Rank 0 of two without expert parallelism; rank 1 of four of which two share experts."""
    config, weights = mixture()
    ranks, stem = 2 * ep, "model.layers.0.mlp.experts."
    given = server_hashes(weights, config, tensor_parallel=ranks, expert_parallel=ep, cuda=False)
    half = slice(2 * inner, 2 * inner + 2)
    gate, up, down = (
        torch.stack([weights[f"{stem}{expert}.{module}.weight"] for expert in experts])
        for module in ("gate_proj", "up_proj", "down_proj")
    )
    assert given[inner] == {
        f"{stem}w13_weight": sha(torch.cat((gate[:, half], up[:, half]), dim=1)),
        f"{stem}w2_weight": sha(down[:, :, half]),
    }


def test_the_groups_of_experts_are_read_from_the_flags_of_the_servers() -> None:
    flags = ("", "--ep-size 4", "--mem-fraction-static 0.8 --ep=2", "--expert-parallel-size 8")
    assert [*map(expert_parallel_of, flags)] == [1, 4, 2, 8]


def test_every_tensor_is_hashed_once_in_eight_publishes_of_equal_bytes() -> None:
    sizes = {
        f"model.layers.{layer}.{part}.weight": 2**20 * size
        for layer in range(32)
        for part, size in (("mlp.down_proj", 8), ("self_attn.o_proj", 2), ("input_layernorm", 1))
    } | {"model.embed_tokens.weight": 2**20 * 30}
    total, orders = sum(sizes.values()), []
    for turn in range(3):
        rounds = [drawn(sizes, version=8 * turn + place) for place in range(8)]
        assert sorted(name for each in rounds for name in each) == sorted(sizes)
        for each in rounds:
            assert sum(sizes[name] for name in each) == pytest.approx(total / 8, rel=0.1)
        orders.append([min(each) for each in rounds])
    assert orders[0] != orders[1] != orders[2]
    assert drawn(sizes, version=9) == drawn(sizes, version=9)


def loop(words: list[int]) -> int:
    """The formula for CUDA word by word, in unbounded integers."""
    word, long = 2**32 - 1, 2**64 - 1

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x85EBCA6B & word
        x ^= x >> 13
        x = x * 0xC2B2AE35 & word
        return x ^ x >> 16

    def rotated(x: int, by: int) -> int:
        return (x << by | x >> 32 - by) & word

    seeds = (0x243F6A88, (0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & word)
    total = 0
    for tile in range(0, len(words), 8192):
        halves = [0, 0]
        for index, value in enumerate(words[tile : tile + 8192], start=tile):
            for number, (factor, by) in enumerate(((0x27D4EB2D, 15), (0x165667B1, 13))):
                place = (index * factor + seeds[number] & word) ^ rotated(index, by)
                halves[number] = halves[number] + mix(value ^ place) & word
        high, low = (mix(half ^ len(words) * 4 & word) for half in halves)
        total = total + (high << 32 | low) & long
    total ^= total >> 30
    total = total * 0xBF58476D1CE4E5B9 & long
    total ^= total >> 27
    total = total * 0x94D049BB133111EB & long
    return total ^ total >> 31


@pytest.mark.parametrize("count", [1, 7, 8192, 9001])
def test_the_form_for_cuda_equals_a_loop_over_the_words(count: int) -> None:
    torch.manual_seed(count)
    values = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32)
    assert cuda_hash(values) == loop([each % 2**32 for each in values.tolist()])
    odd = torch.randn(3, dtype=torch.bfloat16)  # six bytes: padded by two
    words = [*odd.view(torch.int16).to(torch.int64).bitwise_and(0xFFFF).tolist(), 0]
    assert cuda_hash(odd) == loop([words[0] | words[1] << 16, words[2]])


def test_names_of_a_server_are_joined_from_those_of_the_model() -> None:
    names = ["model.layers.3.self_attn.k_proj.bias", "model.layers.3.mlp.up_proj.weight"]
    attention, mlp = "model.layers.3.self_attn.", "model.layers.3.mlp."
    assert server_names(names) == {
        f"{attention}qkv_proj.bias": tuple(f"{attention}{each}_proj.bias" for each in "qkv"),
        f"{mlp}gate_up_proj.weight": (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
    }


def fresh(tmp_path: Path) -> tuple[FakeLearner, FakeEngine, Publisher]:
    """A server with two ranks that has had no publish yet; its probes are always near enough."""
    learner = FakeLearner(tmp_path)
    engine = FakeEngine(learner)
    engine.same_layout = False
    return learner, engine, make_publisher(learner, engine, tolerance=0.5)


def served(tmp_path: Path) -> tuple[FakeLearner, FakeEngine, Publisher]:
    """As `fresh`, after version 1."""
    learner, engine, publisher = fresh(tmp_path)
    attest(learner, engine, hashes_of(learner))
    publish(publisher, learner.announce(1))
    return learner, engine, publisher


def attest(
    learner: FakeLearner, engine: FakeEngine, *hashes: tuple[Mapping[str, str], ...]
) -> None:
    """The next hashes of the server; the learner expects those of its own weights."""
    learner.expected = hashes_of(learner)
    engine.hashes = [*hashes]


def nudge(learner: FakeLearner) -> None:
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(1e-4)


def test_a_server_with_the_learners_hashes_passes_though_its_probe_decides_nothing(
    tmp_path: Path,
) -> None:
    learner, engine, publisher = served(tmp_path)
    for version in range(2, 9):
        nudge(learner)
        attest(learner, engine, hashes_of(learner))
        publish(publisher, learner.announce(version))
    assert publisher.outcomes["passed"] >= 7
    assert publisher.outcomes["mismatch"] == 0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [DOWN, QKV])
def test_one_stale_tensor_on_one_rank_of_a_server_is_found_and_named(
    rank: int, name: str, tmp_path: Path
) -> None:
    learner, engine, publisher = served(tmp_path)
    old = hashes_of(learner)
    nudge(learner)
    new = hashes_of(learner)
    stale = tuple(
        {**each, name: old[number][name]} if number == rank else each
        for number, each in enumerate(new)
    )
    attest(learner, engine, stale, new)  # right after its reload
    publish(publisher, learner.announce(2))
    assert publisher.outcomes["mismatch"] == 1
    assert engine.quarantined == [2]
    nudge(learner)
    attest(learner, engine, stale, stale)
    line = "rollout-0 serves another .*weight on its rank [01] "
    with pytest.raises(HandshakeError, match=line):
        publish(publisher, learner.announce(3))


def test_swapped_tensors_of_a_server_are_found(tmp_path: Path) -> None:
    learner, engine, publisher = served(tmp_path)
    nudge(learner)
    new = hashes_of(learner)
    gate_up = "model.layers.0.mlp.gate_up_proj.weight"
    swapped = tuple({**each, DOWN: each[gate_up], gate_up: each[DOWN]} for each in new)
    attest(learner, engine, swapped, new)
    publish(publisher, learner.announce(2))
    assert publisher.outcomes["mismatch"] == 1


def test_tensors_that_a_server_holds_in_a_form_of_its_own_are_not_compared(
    tmp_path: Path,
) -> None:
    """On all ranks and layers; the publisher tells it once."""
    learner, engine, publisher = fresh(tmp_path)
    told = []
    for version in range(1, 20):
        nudge(learner)
        packed = tuple(
            {**each, DOWN: f"{version:015x}{rank}"} for rank, each in enumerate(hashes_of(learner))
        )
        attest(learner, engine, packed)
        publish(publisher, learner.announce(version))
        told.append(publisher.uncompared())
    assert publisher.outcomes["mismatch"] == 0
    assert told == [()] * 15 + [("model.layers.mlp.down_proj.weight",)] + [()] * 3


def test_a_rank_that_was_wrong_from_the_first_publish_on_is_found(tmp_path: Path) -> None:
    """The other rank proves the form of the tensor."""
    learner, engine, publisher = fresh(tmp_path)
    new = hashes_of(learner)
    wrong = (new[0], {**new[1], QKV: "0" * 16})
    attest(learner, engine, wrong, wrong)
    line = f"rollout-0 serves another {QKV} on its rank 1 .hash 0{{16}}. than the learner published"
    with pytest.raises(HandshakeError, match=line):
        publish(publisher, learner.announce(1))


def test_a_tensor_that_was_wrong_in_one_engine_only_is_found(tmp_path: Path) -> None:
    """Both ranks have it wrong, and no other tensor is of its kind; the other engine is right."""
    learner = FakeLearner(tmp_path)
    engines = [FakeEngine(learner, "rollout-0"), FakeEngine(learner, "rollout-1")]
    publisher = make_publisher(learner, *engines, tolerance=0.5)
    learner.expected = new = hashes_of(learner)
    embedding = "model.embed_tokens.weight"
    for engine in engines:
        engine.same_layout = False
    wrong = tuple({**each, embedding: "f" * 16} for each in new)
    engines[0].hashes = [wrong, wrong]
    engines[1].hashes = [new, new]
    with pytest.raises(HandshakeError, match=f"rollout-0 serves another {embedding}"):
        publish(publisher, learner.announce(1))


def test_stale_experts_on_one_rank_are_found_and_named(tmp_path: Path) -> None:
    config, weights = mixture()
    learner, engine, publisher = fresh(tmp_path)
    given = server_hashes(weights, config, tensor_parallel=2, cuda=False)
    learner.expected = given
    engine.hashes = [given]
    publish(publisher, learner.announce(1))
    weights["model.layers.0.mlp.experts.3.up_proj.weight"][3, 2] += 1e-3  # of rank 1
    nudge(learner)
    learner.expected = server_hashes(weights, config, tensor_parallel=2, cuda=False)
    stale = tuple({**each, "model.norm.weight": "new"} for each in given)
    engine.hashes = [stale, stale]
    line = r"another model.layers.0.mlp.experts.w13_weight on its rank 1 "
    with pytest.raises(HandshakeError, match=line):
        publish(publisher, learner.announce(2))


def test_a_kind_is_a_tensor_without_its_layer_and_all_norms_are_one() -> None:
    names = [DOWN, DOWN.replace("0", "17"), "model.layers.2.mlp.experts.w2_weight"]
    assert [*map(kind_of, names)] == [
        "model.layers.mlp.down_proj.weight",
        "model.layers.mlp.down_proj.weight",
        "model.layers.mlp.experts.w2_weight",
    ]
    norms = ("model.norm.weight", "model.layers.1.self_attn.q_norm.weight")
    assert {*map(kind_of, norms)} == {"norm"}


@pytest.mark.parametrize("refused", [(0,), (1,), (0, 1)], ids=str)
def test_servers_that_refuse_a_checksum_once_end_no_run(
    refused: tuple[int, ...], tmp_path: Path
) -> None:
    learner = FakeLearner(tmp_path)
    engines = [FakeEngine(learner, f"rollout-{number}") for number in range(2)]
    publisher = make_publisher(learner, *engines, tolerance=0.5)
    for engine in engines:
        engine.same_layout = False
    for version in range(1, 6):
        nudge(learner)
        learner.expected = new = hashes_of(learner)
        for number, engine in enumerate(engines):
            engine.hashes = [] if version in (1, 3) and number in refused else [new]
        publish(publisher, learner.announce(version))
    assert publisher.outcomes["mismatch"] == 0
    assert publisher.num_served == 5


def test_the_checksums_of_others_are_compared_though_the_first_server_sent_none(
    tmp_path: Path,
) -> None:
    learner = FakeLearner(tmp_path)
    engines = [FakeEngine(learner, f"rollout-{number}") for number in range(3)]
    publisher = make_publisher(learner, *engines, tolerance=0.5)
    for engine, checksums in zip(engines, ([], ["a"], ["b", "b"]), strict=True):
        engine.same_layout, engine.own_checksums = False, checksums
    with pytest.raises(HandshakeError, match="rollout-2 serves weights b, rollout-1 a, both as"):
        publish(publisher, learner.announce(1))


class NoisyEngine(FakeEngine):
    """A server without hashes whose kernels round differently at each call."""

    def _load(self, announcement: Announcement, weights: Mapping[str, torch.Tensor]) -> Attestation:
        exact = super()._load(announcement, weights)
        random = np.random.default_rng(announcement.version)
        before, after = (
            announcement.probe_logprobs + random.choice([-0.2, 0.2], len(exact.probe_after))
            for _ in range(2)
        )
        return replace(
            exact,
            probe_before=before.astype(np.float32),
            probe_after=after.astype(np.float32),
        )


def test_ten_inconclusive_handshakes_in_a_row_end_the_run_with_one_line(tmp_path: Path) -> None:
    learner = FakeLearner(tmp_path)
    engine = NoisyEngine(learner)
    engine.same_layout = False
    publisher = make_publisher(learner, engine, tolerance=0.5)
    publish(publisher, learner.announce(1))
    for version in range(2, 11):
        nudge(learner)
        publish(publisher, learner.announce(version))
    nudge(learner)
    line = "handshake of rollout-0 was inconclusive 10 times in a row although the learner's"
    with pytest.raises(HandshakeError, match=line):
        publish(publisher, learner.announce(11))


def test_answers_that_come_nearer_with_each_update_end_no_run(tmp_path: Path) -> None:
    learner = FakeLearner(tmp_path)
    engine = FakeEngine(learner)
    engine.same_layout = False
    publisher = make_publisher(learner, engine, tolerance=0.5)
    for version in range(1, 20):
        nudge(learner)
        publish(publisher, learner.announce(version))
    assert publisher.outcomes == {"passed": 1, "inconclusive": 18}


def test_inconclusive_handshakes_of_unchanged_weights_are_no_fault(tmp_path: Path) -> None:
    learner = FakeLearner(tmp_path)
    publisher = make_publisher(learner, FakeEngine(learner, seed=0))
    for version in range(1, 9):
        publish(publisher, learner.announce(version))
    assert publisher.outcomes == {"inconclusive": 8}
