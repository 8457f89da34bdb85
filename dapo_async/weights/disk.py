"""Transport `disk`: weights through a shared folder.

One folder per version, whose file becomes visible by an atomic rename. The newest two are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dapo_async.model import read_weights, save_weights

KEPT_VERSIONS = 2  # the one being served and the one being published


def version_folder(folder: Path, version: int) -> Path:
    """The folder of `version`, which may not exist yet."""
    return Path(folder) / f"version_{version:06d}"


def write_version(weights: Mapping[str, Tensor], folder: Path, *, version: int) -> Path:
    """Writes one version, removes all but the newest two, and returns its folder."""
    target = version_folder(folder, version)
    target.mkdir(parents=True, exist_ok=True)
    save_weights(weights, target)
    for old in sorted(Path(folder).glob("version_*"))[:-KEPT_VERSIONS]:
        if old != target:
            shutil.rmtree(old)
    return target


def read_version(folder: Path, *, version: int) -> dict[str, Tensor]:
    """Reads what `write_version` wrote. Raises ValueError when the version does not exist."""
    return read_weights(version_folder(folder, version))
