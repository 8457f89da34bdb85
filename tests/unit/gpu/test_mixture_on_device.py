"""Experts on the device, against a loop over the pairs in float64."""

from __future__ import annotations

import pytest
import torch
from gpu_place import Place, distance
from torch import Tensor

from dapo_async.model import ModelConfig
from dapo_async.model.mesh import ALONE
from dapo_async.model.mixture import Mixture, Routing, grouped_product

pytestmark = pytest.mark.gpu
BOUND = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}  # of `distance`: some roundings
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 0, 5, 1), (0, 0, 9, 0), (0, 0, 0, 0)], ids=str)
def test_the_rows_of_each_expert_meet_its_own_matrix(
    place: Place, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Experts without a row, too: forward and the gradients of rows and matrices."""
    scale = place.length // 8 if place.on_gpu else 1
    counts = torch.tensor(sizes) * scale
    width, height = (256, 384) if place.on_gpu else (16, 24)
    x, weights = (
        torch.randn(*shape, device=place.device).to(dtype).requires_grad_()
        for shape in ((int(counts.sum()), width), (len(sizes), height, width))
    )
    ends = counts.cumsum(0).to(torch.int32).to(place.device)
    found = grouped_product(x, weights, ends)
    factors = torch.randn(found.shape, device=place.device)
    (found.float() * factors).sum().backward()

    leaves = [each.detach().double().requires_grad_() for each in (x, weights)]
    rows = leaves[0].split(counts.tolist())
    expected = torch.cat([part @ one.t() for part, one in zip(rows, leaves[1], strict=True)])
    (expected * factors).sum().backward()
    assert found.dtype is dtype
    assert found.shape == expected.shape
    if not len(x):
        return
    assert distance(found.detach(), expected.detach()) <= BOUND[dtype]
    for leaf, exact in zip((x, weights), leaves, strict=True):
        assert leaf.grad is not None
        assert exact.grad is not None
        assert distance(leaf.grad, exact.grad) <= BOUND[dtype]


def loop(mixture: Mixture, x: Tensor, experts: Tensor) -> Tensor:
    """The module's formula token by token and expert by expert, with the given experts."""
    inner, width = mixture.experts.inner_size, x.shape[1]
    gate_up = mixture.experts.gate_up_proj.double().view(-1, 2 * inner, width)
    down = mixture.experts.down_proj.double().view(-1, width, inner)
    probabilities = (x @ mixture.gate.weight.double().t()).softmax(-1).gather(1, experts)
    shares = probabilities / probabilities.sum(-1, keepdim=True)
    rows = []
    for token, (own, weights) in enumerate(zip(experts.tolist(), shares, strict=True)):
        row = torch.zeros_like(x[token])
        for number, weight in zip(own, weights, strict=True):
            gate, up = (gate_up[number] @ x[token]).chunk(2)
            row = row + weight * (down[number] @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_of_experts_equals_a_loop_over_tokens_and_experts(
    place: Place, dtype: torch.dtype
) -> None:
    config = ModelConfig.from_dict(
        {
            **place.sizes,
            "model_type": "qwen3_moe",
            "moe_intermediate_size": place.sizes["intermediate_size"] // 2,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        }
    )
    torch.manual_seed(0)
    tokens = 40
    mixture = Mixture(config, 0, ALONE).to(place.device)
    x = torch.randn(tokens, config.hidden_size, device=place.device)
    # Given experts: half precision would choose others where two are nearly as good.
    experts = torch.rand(tokens, 6, device=place.device).topk(2).indices
    half = x.to(dtype).requires_grad_()
    found = mixture(half, Routing(experts[:, None]), tokens)
    factors = torch.randn_like(x)
    (found.float() * factors).sum().backward()
    gradients = {name: each.grad for name, each in mixture.named_parameters()}
    mixture.zero_grad()

    exact = half.detach().double().requires_grad_()
    expected = loop(mixture, exact, experts)
    (expected * factors).sum().backward()
    bound = 2 * BOUND[dtype]  # three products, one after the other
    assert distance(found.detach(), expected.detach()) <= bound
    assert half.grad is not None
    assert exact.grad is not None
    assert distance(half.grad, exact.grad) <= bound
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None
        gradient = gradients[name]
        assert gradient is not None
        assert distance(gradient, parameter.grad) <= bound, name
