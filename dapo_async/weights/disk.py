"""Transport 2: weights through a shared folder. One file per version, visible by an atomic rename; the newest two are kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dapo_async.model import read_weights, save_weights

KEPT_VERSIONS = 2  # the one being served and the one being published


def version_folder(folder: Path, version: int) -> Path:
    """Where `version` lies, written or not."""
    return Path(folder) / f"version_{version:06d}"


def write_version(weights: Mapping[str, Tensor], folder: Path, *, version: int) -> Path:
    """Writes one version and removes those that no engine can need any more. Returns its folder."""
    target = version_folder(folder, version)
    target.mkdir(parents=True, exist_ok=True)
    save_weights(weights, target)
    for old in sorted(Path(folder).glob("version_*"))[:-KEPT_VERSIONS]:
        if old != target:
            shutil.rmtree(old)
    return target


def read_version(folder: Path, *, version: int) -> dict[str, Tensor]:
    """Reads what `write_version` wrote. Raises ValueError when that version is not there."""
    return read_weights(version_folder(folder, version))
