"""Values in the columns of a row: lookup by dotted name, and the text of a value.

`problems.py` calls it. Rows come from `sources.py`: JSON values, or values that pyarrow made.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any, Final

ABSENT: Final = object()
CONTROL = bytes({*range(32), 127} - set(b"\t\n\r"))
LAST_TURNS = (".-1.content", ".-1.value")
INDEX = re.compile(r"-?\d+")
STRUCT = re.compile(r"\s*[\[{]")
# Text that starts so is no mathematics: a list of texts or an object, written as JSON.
JSON_TEXT = re.compile(r'\s*(?:\[\s*)?(?:\{\s*)?"')
VISIBLE = re.compile(r"[^\s\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")


def lookup(values: Any, key: str) -> Any:
    """`values[key]`, or the value at the dotted path `key`; `ABSENT` where there is none.

    An index counts from 0, or from the end when it is negative. A text on the way that is a JSON
    object or list is read as such; any other text is a chat of one turn. Below null everything is
    null.
    """
    if isinstance(values, dict) and key in values:
        return values[key]
    for part in key.split("."):
        if values is None:
            return None
        if isinstance(values, str):
            text, values = values, as_struct(values)
            if values is text and part == "-1" and key.endswith(LAST_TURNS):
                return text
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif _is_index(values, part):
            values = values[int(part)]
        else:
            return ABSENT
    return values


def _is_index(values: Any, part: str) -> bool:
    if not isinstance(values, list) or not INDEX.fullmatch(part):
        return False
    return -len(values) <= int(part) < len(values)


def as_struct(text: str) -> Any:
    """The object or list that `text` is as JSON; `text` itself when it is none."""
    if not STRUCT.match(text):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def text_of(value: Any) -> str | None:
    """A text or number as text; empty for null, NaN and infinity; None for every other type.

    Numbers are written in full, without exponent. A whole number has no decimal point: pandas
    stores a column of integers with a missing one as floats.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal):
        return _decimal_text(value)
    return None


def _decimal_text(value: float | Decimal) -> str:
    approximate = float(value)
    if not math.isfinite(approximate):
        return ""
    if approximate == 0:
        return "0"
    text = f"{value if isinstance(value, Decimal) else Decimal(repr(value)):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def is_blank(text: str) -> bool:
    """Whether a text has no visible character."""
    return VISIBLE.search(text) is None


def has_control_characters(text: str) -> bool:
    """Whether a text has control characters other than tabs and line breaks.

    They often come from badly escaped LaTeX in JSON: `\\frac` becomes a form feed and `rac`.
    """
    characters = text.encode()
    return len(characters.translate(None, CONTROL)) < len(characters)


def damage(text: str) -> str | None:
    """What keeps a text from being used; None for a good one.

    A lone surrogate is one half of a character: it has no UTF-8, so no tokenizer takes it.
    """
    if "\0" in text:
        return "with a NUL character"
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        return "with half a character (a lone surrogate)"
    return None


def json_kind(text: str) -> str | None:
    """`list` or `dict` for a text that is one as JSON and can't be an answer, else None.

    `[1, 2]` may be an answer; `["1"]` is none.
    """
    if not JSON_TEXT.match(text):
        return None
    value = as_struct(text)
    return None if isinstance(value, str) else type(value).__name__
