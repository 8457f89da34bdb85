"""Transport `broadcast`: from the learner to every engine, in bounded buckets.

Each rank of the learner that sends has a process group of its own, in which it is rank 0 and all
ranks of the engines are the others (`sending.py`). These groups are separate from torch's default
group, which the learner's ranks use. They are gloo on CPU and NCCL on GPU (NCCL is written, but has
not run yet). Every rank derives the same buckets from the same manifest. When a rank dies, the
other ranks fail within the deadline.

SGLang servers are members of each group (`init_weights_update_group`): so buckets are sent as bytes
(`load_format=flattened_bucket`), and the store has the prefixes that torch's own constructor uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from dapo_async.model import join_store, process_group
from dapo_async.weights.announcement import Manifest, TensorSpec

SENDER = 0  # the learner's rank in each group
GROUP_NAME = "dapo_async weights"


def group_name(sender: int) -> str:
    """The name of the group of the learner's rank `sender`."""
    return f"{GROUP_NAME} {sender}" if sender else GROUP_NAME


class WeightGroup:
    """One rank of a group. The constructor blocks until every rank has joined, or `timeout_s`."""

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        host: str,
        device: torch.device | str,
        timeout_s: float,
        sender: int = 0,
    ) -> None:
        """`sender`: the rank of the learner whose group it is."""
        self.device, name = torch.device(device), group_name(sender)
        # As torch.distributed.distributed_c10d nests them.
        for prefix in (name, f"{name}/", f"{self.device.type}/"):
            store = PrefixStore(prefix, store)
        self._group: Any = process_group(
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
        sender: int = 0,
    ) -> WeightGroup:
        """Connects to the store of the learner's first rank at `address`, from `host`."""
        return cls(
            join_store(address, timeout_s=timeout_s),
            rank=rank,
            world_size=world_size,
            host=host,
            device=device,
            timeout_s=timeout_s,
            sender=sender,
        )

    def close(self) -> None:
        """Leaves the group: whoever waits for this rank fails at once."""
        group, self._group = self._group, None
        if group is not None and self.device.type == "cuda":
            group.abort()

    @torch.no_grad()
    def send(self, weights: Mapping[str, Tensor], manifest: Manifest, *, bucket_bytes: int) -> None:
        """For the learner: one flattened broadcast per bucket."""
        for bucket in manifest.buckets(bucket_bytes):
            flat = torch.cat([weights[spec.name].to(self.device).reshape(-1) for spec in bucket])
            self._group.broadcast(flat.view(torch.uint8), SENDER).wait()

    @torch.no_grad()
    def receive(self, bucket: Sequence[TensorSpec]) -> dict[str, Tensor]:
        """For engines: the weights of one bucket, in new memory."""
        sizes = [spec.num_elements for spec in bucket]
        flat = torch.empty(sum(sizes), dtype=bucket[0].torch_dtype, device=self.device)
        self._group.broadcast(flat.view(torch.uint8), SENDER).wait()
        parts = zip(bucket, torch.split(flat, sizes), strict=True)
        return {spec.name: part.view(spec.shape) for spec, part in parts}


def receive(
    groups: Sequence[WeightGroup], manifest: Manifest, *, bucket_bytes: int
) -> dict[str, Tensor]:
    """For engines: the weights of one publish, from the groups of all senders.

    The weights that are served do not change, so generation continues meanwhile.
    """
    weights: dict[str, Tensor] = {}
    for bucket in manifest.buckets(bucket_bytes):
        weights |= groups[manifest.sender(bucket)].receive(bucket)
    return weights
