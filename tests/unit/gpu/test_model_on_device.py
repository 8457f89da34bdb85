"""The decoder's parts on the device, each against an independent form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_place import Place, distance
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from triton_kernels import import_fused_head

from dapo_async.learner.optimizer import ShardedAdamW
from dapo_async.model import PackedAttention, send, token_logprobs
from dapo_async.model.transfer import Fetcher

pytestmark = pytest.mark.gpu
CONFIGS: dict[str, Any] = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
DTYPES = (torch.float32, torch.bfloat16)
BOUND = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}  # of `distance`: some roundings


def hugging_face(place: Place, family: str, weights: dict[str, Tensor]) -> Any:
    config = CONFIGS[family](
        **place.sizes, tie_word_embeddings=family == "qwen2", bos_token_id=None, eos_token_id=None
    )
    model = AutoModelForCausalLM.from_config(config).to(place.device)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_is_as_near_to_float32_as_in_hugging_face(place: Place, family: str) -> None:
    """Logprobs and the gradients of all parameters."""
    decoder = place.decoder(family)
    weights = decoder.state_dict()
    ids = torch.randint(0, place.sizes["vocab_size"], (place.length,), device=place.device)
    scale = torch.randn(place.length - 1, device=place.device)

    def theirs(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        model = hugging_face(place, family, weights).to(dtype)
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        chosen = logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
        (chosen * scale).sum().backward()
        gradients = {
            name: each.grad for name, each in model.named_parameters() if each.grad is not None
        }
        return chosen.detach(), gradients

    exact, exact_gradients = theirs(torch.float32)
    half, half_gradients = theirs(place.half)
    decoder.activations = place.half
    attention = PackedAttention([place.length], device=place.device)
    logprobs, _ = decoder.score(
        ids,
        attention.positions,
        attention,
        predictors=torch.arange(place.length - 1, device=place.device),
        targets=ids[1:],
        temperatures=torch.ones(place.length - 1, device=place.device),
    )
    (logprobs * scale).sum().backward()
    assert distance(logprobs.detach(), exact) <= 1.5 * distance(half, exact) + 1e-3
    own_gradients = {
        name: each.grad for name, each in decoder.named_parameters() if each.grad is not None
    }
    assert own_gradients.keys() == dict(decoder.named_parameters()).keys()
    ours, near, right = (
        torch.cat([gradients[name].float().flatten() for name in own_gradients])
        for gradients in (own_gradients, half_gradients, exact_gradients)
    )
    assert distance(ours, right) <= 2.0 * distance(near, right) + 1e-2


def naive_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence in float64: `query [T, H, D]`, `key, value [T, KV, D]`."""
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (each.double().transpose(0, 1) for each in (query, key, value))
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    mixed: Tensor = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    return mixed.transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shares", [False, True], ids=["apart", "shared prompt"])
def test_packed_attention_is_causal_within_each_sequence(
    place: Place, dtype: torch.dtype, shares: bool
) -> None:
    prompt = range(place.length // 4)
    lengths = [place.length // 2, place.length // 2, place.length, 1]
    shared = [range(0), prompt, prompt, range(0)] if shares else [range(0)] * 4
    own = [length - len(prefix) for length, prefix in zip(lengths, shared, strict=True)]
    heads, kv_heads, width = 4, 2, 64 if place.on_gpu else 8
    qkv = [
        torch.randn(sum(own), count, width, device=place.device).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]
    scale = torch.randn(sum(own), heads, width, device=place.device)
    attention = PackedAttention(lengths, shared=shared, device=place.device)
    found = attention(0, *qkv)
    (found.float() * scale).sum().backward()
    gradients = [each.grad for each in qkv]

    leaves = [each.detach().double().requires_grad_() for each in qkv]
    outputs, start = [], 0
    for index, count in enumerate(own):
        prefix = shared[index]
        rows = [*prefix, *range(start, start + count)]
        outputs.append(naive_attention(*(each[rows] for each in leaves))[len(prefix) :])
        start += count
    expected = torch.cat(outputs)
    (expected * scale).sum().backward()
    assert found.dtype is dtype
    assert distance(found.detach(), expected.detach()) <= BOUND[dtype]
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient is not None
        assert leaf.grad is not None
        assert distance(gradient, leaf.grad) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["torch", "kernels"])
def test_head_in_chunks_equals_the_whole_softmax(
    place: Place, form: str, dtype: torch.dtype
) -> None:
    if form == "kernels":
        import_fused_head()  # on a CPU with an interpreter
    count, width, vocabulary = place.length, place.sizes["hidden_size"], place.sizes["vocab_size"]
    hidden = torch.randn(count, width, device=place.device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=place.device) / width**0.5).to(dtype)
    weight.requires_grad_()
    targets = torch.randint(0, vocabulary, (count,), device=place.device)
    temperatures = torch.rand(count, device=place.device) + 0.5
    scales = torch.randn(2, count, device=place.device)
    found = token_logprobs(
        hidden, weight, targets, temperatures, chunk_tokens=count // 3, fused=form == "kernels"
    )
    sum((each * scale).sum() for each, scale in zip(found, scales, strict=True)).backward()

    leaves = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    log_p = (leaves[0] @ leaves[1].t() / temperatures[:, None]).log_softmax(-1)
    expected = log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    sum((each * scale).sum() for each, scale in zip(expected, scales, strict=True)).backward()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is torch.float32
        assert distance(ours.detach(), theirs.detach()) <= 2e-5
    for ours_leaf, leaf in zip((hidden, weight), leaves, strict=True):
        assert ours_leaf.grad is not None
        assert leaf.grad is not None
        assert distance(ours_leaf.grad, leaf.grad) <= BOUND[dtype]


@pytest.mark.parametrize("offload", [False, True])
def test_fused_adamw_equals_torchs_own(place: Place, offload: bool) -> None:
    def layer() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(place.sizes["hidden_size"], 40).to(place.device)

    ours, theirs = layer(), layer()
    sharded = ShardedAdamW(ours, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999), offload=offload)
    plain = torch.optim.AdamW(
        [
            {"params": [theirs.weight], "weight_decay": 0.1},
            {"params": [theirs.bias], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    for _ in range(3):
        gradients = [torch.randn_like(each) for each in theirs.parameters()]
        for layer_ in (ours, theirs):
            for parameter, gradient in zip(layer_.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
        sharded.step(lr=1e-2)
        plain.step()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.device.type == place.device
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    places = {moment.device.type for _, _, moment in sharded.moments()}
    assert places == ({"cpu"} if offload else {place.device})


def test_copies_to_the_device_arrive_in_order(place: Place) -> None:
    """The host may reuse or drop its memory at once."""
    total = torch.zeros(1000, dtype=torch.long, device=place.device)
    for number in range(50):
        total += send(torch.full((1000,), number), place.device)
    assert total.unique().tolist() == [sum(range(50))]


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 5000])
def test_fetched_tensors_are_the_same_in_pageable_memory(place: Place, count: int) -> None:
    """In one block, in two, in many, and with a block that is used again at once."""
    fetcher = Fetcher(torch.device(place.device), block_bytes=2048)
    for dtype in (torch.bfloat16, torch.float32, torch.int64):
        values = torch.randn(count, 3, device=place.device).mul(9).to(dtype)
        found = fetcher.fetch(values.t())
        assert found.device.type == "cpu"
        assert not found.is_pinned()
        assert torch.equal(found, values.t().cpu())
