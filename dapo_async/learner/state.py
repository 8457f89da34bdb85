"""The learner's part of a checkpoint: weights and moments in float32 under Hugging Face names.

The tensors are `weights.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME`. Every rank writes its own
parts beside its steps, as safetensors through `torch.distributed.checkpoint`. Any number of ranks
can read them; each rank reads the parts that it needs. The files hold no pickles. To agree on who
writes what, the ranks use torch's object collectives in a separate process group.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapo_async.learner.optimizer import ShardedAdamW
from dapo_async.learner.parts import Part
from dapo_async.model import Decoder, Mesh, shard_of
from dapo_async.utils.reasons import unreadable

COUNTS_FILE = "learner.json"
WEIGHTS = "weights."


@dataclass(frozen=True, slots=True)
class RankState:
    """Copies of one rank's parts of the state in host memory; no later step changes them."""

    version: int
    updates: int  # optimizer updates so far
    reference: str | None  # content sum of the reference policy; None: without a KL term
    parts: Mapping[str, Part]


@torch.no_grad()
def capture_state(
    decoder: Decoder,
    optimizer: ShardedAdamW,
    *,
    version: int,
    reference: str | None = None,
    values_of: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> RankState:
    """Copies this rank's parts, without communication.

    `values_of` finds the values of a tensor whose device memory is released.
    """
    copies = {
        key: Part(values_of(part.tensor).to("cpu", copy=True), part.place, part.shape)
        for key, part in _parts(decoder, optimizer).items()
    }
    return RankState(version, optimizer.updates, reference, copies)


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
    from dapo_async.learner.state_files import write_parts

    folder.mkdir(parents=True, exist_ok=True)
    write_parts(_not_empty(state.parts), folder, mesh)
    if mesh.is_first:
        files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
        counts = {"version": state.version, "updates": state.updates, "files": files}
        if state.reference is not None:
            counts["reference"] = state.reference
        (folder / COUNTS_FILE).write_text(json.dumps(counts, indent=1) + "\n")


@torch.no_grad()
def load_state(
    decoder: Decoder,
    optimizer: ShardedAdamW,
    folder: Path,
    *,
    check: Callable[[Iterable[Path]], None] = lambda _: None,
) -> int:
    """Loads this rank's parts, written by any number of ranks; returns the version.

    `check` gets the files that this rank reads, before it reads them. Raises ValueError if a file
    of the folder is missing or incomplete, or if `check` does.
    """
    from dapo_async.learner.state_files import read_into

    check([folder / COUNTS_FILE])
    counts = check_state(folder)
    if counts["updates"]:
        optimizer.make_moments(counts["updates"])
    parts = _not_empty(_parts(decoder, optimizer))
    read = {
        key: Part(torch.full_like(part.tensor, torch.nan, device="cpu"), part.place, part.shape)
        for key, part in parts.items()
    }
    read_into(read, folder, check=check)
    for key, part in parts.items():
        part.tensor.copy_(read[key].tensor)
    return int(counts["version"])


def read_whole_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a saved state, whole and on CPU. Raises as `load_state`."""
    from dapo_async.learner.state_files import read_into, whole_shapes

    check_state(folder)
    whole = {name: torch.full(shape, torch.nan) for name, shape in whole_shapes(folder).items()}
    read_into(whole, folder)
    return whole


def read_whole_weights(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The weights with these names and shapes, whole and on CPU. Raises as `load_state`."""
    from dapo_async.learner.state_files import read_into

    check_state(folder)
    whole = {WEIGHTS + name: torch.full([*shape], torch.nan) for name, shape in shapes.items()}
    read_into(whole, folder)
    return {name.removeprefix(WEIGHTS): tensor for name, tensor in whole.items()}


def check_state(folder: Path) -> dict[str, Any]:
    """The counts of a saved state, after a check that every file is there with its size.

    Raises ValueError, which names the file. Torch's reader would not notice a missing file.
    """
    try:
        counts: dict[str, Any] = json.loads((folder / COUNTS_FILE).read_text())
        files = dict(counts["files"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / COUNTS_FILE} can't be read ({unreadable(error)}); "
            "copy the checkpoint whole, or take another one"
        ) from error
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            raise ValueError(
                f"{path} {found}, was written with {size}; "
                "copy the checkpoint whole, or take another one"
            )
    return counts
