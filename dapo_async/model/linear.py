"""Matrix products of the decoder: torch's own for training, oneDNN's for generation on a CPU.

Torch uses MKL, which runs AVX2 code on AMD processors. oneDNN runs AVX-512 code where the processor
has it, and is then twice as fast on AMD and about equal elsewhere. Without AVX-512 it is slower by
25 µs per product, so it is not used there. Only inference mode uses oneDNN. The learner's
proximal and current logprobs therefore come from the same kernels, and equal weights give equal
logprobs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dapo_async.model.tensor_parallel import local

_ONEDNN = (
    torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
)
_ONEDNN_FLOPS = 2_000_000  # below this oneDNN's setup time of about 10 µs exceeds its gain


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [N, in] @ weight [out, in]ᵀ + bias [out]`."""
    if (
        _ONEDNN
        and torch.is_inference_mode_enabled()
        and not x.is_cuda
        and 2 * len(x) * weight.numel() > _ONEDNN_FLOPS
    ):
        fused: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
        return fused
    return linear(x, weight, bias)


def float_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a [N, K] @ b [K, M]` in float32.

    On CUDA with a bfloat16 `b`, `a` is rounded to bfloat16 and products are summed in float32.
    """
    if b.is_cuda and b.dtype is torch.bfloat16:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a.float() @ b.float()


class Linear(nn.Linear):
    """A linear layer, or this rank's part of one. It computes in the precision of its input."""

    rows: slice | None = None  # None: all outputs of the local weight; else only these

    def reset_parameters(self) -> None:
        """Draws no values on the meta device: torch would import its compiler for it, which takes
        more than a second."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = local(self.weight), None if self.bias is None else local(self.bias)
        if self.rows is not None:
            weight, bias = weight[self.rows], None if bias is None else bias[self.rows]
        return product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
