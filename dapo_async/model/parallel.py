"""One axis of the mesh of learner ranks, and Megatron's f and g on it (L1): what turns the dense decoder into a tensor-parallel one.

    f  copy_to      forward: nothing        backward: sum over the axis      before a layer that is split by its outputs
    g  reduce_from  forward: sum            backward: nothing                after a layer that is split by its inputs

Source: Megatron-LM (1909.08053), section 3. Parameters are shards under their Hugging Face names; an axis of size 1 costs nothing.
gloo on CPU; NCCL on GPU (written, not yet run on one).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

# Dimension along which a parameter is split, by the last module in its name; all others are whole on every rank.
SPLIT = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0, "embed_tokens": 0, "lm_head": 0, "o_proj": 1, "down_proj": 1}


def split_dim(name: str) -> int | None:
    """Of the parameter `name`, such as `model.layers.0.mlp.down_proj.weight`; None: it is replicated."""
    return SPLIT.get(name.split(".")[-2]) if "." in name else None


@dataclass(frozen=True, slots=True)
class Axis:
    """This rank's place among `size` ranks, and the process group in which they talk (None when it is alone)."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds up over the axis, in place; the same bits on every rank."""
        if self.size > 1 and tensor.numel():
            self.group.allreduce([tensor]).wait()
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest over the axis, in place."""
        if self.size > 1 and tensor.numel():
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
            self.group.allreduce([tensor], options).wait()
        return tensor

    def gather(self, tensor: Tensor, dim: int = 0) -> list[Tensor]:
        """Every rank's tensor, in the order of ranks; they may differ in length along `dim`."""
        if self.size == 1:
            return [tensor]
        lengths = torch.zeros(self.size, dtype=torch.long, device=tensor.device)
        lengths[self.rank] = tensor.shape[dim]
        counts = self.sum(lengths).tolist()
        moved = tensor.movedim(dim, 0)
        padded = pad(moved, (0, 0) * (moved.ndim - 1) + (0, max(counts) - len(moved))).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self.group.allgather([parts], [padded]).wait()
        return [part[:count].movedim(0, dim) for part, count in zip(parts, counts, strict=True)]

    def share(self, length: int) -> slice:
        """This rank's part of `length` neighbours; the first ranks have one more where it does not divide."""
        small, larger = divmod(length, self.size)
        start = self.rank * small + min(self.rank, larger)
        return slice(start, start + small + (self.rank < larger))


ALONE = Axis()


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of one learner: those of one `dp` axis train on different groups, those of one `tp` axis share one model."""

    dp: Axis = ALONE
    tp: Axis = ALONE

    @property
    def is_first(self) -> bool:
        return self.dp.rank == self.tp.rank == 0


def open_store(host: str, *, timeout_s: float) -> dist.TCPStore:
    """The rendezvous of a group, listening on the interface of `host` only, on a free port (`store.port`)."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen()
    port = listener.getsockname()[1]
    # The store takes over the socket: binding by ourselves is the only way not to listen on every interface.
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach())


def join_store(address: tuple[str, int], *, timeout_s: float) -> dist.TCPStore:
    """A connection to the rendezvous that `open_store` opened elsewhere."""
    return dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def process_group(store: dist.Store, *, rank: int, size: int, host: str, device: torch.device, timeout_s: float) -> Any:
    """A group of `size` ranks, apart from torch's default one: a rank that dies makes the others fail, one that hangs within `timeout_s`."""
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    # The options carry the interface: left alone, gloo would listen wherever the host's name resolves to.
    gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, gloo)


def build_mesh(store: dist.Store, *, rank: int, dp: int, tp: int, host: str, device: torch.device, timeout_s: float) -> Mesh:
    """The mesh of dp × tp ranks as seen by `rank` = dp index · tp + tp index. Blocks until all have come, at most `timeout_s`."""
    dp_rank, tp_rank = divmod(rank, tp)

    def axis(name: str, rank: int, size: int) -> Axis:
        if size == 1:
            return ALONE
        return Axis(rank, size, process_group(dist.PrefixStore(name, store), rank=rank, size=size, host=host, device=device, timeout_s=timeout_s))

    return Mesh(dp=axis(f"dp of tp {tp_rank}", dp_rank, dp), tp=axis(f"tp of dp {dp_rank}", tp_rank, tp))


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.sum(gradient.contiguous().clone()), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return axis.sum(x.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """f: what every rank of `axis` uses whole, so that its gradient is the sum of theirs."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """g: the sum of what the ranks of `axis` computed from their shards."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)
