"""`head_softmax.py` as two Triton kernels: each reads a chunk of logits once.

Torch reads or writes a chunk about 12 times in the forward and 15 times in the backward pass. Here
the forward pass reads it once, by an online softmax, and the backward pass reads it once and writes
the gradient once, in the dtype of the matrix products that follow. The products stay cuBLAS's.

Liger's `LigerFusedLinearScaledCrossEntropyTPFunction` (0.8.5) takes entropies and a divided
vocabulary, but one temperature for all tokens; its native form is a wheel of its own for bfloat16,
and its general form is a chunked one in torch. So it is not used.

Triton comes with torch on CUDA. Imported only where `learner.kernels` asks for it. The kernels are
compiled for GPUs in the tests, and run there by Triton's interpreter on a CPU; they have not run on
a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_BLOCK, BACKWARD_BLOCK = 4096, 1024  # numbers of a row that a program holds at a time
LOWEST = tl.constexpr(-3.4e38)  # finite: 0 · (LOWEST − m) is 0


def statistics(logits: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    """As `head_softmax.statistics`. Leaves the logits as they are."""
    num_rows, width = logits.shape
    out = torch.empty((4, num_rows), dtype=torch.float32, device=logits.device)
    statistics_kernel[(num_rows,)](
        logits.contiguous(), targets, temperature, out, num_rows, width, BLOCK=FORWARD_BLOCK
    )
    return out


def gradient(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    log_z: Tensor,
    entropies: Tensor,
    *,
    of_logprobs: Tensor | None,
    of_entropies: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `head_softmax.gradient`; in float32 it overwrites the logits."""
    num_rows, width = logits.shape
    logits = logits.contiguous()
    out = logits if dtype is logits.dtype else torch.empty_like(logits, dtype=dtype)
    gradient_kernel[(num_rows, triton.cdiv(width, BACKWARD_BLOCK))](
        logits,
        targets,
        temperature,
        log_z,
        entropies,
        None if of_logprobs is None else of_logprobs.contiguous(),
        None if of_entropies is None else of_entropies.contiguous(),
        out,
        width,
        BLOCK=BACKWARD_BLOCK,
    )
    return out


@triton.jit
def statistics_kernel(
    logits,
    targets,
    temperature,
    out,
    num_rows,
    width,
    BLOCK: tl.constexpr,
):
    """One program per row. `top`, `total` and `weighted` are those of the blocks so far."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    degree = tl.load(temperature + row)
    top = LOWEST
    total = 0.0
    weighted = 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        scaled = tl.div_rn(tl.load(logits + columns, mask=inside, other=float("-inf")), degree)
        higher = tl.maximum(top, tl.max(scaled, 0))
        shift = top - higher
        kept = tl.exp(shift)
        shifted = tl.where(inside, scaled - higher, 0.0)
        powers = tl.where(inside, tl.exp(shifted), 0.0)
        weighted = kept * (weighted + total * shift) + tl.sum(powers * shifted, 0)
        total = kept * total + tl.sum(powers, 0)
        top = higher
    target = tl.load(targets + row)
    mine = (target >= 0) & (target < width)
    chosen = tl.div_rn(tl.load(logits + target, mask=mine, other=0.0), degree)
    tl.store(out + row, top)
    tl.store(out + num_rows + row, total)
    tl.store(out + 2 * num_rows + row, weighted)
    tl.store(out + 3 * num_rows + row, chosen)


@triton.jit
def gradient_kernel(
    logits,
    targets,
    temperature,
    log_z,
    entropies,
    of_logprobs,
    of_entropies,
    out,
    width,
    BLOCK: tl.constexpr,
):
    """One program per row and block of columns. None: there is no such gradient."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    degree = tl.load(temperature + row)
    scaled = tl.div_rn(tl.load(logits + row * width + columns, mask=inside, other=0.0), degree)
    log_p = scaled - tl.load(log_z + row)
    p = tl.exp(log_p)
    result = tl.zeros([BLOCK], tl.float32)
    if of_entropies is not None:
        result -= tl.load(of_entropies + row) * (p * (log_p + tl.load(entropies + row)))
    if of_logprobs is not None:
        hit = (columns == tl.load(targets + row)).to(tl.float32)
        result += tl.load(of_logprobs + row) * (hit - p)
    result = tl.div_rn(result, degree)
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=inside)
