"""From a YAML file and dotted overrides to a checked `Config`, and back to YAML.

OmegaConf loads, merges and checks types. It is imported on first use: packages that only need the
types of a `Config` run without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, get_args, get_origin

from dapo_async.config.schema import Config, knobs
from dapo_async.config.text import literal, one_line, redacted
from dapo_async.config.validate import check
from dapo_async.config.yaml_io import check_pairs, read_file, read_overrides, resolve_paths

if TYPE_CHECKING:
    from omegaconf import DictConfig


def load(path: str | Path, overrides: Sequence[str] = (), *, files: bool = True) -> Config:
    """The checked config of a YAML file, with dotted overrides (`learner.lr=1e-4`) on top.

    `files`: whether model and data have to exist. Raises ValueError with one line.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    every = tuple(knobs())
    names = [knob.name for knob in every]
    paths = {knob.name: knob.path for knob in every if knob.path}
    pairs = {
        knob.name: NoneType in get_args(knob.type)
        for knob in every
        if tuple in (get_origin(knob.type), *map(get_origin, get_args(knob.type)))
    }
    texts = {*paths, "run_dir", "tracking.mlflow", "tracking.sinks"}
    try:
        file, dotted = read_file(path, names), read_overrides(overrides, names, texts)
        for tree in (file, dotted):
            check_pairs(tree, pairs)
        resolve_paths(file, path.resolve().parent, paths)
        resolve_paths(dotted, Path.cwd(), paths)
        config = OmegaConf.to_object(OmegaConf.merge(_defaults(), file, dotted))
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error, names)) from error
    assert isinstance(config, Config)
    check(config, files=files)
    return config


@cache
def _defaults() -> DictConfig:
    """The tree of all knobs with their defaults. A merge copies it."""
    from omegaconf import OmegaConf

    tree: DictConfig = OmegaConf.structured(Config)
    return tree


def to_yaml(config: Config) -> str:
    """The resolved config with every knob. `load` reads back an equal one, but for the password
    of a tracking URI."""
    from omegaconf import OmegaConf

    uri = config.tracking.mlflow
    shown = replace(config, tracking=replace(config.tracking, mlflow=redacted(uri)))
    return OmegaConf.to_yaml(OmegaConf.create(literal(asdict(shown))))
