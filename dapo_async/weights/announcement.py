"""What is said about weights without sending them: the learner's announcement and the engine's attestation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.model import buckets

BUCKET_BYTES = 64 * 2**20  # most bytes in flight per bucket; sender and receivers split alike


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str
    dtype: str  # such as "float32"
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype), self.dtype
        return dtype

    @property
    def line(self) -> tuple[str, str, tuple[int, ...]]:
        """As an engine is told over HTTP."""
        return self.name, self.dtype, self.shape

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.torch_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Manifest:
    """Names, dtypes and shapes in sending order; both sides derive the same buckets from it."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Manifest:
        return cls(
            tuple(
                TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                for name, tensor in weights.items()
            )
        )

    def buckets(self, bucket_bytes: int) -> Iterator[tuple[TensorSpec, ...]]:
        """Runs of neighbours of one dtype of at most `bucket_bytes` together; a larger tensor is a bucket of its own."""
        runs = buckets(
            self.tensors,
            lambda spec: spec.num_bytes,
            limit=bucket_bytes,
            kind=lambda spec: spec.dtype,
        )
        return map(tuple, runs)


@dataclass(frozen=True, slots=True)
class Announcement:
    """One version about to be published. `probe_logprobs [P - 1]` are the learner's answer to the fresh prompt `probe_ids [P]`."""

    incarnation: str
    version: int
    manifest: Manifest
    checksum: str  # of the weights as sent
    probe_ids: NDArray[np.int32]
    probe_logprobs: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Attestation:
    """What one engine says after an update: which version it serves, what its weights are, how it answered the probe before and after."""

    engine: str
    incarnation: str
    version: int
    probe_before: NDArray[np.float32]  # [P - 1] under the weights that were replaced
    probe_after: NDArray[np.float32]  # [P - 1] under the weights now served
    checksum_before: str | None = (
        None  # None: this engine's layout cannot be compared with the learner's
    )
    checksum_after: str | None = None
    own_checksum: str | None = (
        None  # of the weights as this engine lays them out: to be compared between engines of one layout only
    )
    pause_s: float = 0.0  # how long generation stood still
    recomputed_tokens: int = 0
