"""The kernel for attention over packed sequences on CUDA in half precision.

The first of these that imports: FlashAttention 3 (on Hopper GPUs, for which it is written),
FlashAttention 2 (the extra [flash]), and torch's own `torch.nn.attention.varlen`, which is always
there. None has run on a GPU here yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Where the queries and the keys of each sequence start, and the most of each.
Limits = tuple[Tensor, Tensor, int, int]
Kernel = Callable[[Tensor, Tensor, Tensor, Limits], Tensor]
FLASH = {
    "FlashAttention 3": "flash_attn_interface",
    "FlashAttention 2": "flash_attn",
}
HOPPER = 9  # the compute capability that FlashAttention 3 is written for


@dataclass(frozen=True, slots=True)
class Varlen:
    """A kernel: `call(query [T, H, D], key [S, KV, D], value [S, KV, D], limits) -> [T, H, D]`.

    Causal. With fewer queries than keys the mask is aligned to the last key of a sequence.
    """

    call: Kernel
    note: str  # which one it is, and why no other one


@cache
def varlen_kernel() -> Varlen:
    """The kernel of this process, found once."""
    missing: list[str] = []
    for name, module in FLASH.items():
        why = _why_not(module)
        if why is None:
            try:
                kernel = _flash(importlib.import_module(module).flash_attn_varlen_func)
            except (ImportError, OSError, RuntimeError, AttributeError) as error:
                # Such as a wheel for another version of torch.
                why = f"does not import: {type(error).__name__}: {str(error)[:200]}"
            else:
                return Varlen(kernel, ", ".join((name, *missing)))
        missing.append(f"{module} {why}")
    return Varlen(_torchs(), ", ".join(("torch's varlen attention", *missing)))


def _why_not(module: str) -> str | None:
    """Why a module is not tried."""
    if importlib.util.find_spec(module) is None:
        return "is not installed"
    if module == FLASH["FlashAttention 3"] and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major != HOPPER:
            return f"is not for a GPU of compute capability {major}.{minor}"
    return None


def _flash(varlen: Callable[..., Any]) -> Kernel:
    def kernel(query: Tensor, key: Tensor, value: Tensor, limits: Limits) -> Tensor:
        packed = varlen(query, key, value, *limits, causal=True)
        # Older versions of FlashAttention 3 also return the sums of the softmax.
        mixed: Tensor = packed[0] if isinstance(packed, tuple) else packed
        return mixed

    return kernel


def _torchs() -> Kernel:
    from torch.nn.attention.varlen import varlen_attn  # has no CPU backend

    # The names of its arguments differ between torch versions.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )

    def kernel(query: Tensor, key: Tensor, value: Tensor, limits: Limits) -> Tensor:
        grouped, repeats = options, query.shape[1] // key.shape[1]
        if repeats > 1 and "enable_gqa" in known:
            grouped = {**options, "enable_gqa": True}
        elif repeats > 1:
            key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
        packed = varlen_attn(query, key, value, *limits, **grouped)
        assert isinstance(packed, Tensor)
        return packed

    return kernel
