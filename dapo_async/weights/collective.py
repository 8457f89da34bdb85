"""Transport 1: broadcast from the learner (rank 0) to every engine, in bounded buckets, over a process group of its own.

The group is apart from torch's default group, which belongs to the learner's ranks. gloo on CPU; NCCL on GPU (written, not yet run on one).
Every rank runs the same buckets from the same manifest; a rank that dies makes the others fail within the deadline.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_async.weights.announcement import Manifest

SENDER = 0


def open_store(host: str, *, timeout_s: float) -> dist.TCPStore:
    """The rendezvous of a group, listening on the interface of `host` only, on a free port (`store.port`)."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen()
    port = listener.getsockname()[1]
    # The store takes over the socket: binding by ourselves is the only way not to listen on every interface.
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach())


class WeightGroup:
    """One rank of the group. Building it blocks until every rank has joined, at most `timeout_s`."""

    def __init__(self, store: dist.Store, *, rank: int, world_size: int, host: str, device: torch.device | str, timeout_s: float) -> None:
        self.device = torch.device(device)
        timeout = timedelta(seconds=timeout_s)
        self._group: Any
        if self.device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, world_size, nccl)
        else:
            # The options carry the interface: left alone, gloo would listen wherever the host's name resolves to.
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
            gloo._timeout = timeout
            self._group = dist.ProcessGroupGloo(store, rank, world_size, gloo)

    @classmethod
    def join(cls, address: tuple[str, int], *, rank: int, world_size: int, host: str, device: torch.device | str, timeout_s: float) -> WeightGroup:
        """As an engine: connects to the learner's store at `address` from the interface of `host`."""
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        return cls(store, rank=rank, world_size=world_size, host=host, device=device, timeout_s=timeout_s)

    @torch.no_grad()
    def send(self, weights: Mapping[str, Tensor], manifest: Manifest, *, bucket_bytes: int) -> None:
        """As the learner: one flattened broadcast per bucket."""
        for bucket in manifest.buckets(bucket_bytes):
            flat = torch.cat([weights[spec.name].to(self.device).reshape(-1) for spec in bucket])
            self._group.broadcast(flat, SENDER).wait()

    @torch.no_grad()
    def receive(self, manifest: Manifest, *, bucket_bytes: int) -> dict[str, Tensor]:
        """As an engine: the weights of one publish, staged beside those being served, so that generation goes on while they arrive."""
        weights = {}
        for bucket in manifest.buckets(bucket_bytes):
            flat = torch.empty(sum(spec.num_elements for spec in bucket), dtype=bucket[0].torch_dtype, device=self.device)
            self._group.broadcast(flat, SENDER).wait()
            for spec, part in zip(bucket, flat.split([spec.num_elements for spec in bucket]), strict=True):
                weights[spec.name] = part.view(spec.shape)
        return weights
