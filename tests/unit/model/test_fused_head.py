"""The head's Triton kernels against the form in torch and against float64.

Without a GPU they run in Triton's interpreter, and are compiled for GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gpu_place import distance
from torch import Tensor
from triton_kernels import import_fused_head

from dapo_async.model import head_softmax, token_logprobs
from dapo_async.model.mesh import Axis

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of `distance`. The second is one rounding; Triton's interpreter cuts off instead.
BOUND = {torch.float32: 5e-6, torch.bfloat16: 2**-7}
COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dapo_async.model import fused_head as head

floats, counts = "*fp32", "i32"
row = {"logits": floats, "targets": "*i64", "temperature": floats}
forward = row | {"out": floats, "num_rows": counts, "width": counts, "BLOCK": "constexpr"}
backward = row | {"log_z": floats, "entropies": floats, "of_logprobs": floats}
for major in (80, 90):
    target = GPUTarget("cuda", major, 32)
    source = ASTSource(head.statistics_kernel, forward, {"BLOCK": head.FORWARD_BLOCK})
    assert compile(source, target=target).asm["cubin"]
    for kind in ("fp32", "bf16"):
        for entropies in (floats, "constexpr"):
            signature = backward | {
                "of_entropies": entropies, "out": f"*{kind}", "width": counts, "BLOCK": "constexpr"
            }
            constants = {"BLOCK": head.BACKWARD_BLOCK}
            constants |= {"of_entropies": None} if entropies == "constexpr" else {}
            source = ASTSource(head.gradient_kernel, signature, constants)
            assert compile(source, target=target).asm["cubin"]
"""


@pytest.fixture(scope="module")
def fused_head() -> ModuleType:
    return import_fused_head()


@pytest.fixture(params=[1, 97, 1024, 4096, 9001], ids=lambda width: f"{width} columns")
def chunk(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """Logits of a few rows, some of whose targets other shards have."""
    torch.manual_seed(request.param)
    width, rows = request.param, 5
    targets = torch.tensor([0, width - 1, width // 2, -3, width + 1])
    chunk = {
        "logits": 8.0 * torch.randn(rows, width),
        "targets": targets,
        "temperature": torch.tensor([1.0, 0.6, 1.3, 0.25, 2.0]),
    }
    return {name: each.to(DEVICE) for name, each in chunk.items()}


def exact(chunk: dict[str, Tensor]) -> Tensor:
    """`statistics` in float64."""
    scaled = chunk["logits"].double() / chunk["temperature"].double()[:, None]
    top, width = scaled.amax(-1), scaled.shape[1]
    powers = (scaled - top[:, None]).exp()
    chosen = [
        float(row[target]) if 0 <= target < width else 0.0
        for row, target in zip(scaled, chunk["targets"].tolist(), strict=True)
    ]
    weighted = (powers * (scaled - top[:, None])).sum(-1)
    return torch.stack((top, powers.sum(-1), weighted, torch.tensor(chosen, device=top.device)))


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_four_numbers_of_a_shard_are_those_of_float64(
    form: str, chunk: dict[str, Tensor], fused_head: ModuleType
) -> None:
    softmax: Any = fused_head if form == "triton" else head_softmax
    expected = exact(chunk)
    found = softmax.statistics(**chunk)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("of", ["logprobs", "entropies", "both"])
def test_gradient_of_the_logits_is_that_of_torch(
    of: str, dtype: torch.dtype, chunk: dict[str, Tensor], fused_head: ModuleType
) -> None:
    top, total, weighted, _ = head_softmax.statistics(**chunk | {"logits": chunk["logits"].clone()})
    given = {
        **chunk,
        "log_z": top + total.log(),
        "entropies": total.log() - weighted / total,
        "of_logprobs": None if of == "entropies" else torch.randn_like(top),
        "of_entropies": None if of == "logprobs" else torch.randn_like(top),
    }
    double = {
        name: each.double() if isinstance(each, Tensor) and each.is_floating_point() else each
        for name, each in given.items()
    }
    expected = head_softmax.gradient(**double, dtype=torch.float64)
    found = fused_head.gradient(**given, dtype=dtype)
    assert found.dtype is dtype
    assert found.shape == expected.shape
    if expected.abs().max() > 1e-6:  # one column: there is nothing to choose
        assert distance(found, expected) <= BOUND[dtype]
    in_place = found.data_ptr() == chunk["logits"].data_ptr()
    assert in_place == (dtype is torch.float32)


class Shard(Axis):
    """An axis of two ranks in one process: what the other rank sends is given."""

    def __init__(self, rank: int, other: Tensor) -> None:
        super().__init__(rank, 2)
        object.__setattr__(self, "other", other)

    def stack(self, tensor: Tensor) -> Tensor:
        parts = [tensor, self.other] if self.rank == 0 else [self.other, tensor]  # type: ignore[attr-defined]
        return torch.stack(parts)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_head_over_two_shards_of_the_vocabulary_equals_the_chunked_one(
    dtype: torch.dtype, fused_head: ModuleType
) -> None:
    """Values, and the gradients of hidden states and weight."""
    torch.manual_seed(0)
    rows, width, vocabulary, first = 11, 16, 1333, 700
    hidden = torch.randn(rows, width, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, device=DEVICE).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    temperature = torch.linspace(0.5, 2.0, rows, device=DEVICE)
    scales = torch.randn(2, rows, device=DEVICE)

    def outcome(results: tuple[Tensor, Tensor]) -> list[Tensor]:
        loss = sum((each * scale).sum() for each, scale in zip(results, scales, strict=True))
        assert isinstance(loss, Tensor)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        return [*(each.detach() for each in results), *gradients]

    whole = outcome(token_logprobs(hidden, weight, targets, temperature, chunk_tokens=4))
    alone = outcome(
        token_logprobs(hidden, weight, targets, temperature, chunk_tokens=4, fused=True)
    )
    shards = [(0, slice(0, first)), (first, slice(first, vocabulary))]
    sent = [
        fused_head.statistics(
            hidden.detach().float() @ weight.detach()[part].float().t(),
            targets - start,
            temperature,
        )
        for start, part in shards
    ]
    both = [
        outcome(
            token_logprobs(
                hidden,
                weight[part],
                targets,
                temperature,
                chunk_tokens=4,
                tp=Shard(rank, sent[1 - rank]),
                vocab_start=start,
                fused=True,
            )
        )
        for rank, (start, part) in enumerate(shards)
    ]
    halves = [*both[0][:2], both[0][2] + both[1][2], both[0][3] + both[1][3]]
    for name, expected, *found in zip(
        ("logprobs", "entropies", "of hidden", "of weight"), whole, alone, halves, strict=True
    ):
        bound = BOUND[dtype if name.startswith("of") else torch.float32]
        assert [distance(each, expected) <= bound for each in found] == [True, True], name
    torch.testing.assert_close(both[1][0], both[0][0], rtol=0, atol=1e-6)


def test_no_token_has_no_logprob(fused_head: ModuleType) -> None:
    nothing = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(9, 4, device=DEVICE)
    empty = torch.zeros(0, device=DEVICE)
    logprobs, entropies = token_logprobs(nothing, weight, empty.long(), empty, fused=True)
    assert logprobs.shape == entropies.shape == (0,)
    (logprobs.sum() + entropies.sum()).backward()
    assert nothing.grad is not None


def test_a_logit_that_is_no_number_makes_no_finite_logprob(fused_head: ModuleType) -> None:
    """The learner skips a minibatch by this."""
    logits = torch.randn(1, 5000, device=DEVICE)
    logits[0, 4500] = torch.nan
    one = torch.ones(1, device=DEVICE)
    assert not fused_head.statistics(logits, one.long(), one)[1].isfinite()


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=200, env=environment)
