"""A YAML file and dotted overrides as OmegaConf trees, with paths made absolute."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from dapo_async.config.replaced import refuse_replaced
from dapo_async.config.sources import resolved
from dapo_async.config.text import literal

if TYPE_CHECKING:  # imported on first use, as in load.py
    from omegaconf import DictConfig

EXAMPLE = "configs/quickstart.yaml"


def read_file(path: Path, names: Sequence[str]) -> DictConfig:
    """The tree of a YAML file. Raises ValueError, and what OmegaConf raises."""
    import yaml
    from omegaconf import DictConfig, OmegaConf

    if path.is_dir():
        raise ValueError(f"config file {path} is a folder; give a YAML file, such as {EXAMPLE}")
    if not path.exists():
        raise ValueError(f"config file {path} does not exist; give a YAML file, such as {EXAMPLE}")
    try:
        text = path.read_text(encoding="utf-8")
        tree = OmegaConf.create(text) if isinstance(yaml.safe_load(text), dict | None) else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise ValueError(
            f"config file {path} is not valid YAML: {what}; correct it there"
        ) from error
    except OSError as error:
        raise ValueError(f"config file {path} can't be read: {error.strerror}") from error
    if not isinstance(tree, DictConfig):
        raise ValueError(
            f"config file {path} must hold sections of knobs, not a single value or a list; "
            f"write it like {EXAMPLE}"
        )
    _check_names(tree, names)
    return tree


def read_overrides(
    overrides: Sequence[str], names: Sequence[str], paths: Collection[str] = ()
) -> DictConfig:
    """The tree of `key=value` words. Raises ValueError for another form.

    The values of the knobs in `paths` are texts as they stand, the others are YAML.
    """
    import yaml
    from omegaconf import OmegaConf

    tree = OmegaConf.create({})
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(
                f"override {override!r} is not of the form key=value; write for example "
                "learner.lr=1e-4"
            )
        if key in paths:
            override = f"{key}={_as_text(value)}"
        try:
            tree.merge_with_dotlist([override])
        except yaml.YAMLError as error:
            raise ValueError(
                f"the value of override {override!r} is not valid YAML; put it into quotes, such "
                f"as {key}='\"...\"'"
            ) from error
    _check_names(tree, names)
    return tree


def _as_text(value: str) -> str:
    """A path as YAML, with escapes: in plain YAML `a #b` would be `a`, and `007` would be `7`."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value if quoted or value in ("", "null") else json.dumps(value)


def _check_names(tree: DictConfig, names: Sequence[str]) -> None:
    """Raises ValueError for a knob that was replaced, and for a section that has a value."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(tree, resolve=False)
    refuse_replaced({str(key): value for key, value in values.items()})
    for name in names:
        section, dot, _ = name.partition(".")
        if dot and section in values and not isinstance(values[section], dict):
            raise ValueError(
                f"{section} ({values[section]!r}) is a section of knobs and has no value; "
                f"set one of its knobs, such as {name}"
            )


def check_pairs(tree: DictConfig, pairs: Mapping[str, bool]) -> None:
    """Raises ValueError for a value of one of these knobs that is no list of two numbers or nulls.

    `pairs`: name -> whether the knob may also be null as a whole. OmegaConf's own messages name
    neither the knob nor a remedy.
    """
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(tree, resolve=False)
    for name, nullable in pairs.items():
        section, _, leaf = name.partition(".")
        value = (values.get(section) or {}).get(leaf, [None, None])
        if value is None and nullable:
            continue
        is_pair = isinstance(value, list | tuple) and len(value) == 2
        if not is_pair or not all(type(number) in (int, float, NoneType) for number in value):
            raise ValueError(
                f"{name} ({value!r}) must be a list of two numbers or nulls, such as [0.5, 5.0] or "
                "[null, 2.0]"
            )


def resolve_paths(tree: DictConfig, folder: Path, kinds: Mapping[str, str]) -> None:
    """Makes the paths of the knobs in `kinds` (name to kind) absolute, in place.

    Raises ValueError for a text that can't be a path.
    """
    from omegaconf import OmegaConf

    for name, kind in kinds.items():
        value = OmegaConf.select(tree, name)
        if not isinstance(value, str) or not value:
            continue
        try:
            OmegaConf.update(tree, name, literal(resolved(value, folder, kind=kind)))
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{name} ({value!r}) can't be a path: {error}") from error
