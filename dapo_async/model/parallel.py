"""Tensor, sequence and data parallelism of the decoder (L1): what turns the whole one into this rank's shard of it.

Between two products the tokens are split over the `tp` axis (Megatron's sequence parallelism, 2205.05198): norms and residuals are of own tokens.

    gather_tokens   forward: all ranks' tokens        backward: sum over the ranks, own tokens    before layers split by their outputs
    scatter_tokens  forward: sum, own tokens          backward: all ranks' tokens                 after layers split by their inputs

Parameters rest as DTensors under their Hugging Face names: on `tp` as `SPLIT` says, and of that a part on each rank of `dp` (FSDP2, layer by layer).
The layers compute on the local tensors that `local` gives. A gradient of what is whole on every rank of `tp` is that of this rank's tokens only;
`sum_gradients` of the learner adds them up, once per update (as Megatron does: one collective instead of one per norm and pass).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from dapo_async.model.collectives import all_gather_single, reduce_scatter_single
from dapo_async.model.mesh import Axis, Mesh, chunk

if TYPE_CHECKING:
    from dapo_async.model.decoder import Decoder

# Dimension along which a parameter is split, by the last module in its name; all others are whole on every rank.
SPLIT = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "gate_proj": 0,
    "up_proj": 0,
    "embed_tokens": 0,
    "lm_head": 0,
    "o_proj": 1,
    "down_proj": 1,
}
OF_KV_HEADS = ("k_proj", "v_proj")


def split_dim(name: str, *, tp: int, num_kv_heads: int) -> int | None:
    """Of the parameter `name`, such as `model.layers.0.mlp.down_proj.weight`, on a `tp` axis of that size; None: it is whole on every rank.

    So are keys and values where there are fewer heads of them than ranks: each rank computes the one that its queries need.
    """
    module = name.split(".")[-2] if "." in name else ""
    return None if module in OF_KV_HEADS and num_kv_heads < tp else SPLIT.get(module)


def local(parameter: Tensor) -> Tensor:
    """What this rank computes with: its part on the `tp` axis of a parameter that FSDP has gathered on `dp`; a plain one as it is."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def shard_decoder(decoder: Decoder, mesh: Mesh, *, dtype: torch.dtype) -> None:
    """Makes the parameters of a decoder on the meta device DTensors on `mesh`, layers gathered in `dtype` for a pass, gradients summed in float32.

    Give them storage by `to_empty` and values by `fill` afterwards.
    """
    assert mesh.devices is not None
    tp = mesh.devices["tp"]
    for name, parameter in [*decoder.named_parameters()]:
        dim = split_dim(name, tp=mesh.tp.size, num_kv_heads=decoder.config.num_kv_heads)
        part = (
            parameter.detach()
            if dim is None
            else parameter.detach()[(slice(None),) * dim + (mesh.tp.share(parameter.shape[dim]),)]
        )
        placement = Replicate() if dim is None else Shard(dim)
        sharded = nn.Parameter(_dtensor(part.contiguous(), tp, (placement,), whole=parameter))
        setattr(decoder.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], sharded)
    for part in (*decoder.model.layers, decoder):
        # Embeddings and head are gathered in float32, for a token's gradients add up over thousands of places; they are used rounded to `dtype`.
        gathered = torch.float32 if part is decoder else dtype
        policy = MixedPrecisionPolicy(
            param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        fully_shard(part, mesh=mesh.devices["dp"], mp_policy=policy)
        # The loss is over the global token count: gradients are added up, not averaged.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(decoder, "score")


def release(decoder: Decoder) -> None:
    """After a pass that no backward pass follows: FSDP lets go of what it has gathered, and the parameters rest as shards again."""
    if isinstance(decoder, FSDPModule):
        decoder.reshard()


def shard_of(parameter: Tensor) -> Tensor:
    """The storage of this rank's part of a parameter: what its optimizer updates, in place."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def part_of(parameter: Tensor) -> tuple[slice, ...]:
    """Which part of the whole parameter this rank has at rest: one slice per dimension.

    Of its part on `tp` FSDP gives each rank of `dp` a run of rows. DTensor's own arithmetic cuts in another order and agrees with that only where
    everything divides.
    """
    parts = [slice(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return tuple(parts)
    assert parameter.device_mesh.ndim == 2, (
        f"gathered for a pass, the parameter {tuple(parameter.shape)} does not rest: release the decoder first"
    )
    (dp_rank, tp_rank), (dp, tp) = (
        parameter.device_mesh.get_coordinate() or (0, 0),
        parameter.device_mesh.shape,
    )
    if isinstance(placement := parameter.placements[-1], Shard):
        parts[placement.dim] = chunk(parts[placement.dim], rank=tp_rank, size=tp)
    parts[0] = chunk(parts[0], rank=dp_rank, size=dp)
    return tuple(parts)


def is_split(parameter: Tensor) -> bool:
    """Whether each rank of the `tp` axis has another part of it."""
    return isinstance(parameter, DTensor) and isinstance(parameter.placements[-1], Shard)


def _dtensor(
    part: Tensor, devices: DeviceMesh, placements: Sequence[Placement], *, whole: Tensor
) -> DTensor:
    """Shape and stride of the whole are told: of a split that is not even they don't follow from the part."""
    return DTensor.from_local(
        part, devices, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def gather_tokens(x: Tensor, tp: Axis, num_tokens: int | None = None) -> Tensor:
    """`[⌈T / tp⌉, …]` of each rank -> all `[T, …]` on every rank; without `num_tokens` T those that belong to no token stay at the end."""
    return x if tp.size == 1 else _GatherTokens.apply(x, tp, num_tokens)


def scatter_tokens(x: Tensor, tp: Axis) -> Tensor:
    """Of each rank's `[T, …]` the sum, and of that this rank's `[⌈T / tp⌉, …]`; the last ranks' may end in zeros that belong to no token."""
    return x if tp.size == 1 else _ScatterTokens.apply(x, tp)


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
