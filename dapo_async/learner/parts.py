"""One rank's part of a tensor, as `torch.distributed.checkpoint` reads and writes it.

`state.py` makes the parts, `state_files.py` hands them to torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dapo_async.model import part_of

if TYPE_CHECKING:  # takes more than a second to import
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.checkpoint.planner import WriteItem


@dataclass(frozen=True, slots=True)
class Part:
    """This rank's part of a tensor.

    Implements the protocol of torch.distributed.checkpoint (two methods with double underscores).
    The planners of `state_files.py` take the tensor out of it.
    """

    tensor: Tensor
    place: tuple[slice, ...]  # where the part lies in the whole tensor
    shape: torch.Size  # of the whole tensor

    @classmethod
    def of(cls, parameter: Tensor, tensor: Tensor) -> Part:
        """`tensor` belongs to the same part of the whole as this rank's part of `parameter`."""
        return cls(tensor, part_of(parameter), parameter.shape)

    @property
    def _offsets(self) -> torch.Size:
        return torch.Size(part.start for part in self.place)

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        (chunk,) = self.__create_chunk_list__()
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.tensor), self.shape)
        index = MetadataIndex(name, self._offsets)
        return [WriteItem(index, WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(self._offsets, self.tensor.shape)]
