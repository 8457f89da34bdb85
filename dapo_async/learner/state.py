"""What a checkpoint keeps of the learner: `weights.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` in float32, under Hugging Face names (law 7).

Every rank writes its own parts beside its steps, as safetensors by `torch.distributed.checkpoint`, and any other number of ranks reads them: each the
parts that it needs. Nothing is pickled.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from dapo_async.learner.optimizer import ShardedAdamW
from dapo_async.model import Decoder, Mesh, like, shard_of

COUNTS_FILE = "learner.json"
WEIGHTS = "weights."


@dataclass(frozen=True, slots=True)
class FrozenState:
    """One rank's parts of the state in the host's memory, as of one instant; no later step changes them."""

    version: int
    updates: int  # that the optimizer had done
    tensors: Mapping[str, Tensor]


@torch.no_grad()
def freeze(decoder: Decoder, optimizer: ShardedAdamW, mesh: Mesh, *, version: int) -> FrozenState:
    """Copies this rank's parts; needs no other rank."""
    parameters = dict(decoder.named_parameters())

    def copied(name: str, part: Tensor) -> Tensor:
        return like(parameters[name], part.to("cpu", copy=True), mesh)

    tensors = {WEIGHTS + name: copied(name, shard_of(parameter)) for name, parameter in parameters.items()}
    tensors |= {f"{moment}.{name}": copied(name, part) for moment, name, part in optimizer.moments()}
    return FrozenState(version, optimizer.updates, tensors)


def save_state(state: FrozenState, folder: Path, mesh: Mesh) -> None:
    """Writes this rank's parts into `folder`; all ranks of the mesh call it, and when it returns those of all are there.

    It talks in a group of its own, so that a step may run meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alone = mesh.every.size == 1
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save({**state.tensors}, storage_writer=writer, process_group=None if alone else mesh.saving.group, no_dist=alone)
    if mesh.is_first:
        (folder / COUNTS_FILE).write_text(json.dumps({"version": state.version, "updates": state.updates}) + "\n")


@torch.no_grad()
def load_state(decoder: Decoder, optimizer: ShardedAdamW, mesh: Mesh, folder: Path) -> int:
    """Takes this rank's parts, whichever number of ranks wrote them: it goes on exactly where they stood. Returns the version."""
    counts = json.loads((folder / COUNTS_FILE).read_text())
    parameters = dict(decoder.named_parameters())
    if counts["updates"]:
        optimizer.make_moments(counts["updates"])
    parts = {WEIGHTS + name: (name, shard_of(parameter)) for name, parameter in parameters.items()}
    parts |= {f"{moment}.{name}": (name, part) for moment, name, part in optimizer.moments()}
    read = {key: like(parameters[name], torch.empty_like(part, device="cpu"), mesh) for key, (name, part) in parts.items()}
    _load(read, folder)
    for key, (_, part) in parts.items():
        part.copy_(shard_of(read[key]))
    return int(counts["version"])


def read_state(folder: Path) -> dict[str, Tensor]:
    """All of it, whole, out of the parts that `save_state` wrote; on CPU."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    whole = {name: torch.empty(entry.size) for name, entry in metadata.items()}  # type: ignore[union-attr]
    _load(whole, folder)
    return whole


def read_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The weights of these names, whole, out of the parts that `save_state` wrote; on CPU."""
    whole = {WEIGHTS + name: torch.empty(shape) for name, shape in shapes.items()}
    _load(whole, folder)
    return {name.removeprefix(WEIGHTS): tensor for name, tensor in whole.items()}


def _load(tensors: dict[str, Tensor], folder: Path) -> None:
    """Into the tensors' storage; every rank reads for itself."""
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


# Otherwise each read, and each save of a rank alone, would say on the terminal that it is alone.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch")
