"""Chat messages: the value of a prompt column comes in, its turns leave.

`problems.py` calls it. It reads these forms:

    text                                   one user turn
    [{role, content}, …]                   OpenAI, verl, TRL; also with {from, value} (ShareGPT)
    {role: […], content: […]}              the same by columns, from older versions of `datasets`
    {role, content}                        one turn without a list
    any of these as JSON text

`content` is a text, or a list of parts {type: text, text}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from dapo_async.data.cells import STRUCT, as_struct, text_of

USER, SYSTEM, ASSISTANT, TOOL = "user", "system", "assistant", "tool"
ROLES: Mapping[str, str] = MappingProxyType(
    {
        "system": SYSTEM,
        "developer": SYSTEM,
        "user": USER,
        "human": USER,
        "assistant": ASSISTANT,
        "gpt": ASSISTANT,
        "chatgpt": ASSISTANT,
        "model": ASSISTANT,
        "bot": ASSISTANT,
        "tool": TOOL,
        "function": TOOL,
        "observation": TOOL,
    }
)
FORMS = (("role", "content"), ("from", "value"))
CALLS = ("tool_calls", "function_call")
TEXT_PARTS = ("text", "input_text", "output_text")
PYTHON_CHAT = re.compile(r"\s*\[\s*\{\s*'(?:role|content|from|value)'\s*:")


class Turn(NamedTuple):
    """One message of a chat."""

    role: str  # system, user, assistant or tool
    content: str


def turns_of(value: Any) -> tuple[Turn, ...] | None:
    """The turns of a value in one of the forms; None for a text and for any other value.

    Raises ValueError, without the place, for a chat that can't be read.
    """
    match value:
        case [{"role": "user", "content": str(text), **others}] if not any(map(others.get, CALLS)):
            return (Turn(USER, text),)  # the form of the published data sets, much faster
    if isinstance(value, str):
        if not STRUCT.match(value):
            return None
        if PYTHON_CHAT.match(value):
            raise ValueError("is a Python list as text; write it as JSON or as a nested column")
        value = as_struct(value)
    value = _as_list(value)
    if not is_chat(value):
        return None
    return tuple(_turn(turn, number) for number, turn in enumerate(value, start=1))


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and any(_form(turn) is not None for turn in value)
        and all(turn is None or isinstance(turn, dict) for turn in value)
    )


def turn_path(value: Any, index: int) -> str:
    """The dotted name of the content of a turn, below the column of its chat."""
    chat = as_struct(value) if isinstance(value, str) else value
    if isinstance(chat, dict):
        return f"{(_form(chat) or FORMS[0])[1]}.{index}"
    form = _form(chat[index]) if isinstance(chat, list) else None
    return f"{index}.{(form or FORMS[0])[1]}"


def _form(turn: Any) -> tuple[str, str] | None:
    """The names of role and content in a turn; None for a value that is no turn."""
    if not isinstance(turn, dict):
        return None
    return next((form for form in FORMS if form[0] in turn and form[1] in turn), None)


def _as_list(value: Any) -> Any:
    """A lone turn as a list, and columns as a list of turns; every other value unchanged."""
    form = _form(value)
    if form is None:
        return value
    columns = [value[name] for name in form]
    if not all(isinstance(column, list) for column in columns):
        return value if isinstance(columns[0], list) else [value]
    if len(columns[0]) != len(columns[1]):
        raise ValueError(f"has {form[0]} and {form[1]} of different lengths; write one of each")
    return [dict(zip(form, turn, strict=True)) for turn in zip(*columns, strict=True)]


def _turn(turn: Any, number: int) -> Turn:
    form = _form(turn)
    if form is None:
        raise ValueError(
            f"has no role and content in turn {number}; write both (or from and value)"
        )
    role = turn[form[0]]
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise ValueError(f"has the role {role!r} in turn {number}; write one of {', '.join(ROLES)}")
    if any(turn.get(calls) for calls in CALLS):
        raise ValueError(
            f"has tool calls in turn {number}, which would be lost; write them into its content"
        )
    return Turn(known, _content(turn[form[1]], number))


def _content(value: Any, number: int) -> str:
    """The text of a turn. Parts are joined by line breaks."""
    parts: Sequence[Any] = value if isinstance(value, list) else [value]
    texts = [text_of(_part(part, number)) for part in parts]
    if any(text is None for text in texts):
        raise ValueError(
            f"has a {type(value).__name__} as content of turn {number}; "
            "write a text, or a list of parts {type: text, text}"
        )
    return "\n".join(text for text in texts if text)


def _part(part: Any, number: int) -> Any:
    if not isinstance(part, dict):
        return part
    kind = part.get("type") or "text"
    if kind not in TEXT_PARTS or "text" not in part:
        raise ValueError(
            f"has a part of type {kind!r} in turn {number}; only text is read: remove the part"
        )
    return part["text"]
