"""What a checkpoint keeps of the learner: `weights.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` in float32, under Hugging Face names (law 7).

Every rank writes its own parts beside its steps, as safetensors by `torch.distributed.checkpoint`, and any other number of ranks reads them: each the
parts that it needs. The files hold no pickles; who writes what the ranks tell each other by torch's own object collectives, in a group of their own.
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
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from dapo_async.learner.optimizer import ShardedAdamW
from dapo_async.model import Decoder, Mesh, part_of, shard_of

COUNTS_FILE = "learner.json"
WEIGHTS = "weights."


@dataclass(frozen=True, slots=True)
class Part:
    """This rank's part of a tensor, as torch.distributed.checkpoint asks for it (its protocol of dunder methods); the planners below find it."""

    tensor: Tensor
    place: tuple[slice, ...]  # in the whole tensor
    shape: torch.Size  # of the whole tensor

    @classmethod
    def of(cls, parameter: Tensor, tensor: Tensor) -> Part:
        """`tensor` lies where this rank's part of `parameter` does."""
        return cls(tensor, part_of(parameter), parameter.shape)

    @property
    def _offsets(self) -> torch.Size:
        return torch.Size(part.start for part in self.place)

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        (chunk,) = self.__create_chunk_list__()
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.tensor), self.shape)
        return [
            WriteItem(MetadataIndex(name, self._offsets), WriteItemType.SHARD, tensor_data=data)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(self._offsets, self.tensor.shape)]


class SavePlanner(DefaultSavePlanner):
    """torch's, finding the tensor in a `Part`."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].tensor


class LoadPlanner(DefaultLoadPlanner):
    """torch's, finding the tensor in a `Part`."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Takes the targets as they are: torch's own would drop whatever is no tensor."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        target: Part | Tensor = self.state_dict[index.fqn]
        return target.tensor if isinstance(target, Part) else target


@dataclass(frozen=True, slots=True)
class FrozenState:
    """One rank's parts of the state in the host's memory, as of one instant; no later step changes them."""

    version: int
    updates: int  # that the optimizer had done
    parts: Mapping[str, Part]


@torch.no_grad()
def freeze(decoder: Decoder, optimizer: ShardedAdamW, *, version: int) -> FrozenState:
    """Copies this rank's parts; needs no other rank."""
    copies = {
        key: Part(part.tensor.to("cpu", copy=True), part.place, part.shape)
        for key, part in _parts(decoder, optimizer).items()
    }
    return FrozenState(version, optimizer.updates, copies)


def _parts(decoder: Decoder, optimizer: ShardedAdamW) -> dict[str, Part]:
    """What this rank holds, without copies."""
    parameters = dict(decoder.named_parameters())
    parts = {
        WEIGHTS + name: Part.of(parameter, shard_of(parameter))
        for name, parameter in parameters.items()
    }
    return parts | {
        f"{moment}.{name}": Part.of(parameters[name], tensor)
        for moment, name, tensor in optimizer.moments()
    }


def save_state(state: FrozenState, folder: Path, mesh: Mesh) -> None:
    """Writes this rank's parts into `folder`; all ranks of the mesh call it, and when it returns those of all are there.

    It talks in a group of its own, so that a step may run meanwhile. Raises RuntimeError when it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alone = mesh.every.size == 1
    filled = {
        key: part for key, part in state.parts.items() if part.tensor.numel()
    }  # with more ranks than rows some have none of a tensor
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(
            filled,
            storage_writer=writer,
            planner=SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=None if alone else mesh.saving.group,
            no_dist=alone,
        )
    except CheckpointException as error:  # a BaseException, which nobody above would count
        raise RuntimeError(
            f"the learner's state can't be written to {folder}: {_last_line(error)}"
        ) from error
    if mesh.is_first:
        files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
        (folder / COUNTS_FILE).write_text(
            json.dumps(
                {"version": state.version, "updates": state.updates, "files": files}, indent=1
            )
            + "\n"
        )


@torch.no_grad()
def load_state(decoder: Decoder, optimizer: ShardedAdamW, folder: Path) -> int:
    """Takes this rank's parts, whichever number of ranks wrote them: it goes on exactly where they stood. Returns the version.

    Raises ValueError for a folder whose files are not all there, whole.
    """
    counts = _checked(folder)
    if counts["updates"]:
        optimizer.make_moments(counts["updates"])
    parts = {key: part for key, part in _parts(decoder, optimizer).items() if part.tensor.numel()}
    read = {
        key: Part(torch.full_like(part.tensor, torch.nan, device="cpu"), part.place, part.shape)
        for key, part in parts.items()
    }
    _load(read, folder)
    for key, part in parts.items():
        part.tensor.copy_(read[key].tensor)
    return int(counts["version"])


def read_state(folder: Path) -> dict[str, Tensor]:
    """All of it, whole, out of the parts that `save_state` wrote; on CPU. Raises as `load_state`."""
    _checked(folder)
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    whole = {name: torch.full(entry.size, torch.nan) for name, entry in metadata.items()}  # type: ignore[union-attr]
    _load(whole, folder)
    return whole


def read_weights(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The weights of these names, whole, out of the parts that `save_state` wrote; on CPU. Raises as `load_state`."""
    _checked(folder)
    whole = {WEIGHTS + name: torch.full([*shape], torch.nan) for name, shape in shapes.items()}
    _load(whole, folder)
    return {name.removeprefix(WEIGHTS): tensor for name, tensor in whole.items()}


def _checked(folder: Path) -> dict[str, Any]:
    """The counts, once every file is known to be there with its size: torch's reader takes whatever files there are for all of them."""
    try:
        counts: dict[str, Any] = json.loads((folder / COUNTS_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / COUNTS_FILE} can't be read ({error}); copy the checkpoint whole, or take another one"
        ) from error
    for name, size in counts["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            raise ValueError(
                f"{path} {found}, was written with {size}; copy the checkpoint whole, or take another one"
            )
    return counts


def _load(tensors: dict[str, Any], folder: Path) -> None:
    """Into the tensors' storage; every rank reads for itself."""
    try:
        dcp.load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            planner=LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
    except CheckpointException as error:  # a BaseException, which nobody above would count
        raise ValueError(
            f"the learner's state in {folder} can't be read: {_last_line(error)}"
        ) from error


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2]


# Otherwise each read, and each save of a rank alone, would say on the terminal that it is alone.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch")
