"""Transport 1: broadcast from the learner (rank 0) to every engine, in bounded buckets, over a process group of its own.

The group is apart from torch's default group, which belongs to the learner's ranks. gloo on CPU; NCCL on GPU (written, not yet run on one).
Every rank runs the same buckets from the same manifest; a rank that dies makes the others fail within the deadline. Buckets travel as bytes and
the ranks meet under the names that torch's own constructor of groups uses: so SGLang's servers are members like any other
(`init_weights_update_group`, `load_format=flattened_bucket`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_async.model import join_store, process_group
from dapo_async.weights.announcement import Manifest

SENDER = 0
NAME = "dapo_async weights"


class WeightGroup:
    """One rank of the group. Building it blocks until every rank has joined, at most `timeout_s`."""

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        host: str,
        device: torch.device | str,
        timeout_s: float,
    ) -> None:
        self.device = torch.device(device)
        for prefix in (
            NAME,
            f"{NAME}/",
            f"{self.device.type}/",
        ):  # as torch.distributed.distributed_c10d nests them
            store = dist.PrefixStore(prefix, store)
        self._group = process_group(
            store, rank=rank, size=world_size, host=host, device=self.device, timeout_s=timeout_s
        )

    @classmethod
    def join(
        cls,
        address: tuple[str, int],
        *,
        rank: int,
        world_size: int,
        host: str,
        device: torch.device | str,
        timeout_s: float,
    ) -> WeightGroup:
        """As an engine: connects to the learner's store at `address` from the interface of `host`."""
        return cls(
            join_store(address, timeout_s=timeout_s),
            rank=rank,
            world_size=world_size,
            host=host,
            device=device,
            timeout_s=timeout_s,
        )

    @torch.no_grad()
    def send(self, weights: Mapping[str, Tensor], manifest: Manifest, *, bucket_bytes: int) -> None:
        """As the learner: one flattened broadcast per bucket."""
        for bucket in manifest.buckets(bucket_bytes):
            flat = torch.cat([weights[spec.name].to(self.device).reshape(-1) for spec in bucket])
            self._group.broadcast(flat.view(torch.uint8), SENDER).wait()

    @torch.no_grad()
    def receive(self, manifest: Manifest, *, bucket_bytes: int) -> dict[str, Tensor]:
        """As an engine: the weights of one publish, staged beside those being served, so that generation goes on while they arrive."""
        weights = {}
        for bucket in manifest.buckets(bucket_bytes):
            flat = torch.empty(
                sum(spec.num_elements for spec in bucket),
                dtype=bucket[0].torch_dtype,
                device=self.device,
            )
            self._group.broadcast(flat.view(torch.uint8), SENDER).wait()
            for spec, part in zip(
                bucket, flat.split([spec.num_elements for spec in bucket]), strict=True
            ):
                weights[spec.name] = part.view(spec.shape)
        return weights
