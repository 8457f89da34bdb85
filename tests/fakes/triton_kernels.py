"""The Triton kernels for a test: on the GPU, or else by Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

KERNELS = "dapo_async.model.fused_head"


def import_fused_head() -> ModuleType:
    """`dapo_async.model.fused_head`. Skips the test without Triton, which comes with torch on CUDA
    and with SGLang on a CPU.

    Triton reads the switch of its interpreter when it is imported. So the kernels get a Triton of
    their own; only its compiled library stays, because it can be loaded once.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available() or getattr(sys.modules.get(KERNELS), "interpreted", False):
        return importlib.import_module(KERNELS)
    others = {name: sys.modules.pop(name) for name in [*sys.modules] if _is_of_triton(name)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        kernels = importlib.import_module(KERNELS)
    for name in [*sys.modules]:
        if _is_of_triton(name):
            del sys.modules[name]
    sys.modules.update(others)
    kernels.interpreted = True  # type: ignore[attr-defined]
    sys.modules[KERNELS] = kernels
    return kernels


def _is_of_triton(name: str) -> bool:
    return (name + ".").startswith("triton.") and not name.startswith("triton._C")
