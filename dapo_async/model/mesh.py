"""The ranks of one learner as a mesh of two axes, and how they find each other (L1). gloo on CPU; NCCL on GPU (written, not yet run on one)."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def chunk(whole: slice, *, rank: int, size: int) -> slice:
    """The part of `rank` among `size` ranks, as torch.chunk cuts: equal ones, the last ones shorter or empty where it does not divide."""
    part = -(-(whole.stop - whole.start) // size)
    return slice(
        min(whole.stop, whole.start + rank * part), min(whole.stop, whole.start + (rank + 1) * part)
    )


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
        padded = torch.cat(
            (tensor, tensor.new_empty((max(lengths) - len(tensor), *tensor.shape[1:])))
        )
        return [part[:length] for part, length in zip(self.stack(padded), lengths, strict=True)]

    def collect(self, tensor: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """On the first rank every rank's `tensor [lengths[rank]]`, in the order of ranks; on the others, who only send, nothing."""
        if self.rank > 0:
            if len(tensor):
                self.group.send([tensor], 0, 0).wait()
            return []
        parts = [tensor.new_empty(length) for length in lengths[1:]]
        for rank, part in enumerate(parts, start=1):
            if len(part):
                self.group.recv([part], rank, 0).wait()
        return [tensor, *parts]

    def share(self, length: int) -> slice:
        """This rank's part of `length` neighbours: equal ones, the last ranks' shorter or empty where it does not divide."""
        return chunk(slice(0, length), rank=self.rank, size=self.size)


ALONE = Axis()


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of one learner: those of one `dp` axis train on different groups, those of one `tp` axis share one copy of the model.

    `every`: all of them, in the order dp index · tp size + tp index. `devices`: the same as a DeviceMesh ("dp", "tp"); None for a rank alone.
    `saving`: all of them on CPU, with a group of its own for what runs beside the steps.
    """

    dp: Axis = ALONE
    tp: Axis = ALONE
    every: Axis = ALONE
    saving: Axis = ALONE
    devices: DeviceMesh | None = None

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
    return dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listener.detach(),
    )


def join_store(address: tuple[str, int], *, timeout_s: float) -> dist.TCPStore:
    """A connection to the rendezvous that `open_store` opened elsewhere."""
    return dist.TCPStore(
        *address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )


def process_group(
    store: dist.Store, *, rank: int, size: int, host: str, device: torch.device, timeout_s: float
) -> Any:
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


def build_mesh(
    store: dist.Store,
    *,
    rank: int,
    dp: int,
    tp: int,
    host: str,
    device: torch.device,
    timeout_s: float,
) -> Mesh:
    """The mesh of dp × tp ranks as seen by `rank` = dp index · tp + tp index; makes torch's default group. Blocks until all have come.

    A rank that hangs makes the others fail within `timeout_s`, also where parts are written beside the steps. One
    that dies does so at once on gloo.
    """
    timeout = timedelta(seconds=timeout_s)
    # Left alone, they would listen wherever the host's name resolves to.
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface_of(host)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=dp * tp, timeout=timeout)
    grid = torch.arange(dp * tp).view(dp, tp)
    dp_rank, tp_rank = divmod(rank, tp)

    # Every rank makes all groups, in one order.
    backend = "nccl" if device.type == "cuda" else "gloo"
    columns = [
        dist.new_group(column.tolist(), backend=backend, timeout=timeout) for column in grid.t()
    ]
    rows = [dist.new_group(row.tolist(), backend=backend, timeout=timeout) for row in grid]
    dp_group, tp_group = columns[tp_rank], rows[dp_rank]
    saving = dist.new_group(
        grid.flatten().tolist(),
        backend="gloo",
        timeout=timedelta(seconds=timeout_s),
    )
    return Mesh(
        dp=Axis(dp_rank, dp, dp_group),
        tp=Axis(tp_rank, tp, tp_group),
        every=Axis(rank, dp * tp, dist.group.WORLD),
        saving=Axis(rank, dp * tp, saving),
        devices=DeviceMesh.from_group(
            [dp_group, tp_group], device.type, mesh=grid, mesh_dim_names=("dp", "tp")
        ),
    )


def interface_of(host: str) -> str:
    """The name of this machine's network interface with the IPv4 address of `host`, such as `lo` for 127.0.0.1. Raises ValueError without one."""
    address, seen = socket.gethostbyname(host), []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(
                    probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15])
                )
            except OSError:
                continue  # an interface without an address
            seen.append(f"{name} {socket.inet_ntoa(answer[20:24])}")
            if seen[-1] == f"{name} {address}":
                return name
    raise ValueError(
        f"no network interface has the address {address} of {host}; there are {', '.join(seen)}"
    )
