"""A YAML file and dotted overrides as OmegaConf trees, paths made absolute. Part of the room config, whose door is `config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_async.config.replaced import refuse_replaced
from dapo_async.config.sources import resolved
from dapo_async.config.text import literal

if TYPE_CHECKING:  # imported where it is used, so that rooms that take a part of the tree of knobs run without OmegaConf
    from omegaconf import DictConfig


def read_file(path: Path, names: Sequence[str]) -> DictConfig:
    """The tree of a YAML file. Raises ValueError where there is none, and what OmegaConf raises."""
    import yaml
    from omegaconf import DictConfig, OmegaConf

    if not path.is_file():
        raise ValueError(
            f"config file {path} does not exist; give the path of a YAML file such as configs/quickstart.yaml"
        )
    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"config file {path} is not valid YAML: {' '.join(str(error).split())}; correct it there"
        ) from error
    except OSError as error:  # also what OmegaConf raises for a file that holds a single number
        raise ValueError(
            f"config file {path} can't be read: {error}; give a YAML file such as configs/quickstart.yaml"
        ) from error
    if not isinstance(tree, DictConfig):
        raise ValueError(
            f"config file {path} must hold a mapping of knobs, not {type(tree).__name__}; see configs/quickstart.yaml"
        )
    _check_names(tree, names)
    return tree


def read_overrides(overrides: Sequence[str], names: Sequence[str]) -> DictConfig:
    """The tree of `key=value` words. Raises ValueError for another form."""
    import yaml
    from omegaconf import OmegaConf

    tree = OmegaConf.create({})
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(
                f"override {override!r} is not of the form key=value; write for example learner.lr=1e-4"
            )
        try:
            tree.merge_with_dotlist([override])
        except yaml.YAMLError as error:
            raise ValueError(
                f"the value of override {override!r} is not valid YAML; put it into quotes, such as {key}='\"...\"'"
            ) from error
    _check_names(tree, names)
    return tree


def _check_names(tree: DictConfig, names: Sequence[str]) -> None:
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(values, dict)
    refuse_replaced({str(key): value for key, value in values.items()})
    for name in names:
        group, dot, _ = name.partition(".")
        if dot and group in values and not isinstance(values[group], dict):
            raise ValueError(
                f"{group} ({values[group]!r}) is a group of knobs and has no value of its own; set one of its knobs, such as {name}"
            )


def resolve_paths(tree: DictConfig, folder: Path, kinds: Mapping[str, str]) -> None:
    """Makes the paths of the knobs in `kinds` (name to kind) absolute. Raises ValueError for one that is none."""
    from omegaconf import OmegaConf

    for name, kind in kinds.items():
        value = OmegaConf.select(tree, name)
        if isinstance(value, str) and value:
            try:
                OmegaConf.update(tree, name, literal(resolved(value, folder, kind=kind)))
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"{name} ({value!r}) is no usable path: {error}; give another path"
                ) from error
