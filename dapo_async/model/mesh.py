"""The ranks of one learner as a mesh of three axes, and how they connect to each other.

In: the address of a rendezvous, rank and sizes. Out: a `Mesh` with process groups: gloo on CPU,
NCCL on GPU (not yet run on a GPU). Called by the learner actor; `weights/` uses the groups too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dapo_async.utils.network import ANY_PORT, listener, socket_variables

# Torch 2.13 renamed these two. Arguments: (output, input, group=…).
Collective = Callable[..., Any]
# The output holds the tensors of all ranks, one after the other along the first dimension.
all_gather_single: Collective = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
# The output holds this rank's part of the sum over all ranks.
reduce_scatter_single: Collective = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


def chunk(whole: slice, *, rank: int, size: int) -> slice:
    """The part of `rank` among `size` ranks, cut as torch.chunk does.

    Parts are equal. If the length does not divide, the last parts are shorter or empty.
    """
    part = -(-(whole.stop - whole.start) // size)
    start = min(whole.stop, whole.start + rank * part)
    return slice(start, min(whole.stop, start + part))


@dataclass(frozen=True, slots=True)
class Axis:
    """This rank's position among `size` ranks, and their process group (None for a single rank)."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums over the axis in place; every rank gets the same bits."""
        if self.size > 1 and tensor.numel():
            self.group.allreduce([tensor]).wait()
        return tensor

    def stack(self, tensor: Tensor) -> Tensor:
        """`[size, …]`: the tensors of all ranks, which have equal shapes."""
        if self.size == 1:
            return tensor[None]
        parts = tensor.new_empty((self.size, *tensor.shape))
        self.group.allgather([[*parts.unbind()]], [tensor.contiguous()]).wait()
        return parts

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks in rank order; their lengths may differ."""
        if self.size == 1:
            return [tensor]
        lengths = self.stack(torch.tensor(len(tensor), device=tensor.device)).tolist()
        padding = tensor.new_empty((max(lengths) - len(tensor), *tensor.shape[1:]))
        padded = torch.cat((tensor, padding))
        return [part[:length] for part, length in zip(self.stack(padded), lengths, strict=True)]

    def deal(self, tensor: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """The first `sent[0]` numbers of `tensor` go to rank 0, the next ones to rank 1 and so on;
        returns what this rank gets, in rank order: `received[rank]` numbers of each."""
        if self.size == 1:
            return tensor
        got = tensor.new_empty(sum(received))
        width = 1 if tensor.is_cuda else tensor.element_size()
        splits = [[count * width for count in counts] for counts in (received, sent)]
        self.group.alltoall_base(_as_bytes(got), _as_bytes(tensor.contiguous()), *splits).wait()
        return got

    def exchange(self, tensor: Tensor) -> Tensor:
        """All-to-all, `[size, …]` on each rank: row i goes to rank i, and becomes its row `rank`.

        On CPU the numbers travel as bytes: gloo does not know every dtype here.
        """
        if self.size == 1:
            return tensor
        own = tensor.contiguous()
        received = torch.empty_like(own)
        self.group.alltoall_base(_as_bytes(received), _as_bytes(own), [], []).wait()
        return received

    def share(self, length: int) -> slice:
        """This rank's part of `length` elements, as `chunk` cuts them."""
        return chunk(slice(0, length), rank=self.rank, size=self.size)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda else tensor.view(torch.uint8)


ALONE = Axis()


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of one learner."""

    dp: Axis = ALONE  # ranks that train on different groups
    cp: Axis = ALONE  # ranks that train on different tokens of the same groups
    tp: Axis = ALONE  # ranks that share one copy of the model
    shards: Axis = ALONE  # dp and cp together: FSDP splits parameters and sums gradients over it
    every: Axis = ALONE  # all ranks, in the order (dp index · cp + cp index) · tp + tp index
    saving: Axis = ALONE  # all ranks on CPU, in a separate group for work beside the steps
    publishing: Axis = ALONE  # all ranks on their devices, in another one
    devices: DeviceMesh | None = None  # `every` as ("shards", "tp"); None for a single rank

    @property
    def is_first(self) -> bool:
        return self.every.rank == 0

    @property
    def ranks_per_batch(self) -> int:
        """Ranks that train on the same groups, and get the same losses and metrics."""
        return self.cp.size * self.tp.size


def open_store(host: str, *, timeout_s: float, ports: range = ANY_PORT) -> dist.TCPStore:
    """Opens the rendezvous of a group on the interface of `host` only, at a free port of `ports`.

    The port is `store.port`. Raises ValueError if none is free.
    """
    server = listener(host, ports)
    port = server.getsockname()[1]
    # The store takes over this socket. Without a bound socket it listens on every interface.
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=server.detach(),
    )


def join_store(address: tuple[str, int], *, timeout_s: float) -> dist.TCPStore:
    """Connects to a rendezvous that another process opened with `open_store`."""
    return dist.TCPStore(
        *address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )


def process_group(
    store: dist.Store, *, rank: int, size: int, host: str, device: torch.device, timeout_s: float
) -> Any:
    """A group of `size` ranks beside torch's default group.

    A rank that dies makes the others fail at once on gloo; a rank that hangs, within `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    # Without an explicit device gloo listens on whatever address the host's name resolves to.
    gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, gloo)


def build_mesh(
    store: dist.Store,
    *,
    rank: int,
    dp: int,
    tp: int,
    cp: int = 1,
    host: str,
    device: torch.device,
    timeout_s: float,
) -> Mesh:
    """The mesh of dp × cp × tp ranks as `rank` sees it, numbered as in `Mesh.every`.

    Also makes torch's default group. Blocks until every rank has joined. A rank that dies makes the
    others fail at once on gloo; a rank that hangs, within `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    # Without them both backends listen on what the host's name resolves to.
    os.environ.update(socket_variables(host))
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    backend, size = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", dp * cp * tp
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    grid = torch.arange(size).view(dp, cp, tp)
    backend = "nccl" if device.type == "cuda" else "gloo"

    def axis(rows: Tensor) -> Axis:
        """The row of `rows` that has this rank. Every rank makes all groups, in one order."""
        own = ALONE
        for row in rows.tolist():
            group = dist.new_group(row, backend=backend, timeout=timeout)
            if rank in row:
                own = Axis(row.index(rank), len(row), group)
        return own

    shards, tp_axis = axis(grid.flatten(0, 1).t()), axis(grid.flatten(0, 1))
    dp_axis, cp_axis = (ALONE, shards) if dp == 1 < cp else (shards, ALONE)
    if dp > 1 and cp > 1:
        dp_axis = axis(grid.permute(1, 2, 0).flatten(0, 1))
        cp_axis = axis(grid.permute(0, 2, 1).flatten(0, 1))
    ranks = grid.flatten().tolist()
    saving = dist.new_group(ranks, backend="gloo", timeout=timeout)
    publishing = dist.new_group(ranks, backend=backend, timeout=timeout)
    return Mesh(
        dp=dp_axis,
        cp=cp_axis,
        tp=tp_axis,
        shards=shards,
        every=Axis(rank, size, dist.group.WORLD),
        saving=Axis(rank, size, saving),
        publishing=Axis(rank, size, publishing),
        devices=DeviceMesh.from_group(
            [shards.group, tp_axis.group],
            device.type,
            mesh=grid.flatten(0, 1),
            mesh_dim_names=("shards", "tp"),
        ),
    )
