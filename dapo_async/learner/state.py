"""The learner's part of a checkpoint: weights and moments in float32 under Hugging Face names.

The tensors are `weights.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME`. Every rank writes its own
parts beside its steps, as safetensors through `torch.distributed.checkpoint`. Any number of ranks
can read them; each rank reads the parts that it needs. The files hold no pickles. To agree on who
writes what, the ranks use torch's object collectives in a separate process group.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from dapo_async.learner.optimizer import ShardedAdamW
from dapo_async.model import Decoder, Mesh, part_of, shard_of

COUNTS_FILE = "learner.json"
WEIGHTS = "weights."


@dataclass(frozen=True, slots=True)
class Part:
    """This rank's part of a tensor.

    Implements the protocol of torch.distributed.checkpoint (two methods with double underscores).
    The planners below take the tensor out of it.
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
        (chunk,) = self.__create_chunk_list__()
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.tensor), self.shape)
        index = MetadataIndex(name, self._offsets)
        return [WriteItem(index, WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(self._offsets, self.tensor.shape)]


class SavePlanner(DefaultSavePlanner):
    """Torch's planner for tensors inside a `Part`."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].tensor


class LoadPlanner(DefaultLoadPlanner):
    """Torch's planner for tensors inside a `Part`."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Keeps all targets; torch's own method drops those that are no tensors."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        target: Part | Tensor = self.state_dict[index.fqn]
        return target.tensor if isinstance(target, Part) else target


@dataclass(frozen=True, slots=True)
class RankState:
    """Copies of one rank's parts of the state in host memory; no later step changes them."""

    version: int
    updates: int  # optimizer updates so far
    parts: Mapping[str, Part]


@torch.no_grad()
def capture_state(decoder: Decoder, optimizer: ShardedAdamW, *, version: int) -> RankState:
    """Copies this rank's parts, without communication."""
    copies = {
        key: Part(part.tensor.to("cpu", copy=True), part.place, part.shape)
        for key, part in _parts(decoder, optimizer).items()
    }
    return RankState(version, optimizer.updates, copies)


def _parts(decoder: Decoder, optimizer: ShardedAdamW) -> dict[str, Part]:
    """This rank's parts, without copies."""
    parameters = dict(decoder.named_parameters())
    weights = {
        WEIGHTS + name: Part.of(parameter, shard_of(parameter))
        for name, parameter in parameters.items()
    }
    moments = {
        f"{moment}.{name}": Part.of(parameters[name], tensor)
        for moment, name, tensor in optimizer.moments()
    }
    return weights | moments


def _not_empty(parts: Mapping[str, Part]) -> dict[str, Part]:
    """With more ranks than rows, some ranks have an empty part of a tensor."""
    return {key: part for key, part in parts.items() if part.tensor.numel()}


def save_state(state: RankState, folder: Path, mesh: Mesh) -> None:
    """Writes this rank's parts into `folder`; returns when the parts of all ranks are there.

    All ranks of the mesh call it. They communicate in a separate process group, so a step may run
    at the same time. Raises RuntimeError if the state cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alone = mesh.every.size == 1
    try:
        dcp.save(
            _not_empty(state.parts),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            planner=SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=None if alone else mesh.saving.group,
            no_dist=alone,
        )
    except CheckpointException as error:  # a BaseException, which no caller would count
        raise RuntimeError(
            f"the learner's state can't be written to {folder}: {_last_line(error)}"
        ) from error
    if mesh.is_first:
        files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
        counts = {"version": state.version, "updates": state.updates, "files": files}
        (folder / COUNTS_FILE).write_text(json.dumps(counts, indent=1) + "\n")


@torch.no_grad()
def load_state(decoder: Decoder, optimizer: ShardedAdamW, folder: Path) -> int:
    """Loads this rank's parts, written by any number of ranks; returns the version.

    Raises ValueError if a file of the folder is missing or incomplete.
    """
    counts = _checked(folder)
    if counts["updates"]:
        optimizer.make_moments(counts["updates"])
    parts = _not_empty(_parts(decoder, optimizer))
    read = {
        key: Part(torch.full_like(part.tensor, torch.nan, device="cpu"), part.place, part.shape)
        for key, part in parts.items()
    }
    _load(read, folder)
    for key, part in parts.items():
        part.tensor.copy_(read[key].tensor)
    return int(counts["version"])


def read_whole_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a saved state, whole and on CPU. Raises as `load_state`."""
    _checked(folder)
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    whole = {}
    for name, entry in metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        whole[name] = torch.full(entry.size, torch.nan)
    _load(whole, folder)
    return whole


def read_whole_weights(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The weights with these names and shapes, whole and on CPU. Raises as `load_state`."""
    _checked(folder)
    whole = {WEIGHTS + name: torch.full([*shape], torch.nan) for name, shape in shapes.items()}
    _load(whole, folder)
    return {name.removeprefix(WEIGHTS): tensor for name, tensor in whole.items()}


def _checked(folder: Path) -> dict[str, Any]:
    """The counts of a saved state, after a check that every file is there with its size.

    Torch's reader would not notice a missing file.
    """
    try:
        counts: dict[str, Any] = json.loads((folder / COUNTS_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / COUNTS_FILE} can't be read ({error}); "
            "copy the checkpoint whole, or take another one"
        ) from error
    for name, size in counts["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            raise ValueError(
                f"{path} {found}, was written with {size}; "
                "copy the checkpoint whole, or take another one"
            )
    return counts


def _load(tensors: dict[str, Any], folder: Path) -> None:
    """Reads into the tensors' storage, without communication."""
    try:
        dcp.load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            planner=LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
    except CheckpointException as error:  # a BaseException, which no caller would count
        raise ValueError(
            f"the learner's state in {folder} can't be read: {_last_line(error)}"
        ) from error


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2]


# Torch would print this warning at every read, and at every save of a single rank.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch")
