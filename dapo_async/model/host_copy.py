"""Takes tensors out of the memory of their device and puts them back, in place.

With `model.placement=shared` learner and engine take turns on a device. Who does not have the turn
keeps its tensors here. Only storages are freed: parameters, the optimizer's shards, FSDP's buffers
and joined weights stay the same objects and views, so nobody has to look them up again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, UntypedStorage


class HostCopy:
    """The values of tensors whose device memory is freed. Between `release` and `restore` nobody
    may read them but by `view`: a CPU has no check for that."""

    def __init__(self) -> None:
        self._released: dict[int, tuple[UntypedStorage, Tensor]] = {}  # by the storage's address
        self._buffers: dict[int, Tensor] = {}  # pinned ones, for the next time

    @property
    def num_bytes(self) -> int:
        """Device memory that is freed now."""
        return sum(host.numel() for _, host in self._released.values())

    @torch.no_grad()
    def release(self, tensors: Iterable[Tensor]) -> None:
        """Copies the storages of `tensors` to the host and frees them on their devices.

        Views of one storage are moved once. Each tensor is on one device; distributed ones are
        given as their local parts.
        """
        assert not self._released, "`restore` comes before the next `release`"
        cuda = False
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._released or not size:
                continue
            on_gpu = tensor.device.type == "cuda"
            host = self._buffers.get(key)
            if host is None or host.numel() != size:
                host = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
            host.copy_(_bytes_of(storage, tensor.device))
            if on_gpu:  # to pin memory takes longer than to copy it
                self._buffers[key] = host
            self._released[key] = storage, host
            storage.resize_(0)
            cuda = cuda or on_gpu
        if cuda:
            torch.cuda.empty_cache()

    @torch.no_grad()
    def restore(self) -> None:
        """Everything is on its device again, with the same values."""
        for storage, host in self._released.values():
            storage.resize_(host.numel())
            _bytes_of(storage, storage.device).copy_(host)
        self._released.clear()

    def view(self, tensor: Tensor) -> Tensor:
        """The values of `tensor`: on the host, without a copy, while it is released."""
        found = self._released.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor
        storage = found[1].untyped_storage()
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        return torch.empty(0, dtype=tensor.dtype).set_(storage, *place)


def _bytes_of(storage: UntypedStorage, device: torch.device) -> Tensor:
    """A tensor of bytes on all of `storage`."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
