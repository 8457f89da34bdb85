"""Which kernels a learner's decoder takes on a GPU: `learner.kernels`.

Only parts without communication, attention and matrix products are compiled. So a compiled part
knows neither FSDP, nor the ranks, nor the sequences, and is compiled again for another number of
tokens once at most. It has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from dapo_async.model.decoder import Decoder
from dapo_async.model.layers import MLP, RMSNorm, SelfAttention, normed, rotated, swiglu

Kernels = Literal["torch", "head", "all"]


def use_kernels(decoder: Decoder, kernels: Kernels) -> None:
    """Call it once. Nothing changes on a CPU.

    Raises ValueError if Triton is missing on CUDA.
    """
    if kernels == "torch" or decoder.rope_cos.device.type != "cuda":
        return
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"learner.kernels ({kernels}) needs Triton, which is not installed; "
            "pip install triton, or set learner.kernels=torch"
        ) from error
    decoder.head_kernels = True
    if kernels == "all":
        compile_layers(decoder)


def compile_layers(decoder: Decoder, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Fuses RMS norms, rotary embeddings and SwiGLU of a decoder for training.

    In half precision a compiled part rounds its result only, not the numbers in between. Torch
    compiles at the first pass. Experts keep torch's own kernels.
    """
    parts: dict[type[nn.Module], tuple[str, Callable[..., Any]]] = {
        RMSNorm: ("formula", normed),
        SelfAttention: ("rotated", rotated),
        MLP: ("swiglu", swiglu),
    }
    for kind, (name, part) in parts.items():
        compiled = torch.compile(part, backend=backend)
        for module in decoder.modules():
            if isinstance(module, kind):
                setattr(module, name, compiled)
