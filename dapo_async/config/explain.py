"""Every knob as text: for `dapo-async config --explain`, and as docs/configuration.md.

`python -m dapo_async.config.explain` prints docs/configuration.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from dapo_async.config.replaced import REPLACED, REPLACED_VALUES
from dapo_async.config.schema import Config, Knob, knobs, values_of
from dapo_async.config.text import shown

TYPES = {str: "text", int: "integer", float: "number", bool: "true or false"}
WIDTH = 100
SECTIONS = {
    "": "the run",
    "model": "the base model and the device",
    "data": "problems and prompts",
    "reward": "how responses are judged",
    "algorithm": "the loss",
    "rollout": "the engines that generate",
    "replay": "groups, staleness and filters",
    "learner": "ranks and optimizer",
    "weights": "how new weights reach the engines",
    "evaluation": "accuracy on held-out problems",
    "train": "length, checkpoints and records of a run",
    "tracking": "MLflow, TensorBoard and W&B",
    "network": "interface and ports",
    "deadlines": "how long something may take before the run ends, in seconds",
    "ray": "the cluster",
}
HEAD = """# Configuration

A config is a YAML file with sections of knobs. Every knob has a default. A file sets only the
knobs with other values.

- `dapo-async config FILE` prints the values of all knobs. `dapo-async config --explain` prints this
  list. With a file after it, it also marks the knobs that the file changes.
- An override has the form `section.knob=value`. Write it after the file:
  `dapo-async train configs/quickstart.yaml learner.lr=1e-4 seed=3`. Values are YAML: `null`,
  `true`, `[1, 2]`. A text with `:` or brackets needs two pairs of quotes:
  `data.template='"{problem}="'`.
- A path in a file is relative to the folder of the file; a path in an override is relative to the
  current folder. A literal `${` is written as `\\${`.
- For an unknown knob, the run does not start, and the message suggests the nearest known knob. For
  a knob of an earlier version, the message names its replacement.

This page is generated from `dapo_async/config/schema.py`:
`python -m dapo_async.config.explain > docs/configuration.md`.
"""


def allowed(knob: Knob) -> str:
    """Type and allowed values of a knob, such as `integer, at least 1` or `token | sequence`."""
    options = [option for option in _options(knob.type) if option is not NoneType]
    words = [
        str(value)
        for option in options
        if get_origin(option) is Literal
        for value in get_args(option)
    ]
    if get_origin(options[0]) is Literal:
        text, words = " | ".join(words), []
    elif get_origin(options[0]) is tuple:
        text = "[number or null, number or null]"
    else:
        text = TYPES[options[0]]
    bounds = knob.bounds
    if bounds.least is not None:
        text += f", at least {bounds.least.value:g}"
    if bounds.above is not None:
        text += ", positive"
    if bounds.most is not None:
        text += f", at most {bounds.most.value:,.0f}"
    words += ["null"] if NoneType in _options(knob.type) else []
    return " | ".join([text, *words])


def listing(config: Config | None = None) -> Iterator[str]:
    """The lines of `config --explain`. With a `config`, its values; `*` marks what it changes."""
    values = dict(values_of(Config() if config is None else config))
    if config is not None:
        yield "* marks the knobs that differ from their defaults"
    for section, members in _by_section():
        yield ""
        yield f"{section or 'the run'}: {SECTIONS[section]}" if section else "the run"
        for knob in members:
            value, default = shown(values[knob.name]), shown(knob.default)
            mark, was = ("*", f"; default {default}") if value != default else (" ", "")
            yield f"{mark} {knob.name} = {value}  ({allowed(knob)}{was})"
            yield f"      {knob.line}"


def markdown() -> str:
    """docs/configuration.md."""
    lines = [HEAD]
    for section, members in _by_section():
        lines += [f"## {section or 'The run'}", ""]
        if section:
            lines += [f"{SECTIONS[section][0].upper()}{SECTIONS[section][1:]}.", ""]
        lines += ["| knob | allowed | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{knob.name}` | {_cell(allowed(knob))} | `{shown(knob.default)}` "
            f"| {_cell(knob.line)} |"
            for knob in members
        ]
        lines.append("")
    lines += ["## Knobs of earlier versions", "", "| knob | now |", "|---|---|"]
    lines += [f"| {name} | {_cell(line)} |" for name, line in REPLACED.items()]
    lines += [
        f"| {name}={value} | {_cell(line)} |" for (name, value), line in REPLACED_VALUES.items()
    ]
    return "\n".join(lines) + "\n"


def _by_section() -> Iterator[tuple[str, Iterator[Knob]]]:
    yield from groupby(knobs(), key=lambda knob: knob.name.rpartition(".")[0])


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    members = get_args(annotation)
    is_union = members and get_origin(annotation) not in (Literal, tuple)
    return members if is_union else (annotation,)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(markdown(), end="")
