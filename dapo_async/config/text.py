"""Texts of a config: escapes for OmegaConf, URIs without passwords, errors as one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported on first use, as in load.py
    from omegaconf.errors import OmegaConfBaseException


def literal(value: Any) -> Any:
    r"""`value` with `${` escaped as `\${`, so that OmegaConf reads back the same text.

    Backslashes before it are doubled.
    """
    if isinstance(value, dict):
        return {name: literal(inner) for name, inner in value.items()}
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def shown(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(shown, value))}]"
    return '""' if value == "" else str(value)


def redacted(text: str) -> str:
    """`text` without user and password of any URI: `http://me:secret@host` is `http://***@host`."""
    return re.sub(r"://[^/?#\s]*@", "://***@", text)


def nearest_knob(key: str, names: Sequence[str]) -> str:
    """The knob that a misspelt `key` probably means, or several with "or" between them.

    A key that lacks its section, or has a wrong one, means the knobs of that name: `clip_low` is
    `algorithm.clip_low`.
    """
    section, _, leaf = key.rpartition(".")
    same = [name for name in names if name.rpartition(".")[2] == leaf]
    if same:
        return " or ".join(same)
    in_section = [name for name in names if section and name.startswith(f"{section}.")]
    near = difflib.get_close_matches(key, in_section or names, n=1, cutoff=0.0)
    return near[0] if near else names[0]


def one_line(error: OmegaConfBaseException, names: Sequence[str]) -> str:
    """What is wrong and the remedy. `names`: every knob, to suggest one for a misspelt key."""
    from omegaconf.errors import GrammarParseError, InterpolationResolutionError

    message = str(error).split("\n")[0]
    key = error.full_key or ""
    if "not in" in message and key:
        return f"unknown key {key}; did you mean {nearest_knob(key, names)}?"
    if isinstance(error, GrammarParseError | InterpolationResolutionError):
        remedy = r"write \${ for a literal ${"
    elif "to string" in message:
        remedy = f"put a text with : or brackets into quotes, such as {key}='\"...\"'"
    else:
        remedy = "dapo-async config --explain lists types and allowed values"
    return f"{key}: {message}; {remedy}" if key else f"{message}; {remedy}"
