"""Transport `broadcast`: from the learner (rank 0) to every engine, in bounded buckets.

The process group is separate from torch's default group, which the learner's ranks use. It is gloo
on CPU and NCCL on GPU (NCCL is written, but has not run yet). Every rank derives the same buckets
from the same manifest. When a rank dies, the other ranks fail within the deadline.

SGLang servers are members of the group (`init_weights_update_group`): so buckets are sent as bytes
(`load_format=flattened_bucket`), and the store has the prefixes that torch's own constructor uses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from dapo_async.model import join_store, process_group
from dapo_async.weights.announcement import Manifest

SENDER = 0  # the learner's rank
GROUP_NAME = "dapo_async weights"


class WeightGroup:
    """One rank of the group. The constructor blocks until every rank has joined, or `timeout_s`."""

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        host: str,
        device: torch.device | str,
        timeout_s: float,
    ) -> None:
        self.device = torch.device(device)
        # As torch.distributed.distributed_c10d nests them.
        for prefix in (GROUP_NAME, f"{GROUP_NAME}/", f"{self.device.type}/"):
            store = PrefixStore(prefix, store)
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
        """For engines: connects to the learner's store at `address`, from `host`."""
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
        """For the learner: one flattened broadcast per bucket."""
        for bucket in manifest.buckets(bucket_bytes):
            flat = torch.cat([weights[spec.name].to(self.device).reshape(-1) for spec in bucket])
            self._group.broadcast(flat.view(torch.uint8), SENDER).wait()

    @torch.no_grad()
    def receive(self, manifest: Manifest, *, bucket_bytes: int) -> dict[str, Tensor]:
        """For engines: the weights of one publish, in new memory.

        The weights that are served do not change, so generation continues meanwhile.
        """
        weights = {}
        for bucket in manifest.buckets(bucket_bytes):
            sizes = [spec.num_elements for spec in bucket]
            flat = torch.empty(sum(sizes), dtype=bucket[0].torch_dtype, device=self.device)
            self._group.broadcast(flat.view(torch.uint8), SENDER).wait()
            for spec, part in zip(bucket, torch.split(flat, sizes), strict=True):
                weights[spec.name] = part.view(spec.shape)
        return weights
