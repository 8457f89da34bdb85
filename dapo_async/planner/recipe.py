"""A config for `dapo-async train` with the split of a plan.

In: overrides, and the config that they are for. Out: YAML with every knob. `dapo-async plan
--config` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dapo_async.config import load, to_yaml


def planned_config(recipe: Path, overrides: Sequence[str]) -> str:
    """The config of the file `recipe` with the split. It names no run directory.

    Raises ValueError with one line if the config is wrong, or if the split breaks one of its rules.
    """
    load(recipe, files=False)  # so that the next error is one of the split
    try:
        return to_yaml(replace(load(recipe, overrides, files=False), run_dir=""))
    except ValueError as error:
        raise ValueError(
            f"{recipe} does not accept the split: {error}; change the config or the scenario"
        ) from error
