"""Splits a decoder's parameters over the mesh, and says which part of each this rank holds.

Parameters are DTensors under their Hugging Face names. On `tp` each is split along the dimension
that `SPLIT` names; FSDP2 splits that part again over the other ranks (`Mesh.shards`: dp and cp),
layer by layer. The gradient of a
parameter that is whole on every rank of `tp` covers this rank's tokens only; the learner's
`sum_gradients` adds them up once per update. (Megatron does the same: one collective instead of
one per norm and pass.)

Called by `hf.py` to build a decoder, and by whoever reads or writes its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dapo_async.model.decoder import Decoder
from dapo_async.model.mesh import Mesh, chunk
from dapo_async.model.tensor_parallel import is_distributed

# FSDP and DTensor take more than a second to import, so a single rank does without them.
if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Placement

# The dimension along which a parameter is split, by the last module in its name. All other
# parameters are whole on every rank.
SPLIT = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "gate_proj": 0,
    "up_proj": 0,
    "embed_tokens": 0,
    "lm_head": 0,
    "experts": 0,  # whole experts, see `mixture.py`
    "o_proj": 1,
    "down_proj": 1,
}
KV_PROJECTIONS = ("k_proj", "v_proj")


def split_dim(name: str, *, tp: int, num_kv_heads: int) -> int | None:
    """The dimension along which the parameter `name` is split over `tp` ranks, or None.

    `name` is a full name such as `model.layers.0.mlp.down_proj.weight`. With fewer key-value heads
    than ranks the key and value projections stay whole, and each rank computes the head that its
    queries need.
    """
    module = name.split(".")[-2] if "." in name else ""
    return None if module in KV_PROJECTIONS and num_kv_heads < tp else SPLIT.get(module)


def shard_decoder(
    decoder: Decoder,
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    reduce_dtype: torch.dtype = torch.float32,
) -> None:
    """Turns the parameters of a decoder on the meta device into DTensors on `mesh`.

    Layers are gathered in `dtype` for a pass, and their gradients are summed over `mesh.shards` in
    `reduce_dtype`. Afterwards allocate storage with `to_empty` and set the values with `fill`.
    """
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    assert mesh.devices is not None
    for name, parameter in [*decoder.named_parameters()]:
        dim = split_dim(name, tp=mesh.tp.size, num_kv_heads=decoder.config.num_kv_heads)
        sharded = nn.Parameter(_tp_part(parameter, mesh, dim))
        module, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(module), attribute, sharded)
    for part in (*decoder.model.layers, decoder):
        # Embeddings and head are gathered in float32, because the gradients of one token add up
        # over thousands of positions. They are used rounded to `dtype`.
        gathered, summed = dtype, reduce_dtype
        if part is decoder:
            gathered = summed = torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=gathered, reduce_dtype=summed, cast_forward_inputs=False
        )
        fully_shard(part, mesh=mesh.devices["shards"], mp_policy=policy)
        # The loss is over the global token count: gradients are added up, not averaged.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(decoder, "score")


def _tp_part(parameter: Tensor, mesh: Mesh, dim: int | None) -> DTensor:
    """This rank's part of a whole parameter, as a DTensor on the `tp` axis."""
    from torch.distributed.tensor import Replicate, Shard

    assert mesh.devices is not None
    part, placement = parameter.detach(), Replicate() if dim is None else Shard(dim)
    if dim is not None:
        part = part[(slice(None),) * dim + (mesh.tp.share(parameter.shape[dim]),)]
    return _dtensor(part.contiguous(), mesh.devices["tp"], (placement,), whole=parameter)


def _dtensor(
    part: Tensor, devices: DeviceMesh, placements: Sequence[Placement], *, whole: Tensor
) -> DTensor:
    """Shape and stride are given explicitly: an uneven split does not determine them."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, devices, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def keep_gathered(decoder: Decoder, *, zero_stage: int) -> None:
    """Sets what FSDP keeps after a forward pass: see `begin_pass`. Call it once."""
    # By default FSDP frees the layers, and keeps what is outside of them for the backward pass.
    if zero_stage < 3 and (sharded := _sharded(decoder)) is not None:
        sharded.set_reshard_after_forward(False)


def begin_pass(decoder: Decoder, *, zero_stage: int, last: bool) -> None:
    """Sets what FSDP exchanges in the next forward and backward pass of a minibatch.

        stage 3  weights are gathered, and gradients summed over the ranks, in every pass
        stage 2  weights stay gathered until the `last` pass has ended
        stage 1  besides, gradients add up on each rank, and are summed in the `last` pass

    Between minibatches only shards are left. Losses and gradients are the same up to the order of
    float32 sums. Stages: ZeRO (1910.02054).
    """
    if (sharded := _sharded(decoder)) is not None:
        sharded.set_reshard_after_backward(last or zero_stage == 3)
        sharded.set_requires_gradient_sync(last or zero_stage > 1)


def reshard(decoder: Decoder) -> None:
    """Frees the parameters that FSDP gathered for a forward pass without a backward pass."""
    if _sharded(decoder) is None:
        return
    from torch.distributed.fsdp import FSDPModule

    for part in (*decoder.model.layers, decoder):  # FSDP's own method is for one part only
        assert isinstance(part, FSDPModule)
        part.reshard()


def _sharded(decoder: Decoder) -> FSDPModule | None:
    """The decoder as FSDP's module; None for a single rank."""
    if not any(is_distributed(parameter) for parameter in decoder.parameters()):
        return None
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(decoder, FSDPModule)
    return decoder


def shard_of(parameter: Tensor) -> Tensor:
    """The storage of this rank's part of a parameter, which the optimizer updates in place."""
    detached = parameter.detach()
    return detached.to_local() if is_distributed(detached) else detached


def part_of(parameter: Tensor) -> tuple[slice, ...]:
    """Which part of the whole parameter this rank stores between passes: one slice per dimension.

    FSDP gives each rank of `Mesh.shards` a run of rows of its `tp` part. The arithmetic of DTensor
    cuts in another order and agrees with that only for even splits.
    """
    parts = [slice(0, size) for size in parameter.shape]
    if not is_distributed(parameter):
        return tuple(parts)
    from torch.distributed.tensor import Shard

    devices = parameter.device_mesh
    assert devices.ndim == 2, (
        f"the parameter {tuple(parameter.shape)} is gathered for a pass; reshard the decoder first"
    )
    shard_rank, tp_rank = devices.get_coordinate() or (0, 0)
    num_shards, tp = devices.shape
    if isinstance(placement := parameter.placements[-1], Shard):
        parts[placement.dim] = chunk(parts[placement.dim], rank=tp_rank, size=tp)
    parts[0] = chunk(parts[0], rank=shard_rank, size=num_shards)
    return tuple(parts)


def is_split(parameter: Tensor) -> bool:
    """Whether the ranks of the `tp` axis hold different parts of the parameter."""
    if not is_distributed(parameter):
        return False
    from torch.distributed.tensor import Shard

    return isinstance(parameter.placements[-1], Shard)
