"""One axis of the mesh of learner ranks, and Megatron's f and g on it (L1): what turns the dense decoder into a tensor-parallel one.

    f  copy_to      forward: nothing        backward: sum over the axis      before a layer that is split by its outputs
    g  reduce_from  forward: sum            backward: nothing                after a layer that is split by its inputs

Source: Megatron-LM (1909.08053), section 3. Parameters are shards under their Hugging Face names; an axis of size 1 costs nothing.
gloo on CPU; NCCL on GPU (written, not yet run on one).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
BUCKET_ELEMENTS = 16 * 2**20  # 64 MiB of float32
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

    def stack(self, tensor: Tensor) -> Tensor:
        """`[size, …]`: every rank's tensor, all of one shape."""
        if self.size == 1:
            return tensor[None]
        parts = tensor.new_empty((self.size, *tensor.shape))
        self.group.allgather([[*parts.unbind()]], [tensor.contiguous()]).wait()
        return parts

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of ranks; they may differ in length."""
        if self.size == 1:
            return [tensor]
        lengths = self.stack(torch.tensor(len(tensor), device=tensor.device)).tolist()
        padded = torch.cat((tensor, tensor.new_empty((max(lengths) - len(tensor), *tensor.shape[1:]))))
        return [part[:length] for part, length in zip(self.stack(padded), lengths, strict=True)]

    def collect(self, tensor: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """On the first rank every rank's `tensor [lengths[rank]]`, in the order of ranks; on the others, who only send, nothing."""
        if self.rank > 0:
            self.group.send([tensor], 0, 0).wait()
            return []
        parts = [tensor.new_empty(length) for length in lengths[1:]]
        for rank, part in enumerate(parts, start=1):
            self.group.recv([part], rank, 0).wait()
        return [tensor, *parts]

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


def gather_shards(shards: Mapping[str, Tensor], tp: Axis, *, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The whole tensors of every rank's `shards` (of one dtype), in their order, on the first rank of `tp`; the others call it too and get none.

    Small ones travel together. On `device`, where they go one by one; None: where the shards are. What did not have to move is no copy.
    """
    split = [name for name in shards if split_dim(name) is not None]
    if tp.size == 1:
        return {name: tensor.to(device) for name, tensor in shards.items()}
    counts = torch.tensor([shards[name].numel() for name in split], device=shards[split[0]].device)
    sizes = [dict(zip(split, each.tolist(), strict=True)) for each in tp.stack(counts)]  # of each rank: the last ones may have less
    whole = {}
    for bucket in buckets(split, sizes[0].__getitem__):
        flat = torch.cat([shards[name].reshape(-1) for name in bucket])
        parts = tp.collect(flat, [sum(each[name] for name in bucket) for each in sizes])
        cut = [part.split([each[name] for name in bucket]) for part, each in zip(parts, sizes, strict=False)]
        for index, name in enumerate(bucket if tp.rank == 0 else ()):
            dim, shape = split_dim(name), shards[name].shape
            assert dim is not None
            whole[name] = torch.cat([pieces[index].view(*shape[:dim], -1, *shape[dim + 1 :]) for pieces in cut], dim).to(device)
    return {name: whole[name] if name in whole else tensor.to(device) for name, tensor in shards.items()} if tp.rank == 0 else {}


def buckets(items: Iterable[T], num_elements: Callable[[T], int]) -> Iterator[list[T]]:
    """Runs of neighbours with at most `BUCKET_ELEMENTS` elements together, for one collective each; a larger item is alone."""
    bucket: list[T] = []
    filled = 0
    for item in items:
        if bucket and filled + num_elements(item) > BUCKET_ELEMENTS:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += num_elements(item)
    if bucket:
        yield bucket


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
