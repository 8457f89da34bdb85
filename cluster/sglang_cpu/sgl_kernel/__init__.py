"""Stands in for SGLang's compiled kernels, whose wheel on PyPI is for CUDA only, on a machine without a GPU.

SGLang imports a few functions `*_cpu` from here and, where the processor has no AMX kernels, never calls them: plain torch does their work. Whoever
does call one (speculative decoding, moving KV between pools) is told so, instead of getting a wrong result.
"""

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"sgl_kernel has no {name} on a machine without a GPU")

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not there on a machine without a GPU")

    return missing
