"""The texts of a config: what OmegaConf has to read, and what may be shown. Part of the room config, whose door is `config`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is used, as in config.py
    from omegaconf.errors import OmegaConfBaseException


def literal(value: Any) -> Any:
    r"""`value` as OmegaConf has to read it to get it back: an interpolation `${` within a text escaped as `\${`, backslashes before it doubled."""
    if isinstance(value, dict):
        return {name: literal(inner) for name, inner in value.items()}
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def redacted(text: str) -> str:
    """`text` without user and password of any URI in it: `http://me:secret@host` becomes `http://***@host`."""
    return re.sub(r"://[^/?#\s]*@", "://***@", text)


def one_line(error: OmegaConfBaseException, names: Sequence[str]) -> str:
    """What is wrong, and the remedy; `names` of every knob, of which the nearest to a misspelt one is told."""
    from omegaconf.errors import GrammarParseError, InterpolationResolutionError

    message = str(error).split("\n")[0]
    key = error.full_key or ""
    if "not in" in message and key:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.0) or names[:1]
        return f"unknown key {key}; did you mean {near[0]}? (dapo-async config --explain lists every knob)"
    if isinstance(error, GrammarParseError | InterpolationResolutionError):
        remedy = r"write \${ for a literal ${"
    elif "to string" in message:
        remedy = f"put a text with : or brackets into quotes, such as {key}='\"...\"'"
    else:
        remedy = "dapo-async config --explain shows every knob with its default"
    return f"{key}: {message}; {remedy}" if key else f"{message}; {remedy}"
