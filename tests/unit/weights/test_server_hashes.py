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

from dapo_async.weights import Announcement, Attestation
from dapo_async.weights.publisher import HandshakeError, Publisher
from dapo_async.weights.server_hashes import cuda_hash, server_hashes, server_names

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


def test_only_so_many_bytes_are_hashed_and_others_each_time() -> None:
    weights = {f"model.layers.{layer}.mlp.down_proj.weight": torch.ones(8, 8) for layer in range(9)}
    seen: set[str] = set()
    for _ in range(60):
        (given,) = server_hashes(weights, TINY, tensor_parallel=1, cuda=False, most_bytes=600)
        assert len(given) == 2
        seen |= given.keys()
    assert seen == weights.keys()


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


def served(tmp_path: Path) -> tuple[FakeLearner, FakeEngine, Publisher]:
    """A server with two ranks that serves version 1; its probes are always near enough."""
    learner = FakeLearner(tmp_path)
    engine = FakeEngine(learner)
    engine.same_layout = False
    publisher = make_publisher(learner, engine, tolerance=0.5)
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


def test_tensors_that_a_server_holds_in_a_layout_of_its_own_are_not_compared(
    tmp_path: Path,
) -> None:
    learner = FakeLearner(tmp_path)
    engine = FakeEngine(learner)
    engine.same_layout = False
    publisher = make_publisher(learner, engine, tolerance=0.5)
    for version in range(1, 4):
        nudge(learner)
        packed = tuple({**each, DOWN: f"{version:016x}"} for each in hashes_of(learner))
        attest(learner, engine, packed)
        publish(publisher, learner.announce(version))
    assert publisher.outcomes["mismatch"] == 0


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
