"""Replaces SGLang's compiled kernels on a machine without a GPU; their PyPI wheel is CUDA only.

SGLang imports a few functions `*_cpu` from here. Where the processor has no AMX kernels it never
calls them and uses plain torch. A call (speculative decoding, moving KV between pools) raises an
error instead of returning a wrong result.
"""

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"sgl_kernel has no {name} on a machine without a GPU")

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not there on a machine without a GPU")

    return missing
