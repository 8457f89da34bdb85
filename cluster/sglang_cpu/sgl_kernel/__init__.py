"""Replaces SGLang's compiled kernels on a machine without a GPU; their PyPI wheel is CUDA only.

SGLang imports a few functions `*_cpu` from here. Where the processor has no AMX kernels it never
calls them and uses plain torch. A call (speculative decoding, moving KV between pools) raises an
error instead of returning a wrong result.

SGLang's checksum of weights waits for the GPU even on a CPU, where torch raises an error then; here
that wait does nothing.
"""

from collections.abc import Callable
from typing import NoReturn

import torch

if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda device=None: None


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"sgl_kernel has no {name} on a machine without a GPU")

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not there on a machine without a GPU")

    return missing
