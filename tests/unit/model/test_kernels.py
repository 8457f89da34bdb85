"""`learner.kernels`: compiled parts of the layers give the numbers of torch's own kernels.

On a CPU torch's compiler traces the parts and their gradients, and runs what it traced without
making code of it.
"""

from __future__ import annotations

import pytest
import torch
from gpu_place import SMALL, distance
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dapo_async.model import Decoder, PackedAttention
from dapo_async.model.config import Recompute
from dapo_async.model.kernels import compile_layers, use_kernels
from dapo_async.model.layers import normed, rotated, swiglu

# Of `distance`. In bfloat16 torch rounds also between the operations of a part.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2}


def gradients(decoder: Decoder, length: int) -> Tensor:
    """Logprobs and the gradients of all parameters."""
    torch.manual_seed(length)
    ids = torch.randint(0, SMALL.sizes["vocab_size"], (length,))
    attention = PackedAttention([length])
    logprobs, entropies = decoder.score(
        ids,
        attention.positions,
        attention,
        predictors=torch.arange(length - 1),
        targets=ids[1:],
        temperatures=torch.ones(length - 1),
    )
    decoder.zero_grad()
    (logprobs + 0.1 * entropies).sum().backward()
    parts = [each.grad for each in decoder.parameters() if each.grad is not None]
    assert len(parts) == len([*decoder.parameters()])
    return torch.cat([logprobs.detach(), *(each.flatten() for each in parts)])


@pytest.mark.parametrize(("dtype", "recompute"), [(torch.float32, "none"), (torch.bfloat16, "all")])
def test_compiled_layers_have_the_logprobs_and_gradients_of_torch(
    dtype: torch.dtype, recompute: Recompute
) -> None:
    torch.compiler.reset()
    plain, compiled = SMALL.decoder(), SMALL.decoder()
    for decoder in (plain, compiled):
        decoder.activations = dtype
        decoder.recompute(recompute)
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(compiled, backend=counter)
    assert counter.frame_count == 0
    for length in (24, 19, 22, 7, 24):
        assert distance(gradients(compiled, length), gradients(plain, length)) <= BOUND[dtype]
        if length == 19:
            num_compiled = counter.frame_count
    # Norms of layers and of heads, rotary embeddings and SwiGLU, each for one length and for any.
    assert counter.frame_count == num_compiled <= 2 * 4


def test_each_part_is_compiled_whole() -> None:
    torch.compiler.reset()
    x = torch.randn(5, 4, 8)
    for part, given in (
        (normed, (x, x[0, 0], 1e-6)),
        (rotated, (x, x[:, :2], x[:, :1], x[:, :1])),
        (swiglu, (x, x)),
    ):
        torch.compile(part, backend="eager", fullgraph=True)(*given)


def test_nothing_changes_on_a_cpu() -> None:
    decoder = SMALL.decoder()
    use_kernels(decoder, "all")
    assert not decoder.head_kernels
    assert gradients(decoder, 24).equal(gradients(SMALL.decoder(), 24))
