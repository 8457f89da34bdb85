"""Qwen3-MoE against transformers: logits, gradients, folders of both forms. Routing, the kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_mixture import SIZES, hugging_face
from torch import Tensor
from transformers import AutoModelForCausalLM

from dapo_async.model import (
    Decoder,
    Layout,
    ModelConfig,
    PackedAttention,
    ShardCopy,
    checksum,
    checksum_of_parts,
    export_folder,
    find_weights,
    folder_for_sglang,
    load_decoder,
)
from dapo_async.model.cost import token_flops
from dapo_async.model.expert_names import folder_shapes, one_by_one
from dapo_async.model.mesh import Mesh
from dapo_async.model.mixture import Mixture, Routing, grouped_product
from dapo_async.model.mixture import one_by_one as product_one_by_one

FORMS: dict[str, dict[str, Any]] = {
    "all layers": {},
    "weights not normalised": {"norm_topk_prob": False},
    "every second layer": {"decoder_sparse_step": 2},
    "first layer dense": {"mlp_only_layers": [0], "num_experts_per_tok": 3},
}
SEQUENCES = (4, 7, 7, 2, 11)


def drawn(lengths: tuple[int, ...] = SEQUENCES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 61, (length,), generator=generator) for length in lengths]


def own_logits(decoder: Decoder, ids: list[Tensor], routing: Routing | None = None) -> Tensor:
    attention = PackedAttention([len(each) for each in ids])
    return decoder.logits(decoder(torch.cat(ids), attention.positions, attention, routing))


@pytest.mark.parametrize("form", FORMS)
def test_logits_and_gradients_equal_transformers(form: str, tmp_path: Path) -> None:
    model = hugging_face(tmp_path, **FORMS[form])
    decoder, ids = load_decoder(tmp_path), drawn()
    expected = torch.cat([model(each[None]).logits[0] for each in ids])
    logits = own_logits(decoder, ids)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    (expected * weights).sum().backward()
    (logits * weights).sum().backward()
    gradients = dict(model.named_parameters())
    for name, parameter in decoder.named_parameters():
        gradient = gradients[name].grad.reshape(parameter.shape)
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("recompute", ["mlp", "all"])
def test_recomputation_changes_no_gradient(recompute: Any, tmp_path: Path) -> None:
    hugging_face(tmp_path)
    plain, saving = load_decoder(tmp_path), load_decoder(tmp_path)
    saving.recompute(recompute)
    for decoder in (plain, saving):
        own_logits(decoder, drawn()).square().sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=0, rtol=0)


@pytest.mark.parametrize("stacked", [False, True])
def test_both_forms_of_a_folder_load_and_the_exported_one_has_single_experts(
    stacked: bool, tmp_path: Path
) -> None:
    model = hugging_face(tmp_path / "base", stacked=stacked)
    config = ModelConfig.from_folder(tmp_path / "base")
    decoder = load_decoder(tmp_path / "base")
    weights = decoder.state_dict()
    export_folder(
        {name: tuple(tensor.shape) for name, tensor in weights.items()},
        lambda names: {name: weights[name] for name in names},
        dtype=torch.float32,
        base=tmp_path / "base",
        out=tmp_path / "out",
        file_bytes=30_000,  # several files
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(folder_shapes(config))
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_sglang_gets_single_experts_from_a_folder_of_stacked_ones(tmp_path: Path) -> None:
    hugging_face(tmp_path / "base", stacked=True)
    config = ModelConfig.from_folder(tmp_path / "base")
    folder = folder_for_sglang(tmp_path / "base", config, scratch=tmp_path / "scratch")
    assert folder == tmp_path / "scratch"
    single = load_file(folder / "model-embedding.safetensors")
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    found = find_weights(tmp_path / "base", config).tensors[name].read()
    torch.testing.assert_close(single[name], found, atol=0, rtol=0)
    stacked = load_file(tmp_path / "base" / "model.safetensors")
    expected = stacked["model.layers.1.mlp.experts.gate_up_proj"][4, 16:]
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_published_weights_have_the_names_of_the_folder_and_one_content_sum(
    tmp_path: Path,
) -> None:
    hugging_face(tmp_path)
    decoder = load_decoder(tmp_path)
    copy = ShardCopy.of(decoder, Layout.of(decoder, Mesh()), torch.float32)
    published = copy.whole()
    assert copy.checksum() == checksum(published)
    assert [name for _, name, _ in copy.tensors()] == [*published]
    stored = load_file(tmp_path / "model.safetensors")
    assert set(published) == set(stored)
    for name, tensor in stored.items():
        torch.testing.assert_close(published[name], tensor, atol=0, rtol=0)
    assert checksum(published) == checksum_of_parts(decoder, Mesh(), torch.float32)
    live = one_by_one(dict(decoder.named_parameters()), decoder.config)
    live["model.layers.0.mlp.experts.1.down_proj.weight"].detach()[0, 0] += 1
    assert checksum(published) != checksum_of_parts(decoder, Mesh(), torch.float32)


def test_given_experts_are_used_with_the_weights_of_the_own_router(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    decoder, ids = load_decoder(tmp_path), drawn()
    free = Routing()
    logits = own_logits(decoder, ids, free)
    chosen = free.chosen()
    assert chosen.shape == (sum(SEQUENCES), 3, 2)
    assert free.load(6).sum(1).tolist() == [2 * sum(SEQUENCES)] * 3
    same = Routing(chosen)
    torch.testing.assert_close(own_logits(decoder, ids, same), logits, atol=0, rtol=0)
    assert int(same.replaced()) == 0
    # The first token uses other experts in the last layer; −1 leaves the others to the router.
    given = torch.full_like(chosen, -1)
    given[0] = chosen[0]
    other = [e for e in range(6) if e not in chosen[0, 2].tolist()][:2]
    given[0, 2] = torch.tensor(other)
    forced = Routing(given)
    changed = own_logits(decoder, ids, forced)
    assert int(forced.replaced()) == 2
    assert forced.chosen()[0, 2].tolist() == other
    assert (changed - logits)[0].abs().max() > 1e-3
    torch.testing.assert_close(changed[1:], logits[1:], atol=0, rtol=0)
    # By hand: softmax over all experts, taken at the given ones and normalised.
    mixture = decoder.model.layers[2].mlp
    assert isinstance(mixture, Mixture)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    experts = torch.tensor([[0, 5], [1, 2], [4, 3], [2, 0]])
    routing = Routing(experts[:, None].expand(-1, 3, -1))
    expected = torch.zeros(4, 32)
    probabilities = (x @ mixture.gate.weight.T).softmax(-1)
    live = one_by_one(dict(decoder.named_parameters()), decoder.config)
    for token, row in enumerate(experts.tolist()):
        for expert in row:
            stem = f"model.layers.2.mlp.experts.{expert}."
            gate, up, down = (live[f"{stem}{each}_proj.weight"] for each in ("gate", "up", "down"))
            inner = torch.nn.functional.silu(gate @ x[token]) * (up @ x[token])
            weight = probabilities[token, expert] / probabilities[token, row].sum()
            expected[token] += weight * (down @ inner)
    torch.testing.assert_close(mixture(x, routing, 4), expected, atol=1e-6, rtol=1e-5)


def test_the_kernel_for_groups_equals_one_product_per_expert() -> None:
    """On a CPU torch's kernel for groups is a loop; this checks how it is called."""
    torch.manual_seed(0)
    ends = torch.tensor([3, 3, 9, 16], dtype=torch.int32)
    factor = torch.randn(16, 8).bfloat16()
    results = []
    for product in (product_one_by_one, grouped_on_cpu):
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
        weights = torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(2)).bfloat16()
        x.requires_grad_()
        weights.requires_grad_()
        y = product(x, weights, ends)
        (y * factor).sum().backward()
        results.append((y, x.grad, weights.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=0.07, rtol=0.02)


def grouped_on_cpu(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(x, weights.transpose(1, 2), offs=ends)


def test_a_pass_in_which_an_expert_or_all_have_no_token_has_zero_gradients() -> None:
    weights = torch.randn(3, 5, 4, requires_grad=True)
    y = grouped_product(torch.randn(2, 4), weights, torch.tensor([0, 2, 2], dtype=torch.int32))
    y.sum().backward()
    assert weights.grad is not None
    assert weights.grad.abs().sum((1, 2)).gt(0).tolist() == [False, True, False]
    none = torch.zeros(3, dtype=torch.int32)
    assert grouped_product(torch.randn(0, 4), weights, none).shape == (0, 5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"num_experts_per_tok": 7},
            r"num_experts_per_tok \(7\) must be at most num_experts \(6\)",
        ),
        ({"mlp_only_layers": [0, 1, 2]}, "no layer has experts"),
        ({"mlp_only_layers": "first"}, "must be a list of layer numbers"),
        ({"moe_intermediate_size": None}, r"moe_intermediate_size \(missing\)"),
    ],
)
def test_a_broken_config_is_refused_by_its_key(changed: dict[str, Any], message: str) -> None:
    values = {**SIZES, "model_type": "qwen3_moe", "rms_norm_eps": 1e-6, **changed}
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(values)


def test_experts_must_divide_over_the_ranks_and_a_token_costs_what_it_uses() -> None:
    config = ModelConfig.from_dict({**SIZES, "model_type": "qwen3_moe", "rms_norm_eps": 1e-6})
    config.check_split(2)
    with pytest.raises(ValueError, match=r"num_experts 6.*set it to one of 1, 2"):
        config.check_split(4)
    attention = 32 * (2 * 32 + 2 * 16)
    assert token_flops(config) == 2 * 3 * (attention + 32 * 6 + 2 * 3 * 32 * 16)
