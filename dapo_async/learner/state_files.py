"""Reads and writes the files of a learner's state through `torch.distributed.checkpoint`.

In and out: tensors by name, each in a `Part` where a rank has only a part of it. Only `state.py`
calls it, and imports it on first use: `torch.distributed.checkpoint` takes more than a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
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
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.futures import Future

from dapo_async.learner.parts import Part
from dapo_async.model import Mesh
from dapo_async.utils.files import disk_fault


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


class CheckedReader(HuggingFaceStorageReader):
    """Torch's reader, which gives `check` the files from which it is about to read tensors."""

    def __init__(self, folder: Path, check: Callable[[Iterable[Path]], None]) -> None:
        super().__init__(str(folder))
        self._check = check

    def read_data(self, plan: LoadPlan, planner: DefaultLoadPlanner) -> Future[None]:  # type: ignore[override]
        self._check(
            {Path(self.storage_data[each.storage_index].relative_path) for each in plan.items}
        )
        return super().read_data(plan, planner)


def write_parts(parts: Mapping[str, Part], folder: Path, mesh: Mesh) -> None:
    """Writes this rank's parts; returns when the parts of all ranks are there.

    Raises OSError if the disk refuses them, and RuntimeError for anything else.
    """
    alone = mesh.every.size == 1
    try:
        dcp.save(
            dict(parts),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            planner=SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=None if alone else mesh.saving.group,
            no_dist=alone,
        )
    except CheckpointException as error:  # a BaseException, which no caller would count
        for failure, _ in error.failures.values():
            if disk_fault(failure) is not None:
                # A new error: `failure` with `error` as its cause is a circle, because torch
                # prints every failure, with its cause, in the text of `error`.
                raise _same(failure) from None
        raise RuntimeError(
            f"the learner's state can't be written to {folder}: {_last_line(error)}"
        ) from error


def whole_shapes(folder: Path) -> dict[str, torch.Size]:
    """The shapes of all whole tensors, by name."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    shapes = {}
    for name, entry in metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        shapes[name] = entry.size
    return shapes


def read_into(
    tensors: Mapping[str, Part | Tensor],
    folder: Path,
    *,
    check: Callable[[Iterable[Path]], None] = lambda _: None,
) -> None:
    """Reads into the tensors' storage, without communication.

    `check` gets the files from which they are read, before, and raises ValueError if one of them
    must not be used. Raises ValueError if the tensors cannot be read.
    """
    try:
        dcp.load(
            dict(tensors),
            storage_reader=CheckedReader(folder, check),
            planner=LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
    except CheckpointException as error:  # a BaseException, which no caller would count
        raise ValueError(
            f"the learner's state in {folder} can't be read: {_last_line(error)}"
        ) from error


def _same(failure: BaseException) -> Exception:
    """A copy of an error by which the disk refused a write."""
    if isinstance(failure, OSError):
        return OSError(failure.errno, failure.strerror, failure.filename)
    return RuntimeError(str(failure))


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2]


# Torch would print this warning at every read, and at every save of a single rank.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch")
