"""Where models and data come from: the grammar of model.path and of the data sources.

    data     [PRESET=]PATH | [PRESET=]hub:OWNER/NAME[/SUBSET][@REVISION][:SPLIT] | hub:PRESET
    model    PATH | [hub:]OWNER/NAME[@REVISION]

A preset (data/presets.py) knows the columns of a published data set; `hub:PRESET` is that set where
it was published. A model written as OWNER/NAME is looked up on the hub unless it is a folder.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Literal, get_args

Mode = Literal["drop", "warn", "off"]  # of data.contamination
HUB = "hub:"
PRESET = re.compile(r"([a-z][a-z0-9_]*)=(.+)", re.DOTALL)
MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
HUB_NAME = re.compile(r"hub:([\w.-]+(?:/[\w.-]+)?)(?:/([\w.-]+))?(?:@([\w./-]+))?(?::(.+))?")


@dataclass(frozen=True, slots=True)
class Source:
    """One data set or model: on disk (`path`), or on the hub (`hub`)."""

    preset: str | None = None
    path: Path | None = None
    hub: str | None = None  # OWNER/NAME, or the name of a preset
    subset: str | None = None
    revision: str | None = None
    split: str | None = None

    @property
    def name(self) -> str:
        """The short name for logs and counts."""
        if self.preset is not None:
            return self.preset
        if self.path is None:
            return str(self.hub)
        # Many data files are called data.jsonl or test.parquet: add the name of their folder.
        return (
            self.path.name
            if self.path.stem not in ("data", "train", "test")
            else f"{self.path.parent.name}/{self.path.name}"
        )

    @property
    def where(self) -> str:
        """The full name, for errors."""
        if self.path is not None:
            return str(self.path)
        parts = (("/", self.subset), ("@", self.revision), (":", self.split))
        return HUB + str(self.hub) + "".join(mark + part for mark, part in parts if part)


def matches(path: Path) -> list[Path]:
    """The path itself if it exists, else the paths that match it as a pattern, by name."""
    if os.path.exists(path):  # unlike Path.exists it raises nothing
        return [path]
    if not has_magic(str(path)):
        return []
    return [Path(name) for name in sorted(glob(str(path), recursive=True))]


def parse_source(text: str) -> Source:
    """Parses one source. Raises ValueError for a malformed hub name."""
    match = PRESET.fullmatch(text)
    preset, rest = (match[1], match[2]) if match else (None, text)
    if not rest.startswith(HUB):
        return Source(preset=preset, path=Path(rest))
    parts = HUB_NAME.fullmatch(rest)
    if parts is None:
        raise ValueError(
            f"{rest} is no name of the hub; write hub:OWNER/NAME[/SUBSET][@REVISION][:SPLIT], "
            "such as hub:openai/gsm8k/main:train"
        )
    return Source(preset, None, *parts.groups())


def parse_contamination(text: str) -> tuple[Mode, list[Source]]:
    """Parses `data.contamination`: MODE[,SOURCE...]. Raises ValueError for another mode."""
    word, *rest = (part.strip() for part in text.split(","))
    word = "off" if word == "False" else word  # YAML reads a plain `off` as false
    for mode in get_args(Mode):
        if word == mode:
            return mode, [parse_source(part) for part in rest if part]
    raise ValueError(
        f"data.contamination ({text}) must begin with {', '.join(get_args(Mode))}; "
        "write for example drop or drop,aime24=PATH"
    )


def resolved(text: str, folder: Path, *, kind: str) -> str:
    """`text` with its paths made absolute from `folder`; `kind` is model, data or `mode, data`.

    Raises OSError, RuntimeError or ValueError.
    """
    if kind == "mode, data":
        mode, *sources = (part.strip() for part in text.split(","))
        return ",".join([mode, *(resolved(each, folder, kind="data") for each in sources if each)])
    match = PRESET.fullmatch(text) if kind == "data" else None
    preset, rest = (f"{match[1]}=", match[2]) if match else ("", text)
    if rest.startswith(HUB):
        return text
    path = (folder / Path(rest).expanduser()).resolve()
    if kind == "model" and MODEL.fullmatch(rest) and not path.exists():
        return HUB + rest
    return preset + str(path)
