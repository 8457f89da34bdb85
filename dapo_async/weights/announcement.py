"""The records of a publish: the learner's announcement and each engine's attestation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dapo_async import model

if TYPE_CHECKING:  # the driver passes these records on without torch
    import torch
    from torch import Tensor

    from dapo_async.model import ShardCopy

BUCKET_BYTES = 64 * 2**20  # most bytes in flight per bucket; sender and receivers split alike


class BrokenOff(RuntimeError):
    """The broadcast ended before an engine had everything. It has to read the version from disk."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one tensor."""

    name: str
    dtype: str  # such as "float32"
    shape: tuple[int, ...]
    unit: int = 0  # of the weights that the learner's ranks bring together, and one of them sends

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype), self.dtype
        return dtype

    @property
    def header(self) -> tuple[str, str, tuple[int, ...]]:
        """The form in which an SGLang server gets it over HTTP."""
        return self.name, self.dtype, self.shape

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.torch_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Manifest:
    """The tensors in sending order; sender and receivers derive the same buckets from it."""

    tensors: tuple[TensorSpec, ...]
    num_senders: int = 1  # learner ranks, each with a group of its own

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Manifest:
        """The manifest of `weights`, in their order."""
        specs = []
        for name, tensor in weights.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            specs.append(TensorSpec(name, dtype, tuple(tensor.shape)))
        return cls(tuple(specs))

    @classmethod
    def of_copy(cls, copy: ShardCopy, *, num_senders: int = 1) -> Manifest:
        """The manifest of the whole weights that the learner's ranks have copies of."""
        dtype = str(copy.flat.dtype).removeprefix("torch.")
        specs = [TensorSpec(name, dtype, shape, unit) for unit, name, shape in copy.tensors()]
        return cls(tuple(specs), num_senders)

    def of_unit(self, number: int) -> Manifest:
        """The tensors of one unit."""
        return Manifest(tuple(spec for spec in self.tensors if spec.unit == number))

    def sender(self, bucket: Sequence[TensorSpec]) -> int:
        """The learner rank that sends this bucket."""
        return bucket[0].unit % self.num_senders

    def buckets(self, bucket_bytes: int) -> Iterator[tuple[TensorSpec, ...]]:
        """Consecutive tensors of one unit and dtype, at most `bucket_bytes` together.

        A larger tensor is a bucket of its own.
        """
        runs = model.buckets(
            self.tensors,
            lambda spec: spec.num_bytes,
            limit=bucket_bytes,
            kind=lambda spec: (spec.unit, spec.dtype),
        )
        return map(tuple, runs)


@dataclass(frozen=True, slots=True)
class Announcement:
    """One version that the learner is about to publish."""

    incarnation: str
    version: int
    manifest: Manifest
    checksum: str | None  # of the weights as sent; None until the publisher has asked for it
    probe_ids: NDArray[np.int32]  # [P] a prompt that no engine has seen before
    # [P - 1] the learner's logprobs of probe_ids[1:]; empty until the publisher has asked for them
    probe_logprobs: NDArray[np.float32]
    # What SGLang servers hash some tensors of these weights to, per rank; empty: there are none.
    server_hashes: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Attestation:
    """What one engine serves after an update."""

    engine: str
    incarnation: str
    version: int
    probe_before: NDArray[np.float32]  # [P - 1] under the weights that were replaced
    probe_after: NDArray[np.float32]  # [P - 1] under the weights that are served now
    # Checksums that are comparable with the learner's; None: the engine has another layout.
    checksum_before: str | None = None
    checksum_after: str | None = None
    # A checksum that is comparable between engines of one layout only.
    own_checksum: str | None = None
    # The hash of each tensor, by name, per rank of an SGLang server; empty: it computes none.
    hashes: tuple[Mapping[str, str], ...] = ()
    pause_s: float = 0.0  # how long generation was paused
    recomputed_tokens: int = 0
