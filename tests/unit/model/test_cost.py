"""FLOPs and bytes of a decoder: by hand, and against torch's counter on the decoder itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from native_engine_world import tiny_decoder
from parallel_world import MIXTURE
from torch.utils.flop_counter import FlopCounterMode

from dapo_async.model import Decoder, ModelConfig, PackedAttention
from dapo_async.model.config import Recompute
from dapo_async.model.cost import (
    BACKWARD,
    causal_pairs,
    decode_bytes,
    decode_flops,
    forward_flops,
    head_flops,
    pair_flops,
    prefill_flops,
    recomputed_flops,
    token_flops,
    train_flops,
    weight_bytes,
)
from dapo_async.model.peak import TERA, device_peak, known_peak

HAND = ModelConfig.from_dict(
    {
        "model_type": "qwen2",
        "vocab_size": 10,
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
    }
)
# One layer: query and output 4 x 4 each, key and value 4 x 2 each, three products 4 x 6 of the MLP.
LAYER = 2 * (4 * 4 + 4 * 4 + 4 * 2 + 4 * 2 + 3 * 4 * 6)
PAIR = 4 * 2 * 2  # score and weighted sum of two heads of size 2
HEAD = 2 * 4 * 10


def test_flops_of_a_tiny_model_equal_a_count_by_hand() -> None:
    assert (token_flops(HAND), head_flops(HAND)) == (3 * LAYER, HEAD)
    assert causal_pairs(4) == 1 + 2 + 3 + 4
    assert causal_pairs(4, before=2) == 3 + 4
    assert prefill_flops(HAND, [3, 1]) == 3 * (4 * LAYER + (6 + 1) * PAIR) + 2 * HEAD
    assert decode_flops(HAND, 5, 7.0) == 5 * (3 * LAYER + HEAD + 3 * 7 * PAIR)
    # A prompt of 2 tokens with responses of 3 and 1: 2 + 2 tokens are computed, 4 are predicted.
    pairs = (1 + 2) + (3 + 4)
    forward = 3 * (4 * LAYER + pairs * PAIR) + 4 * HEAD
    assert train_flops(HAND, [(2, [3, 1])]) == 3 * forward
    assert train_flops(HAND, [(2, [3]), (2, [1])]) > train_flops(HAND, [(2, [3, 1])])


def test_bytes_of_a_decode_step_are_weights_once_and_keys_and_values() -> None:
    biases = 3 * (4 + 2 + 2)
    norms = 3 * 2 * 4 + 4
    weights = 3 * (LAYER // 2) + biases + norms + 4 * 10  # the head, not the embedding
    assert weight_bytes(HAND, num_bytes=2) == 2 * weights
    keys_and_values = 2 * 3 * 1 * 2
    expected = 2 * weights + 5 * 7 * keys_and_values * 2
    assert decode_bytes(HAND, 5, 7.0) == expected


def products(counter: FlopCounterMode) -> int:
    """The counted FLOPs without attention."""
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in counts.items() if "scaled" not in str(operator))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_formulas_equal_torchs_count_of_forward_and_backward_pass(family: str) -> None:
    decoder = tiny_decoder(family)
    config, lengths = decoder.config, [9, 5, 12]
    attention = PackedAttention(lengths)
    ids = torch.randint(0, config.vocab_size, (sum(lengths),))
    with FlopCounterMode(display=False) as forward:
        logprobs, _ = decoder.score(
            ids,
            attention.positions,
            attention,
            predictors=torch.arange(len(ids)),
            targets=ids.roll(-1),
            temperatures=torch.ones(len(ids)),
        )
    dense = forward_flops(config, tokens=len(ids), pairs=0, predicted=len(ids))
    assert products(forward) == dense
    # Torch counts attention over the whole square, or not at all where it has no formula for the
    # kernel. A causal model needs the pairs only.
    square = sum(length * length for length in lengths)
    whole = forward_flops(config, tokens=0, pairs=square, predicted=0)
    assert forward.get_total_flops() - products(forward) in (0, whole)
    assert sum(map(causal_pairs, lengths)) < square
    with FlopCounterMode(display=False) as backward:
        logprobs.sum().backward()
    # The head's backward pass computes the logits again, which torch counts. It does not count the
    # product of equal size that adds to the gradient of the weight in place.
    assert products(backward) == BACKWARD * dense


def test_peaks_are_found_by_the_names_that_cuda_gives() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": (989.4, 3.35),
        "NVIDIA H100 PCIe": (756.5, 2.0),
        "NVIDIA H100 NVL": (835.5, 3.9),
        "NVIDIA H200": (989.4, 4.8),
        "NVIDIA H800": (989.4, 3.35),
        "NVIDIA H20": (148.0, 4.0),
        "NVIDIA A100-SXM4-80GB": (312.0, 2.039),
        "NVIDIA A100-SXM4-40GB": (312.0, 1.555),
        "NVIDIA A100-PCIE-40GB": (312.0, 1.555),
        "NVIDIA A100 80GB PCIe": (312.0, 1.935),
        "NVIDIA L40S": (362.0, 0.864),
        "NVIDIA B200": (2250.0, 8.0),
        "NVIDIA GB200": (2500.0, 8.0),
    }
    for name, (tflops, terabytes) in names.items():
        peak = known_peak(name)
        assert peak is not None, name
        assert (peak.flops_per_s, peak.bytes_per_s) == (tflops * TERA, terabytes * TERA), name
        assert not peak.measured
    for name in ("NVIDIA GeForce RTX 4090", "NVIDIA L40", "NVIDIA H2000"):
        assert known_peak(name) is None


def test_peak_of_a_cpu_is_measured_once_per_process() -> None:
    peak = device_peak("cpu")
    assert peak.measured
    assert device_peak("cpu") is peak
    assert 1e9 < peak.flops_per_s < 1e14
    assert 1e8 < peak.bytes_per_s < 1e13


def test_cost_imports_no_torch() -> None:
    modules = "dapo_async.model.cost, dapo_async.model.peak"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("form", ["mlp", "all"])
@pytest.mark.parametrize("extra", [{}, MIXTURE], ids=["dense", "mixture"])
def test_what_is_computed_again_is_what_torch_counts(
    form: Recompute, extra: dict[str, Any]
) -> None:
    config, length = replace(HAND, **extra), 12
    attention, ids = PackedAttention([length]), torch.arange(length) % config.vocab_size

    def counted(form: Recompute) -> int:
        decoder = Decoder(config)
        decoder.recompute(form)
        with FlopCounterMode(display=False) as counter:
            decoder(ids, attention.positions, attention).sum().backward()
        return int(counter.get_total_flops())

    again = recomputed_flops(config, [(0, [length + 1])], form)
    without_attention = again - (form == "all") * causal_pairs(length) * pair_flops(config)
    assert counted(form) - counted("none") == without_attention
    assert recomputed_flops(config, [(0, [length + 1])], "none") == 0
