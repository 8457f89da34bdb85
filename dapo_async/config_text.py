"""The texts of a config: what OmegaConf has to read, and what may be shown. Part of the room config, whose door is `config`."""

from __future__ import annotations

import re
from typing import Any


def literal(value: Any) -> Any:
    r"""`value` as OmegaConf has to read it to get it back: an interpolation `${` within a text escaped as `\${`, backslashes before it doubled."""
    if isinstance(value, dict):
        return {name: literal(inner) for name, inner in value.items()}
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def redacted(text: str) -> str:
    """`text` without user and password of any URI in it: `http://me:secret@host` becomes `http://***@host`."""
    return re.sub(r"://[^/?#\s]*@", "://***@", text)
