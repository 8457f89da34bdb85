"""What a checkpoint keeps of a rank: whole tensors under Hugging Face names, which load at any tensor- and data-parallel size (law 7)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dapo_async.model import Decoder, Mesh, gather_shards, split_dim

MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def full_state(decoder: Decoder, optimizer: torch.optim.Optimizer, mesh: Mesh) -> dict[str, Tensor] | None:
    """Copies on CPU: `weights.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` in float32, and the optimizer's `updates` so far.

    Every rank of the mesh calls it; the first one gets the state, the others None.
    """
    if mesh.dp.rank > 0:
        return None
    shards: dict[str, Tensor] = {}
    updates = torch.zeros(())
    for name, parameter in decoder.named_parameters():
        moments = optimizer.state.get(parameter, {})
        updates = moments["step"].to("cpu", copy=True) if moments else updates
        shards |= {f"weights.{name}": parameter.detach(), **{f"{moment}.{name}": moments[moment] for moment in MOMENTS if moments}}
    state = gather_shards(shards, mesh.tp, device="cpu")
    # What was on the CPU already, and whole, is still the rank's own.
    copies = {name: tensor.clone() if tensor.data_ptr() == shards[name].data_ptr() else tensor for name, tensor in state.items()}
    return {**copies, "updates": updates} if mesh.is_first else None


@torch.no_grad()
def load_state(decoder: Decoder, optimizer: torch.optim.Optimizer, mesh: Mesh, state: Mapping[str, Tensor]) -> None:
    """Takes this rank's shard of a whole state: it goes on exactly where the rank that gave it stood."""
    for name, parameter in decoder.named_parameters():
        shards = {kind: _shard(state[f"{kind}.{name}"], name, mesh) for kind in ("weights", *MOMENTS) if f"{kind}.{name}" in state}
        parameter.copy_(shards["weights"])
        if state["updates"] > 0:
            moments = {moment: shards[moment].to(parameter.device, copy=True) for moment in MOMENTS}
            optimizer.state[parameter] = {"step": state["updates"].clone(), **moments}


def _shard(tensor: Tensor, name: str, mesh: Mesh) -> Tensor:
    dim = split_dim(name)
    if dim is None:
        return tensor
    part = mesh.tp.share(tensor.shape[dim])
    return tensor.narrow(dim, part.start, part.stop - part.start).contiguous()
