"""Tensor and sequence parallelism inside a layer: the operations that the decoder is built on.

Between two matrix products the tokens are split over the `tp` axis (Megatron's sequence
parallelism, 2205.05198): each rank computes norms and residuals of its own tokens only.

    gather_tokens   before layers that split their outputs
                    forward: the tokens of all ranks     backward: sum over ranks, own tokens
    scatter_tokens  after layers that split their inputs
                    forward: sum over ranks, own tokens  backward: the tokens of all ranks

Called by `layers.py`, `linear.py` and `decoder.py`. `parallel.py` splits the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from dapo_async.model.mesh import Axis, all_gather_single, reduce_scatter_single

if TYPE_CHECKING:  # takes more than a second to import; a single rank never needs it
    from torch.distributed.tensor import DTensor


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor is a DTensor, the only kind that has a local part."""
    return hasattr(tensor, "to_local")


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank computes with.

    For a parameter that FSDP has gathered over `dp` this is its part on the `tp` axis. A plain
    tensor is returned as it is.
    """
    return parameter.to_local() if is_distributed(parameter) else parameter


def gather_tokens(x: Tensor, tp: Axis, num_tokens: int | None = None) -> Tensor:
    """`[⌈T / tp⌉, …]` on each rank -> `[T, …]` on every rank.

    `num_tokens` is T. None: rows of padding stay at the end.
    """
    return x if tp.size == 1 else _gather_tokens(x, tp, num_tokens)


def scatter_tokens(x: Tensor, tp: Axis) -> Tensor:
    """`[T, …]` on each rank -> this rank's `[⌈T / tp⌉, …]` of the sum over the ranks.

    The part of the last ranks may end in zeros as padding.
    """
    return x if tp.size == 1 else _scatter_tokens(x, tp)


def _padded(x: Tensor, tp: Axis) -> Tensor:
    missing = -len(x) % tp.size
    return torch.cat((x, x.new_zeros((missing, *x.shape[1:])))) if missing else x.contiguous()


def _all_gather(x: Tensor, tp: Axis, num_tokens: int | None) -> Tensor:
    whole = x.new_empty((tp.size * len(x), *x.shape[1:]))
    all_gather_single(whole, x.contiguous(), group=tp.group)
    return whole[:num_tokens]


def _reduce_scatter(x: Tensor, tp: Axis) -> Tensor:
    padded = _padded(x, tp)
    part = x.new_empty((len(padded) // tp.size, *x.shape[1:]))
    reduce_scatter_single(part, padded, group=tp.group)
    return part


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis, num_tokens: int | None) -> Tensor:
        ctx.tp = tp
        return _all_gather(x, tp, num_tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradient, ctx.tp), None, None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp, ctx.num_tokens = tp, len(x)
        return _reduce_scatter(x, tp)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_gather(gradient, ctx.tp, ctx.num_tokens), None


_gather_tokens: Callable[[Tensor, Axis, int | None], Tensor] = _GatherTokens.apply
_scatter_tokens: Callable[[Tensor, Axis], Tensor] = _ScatterTokens.apply
