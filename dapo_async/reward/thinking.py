"""Where the thinking of a response ends: its prompt and its text come in, the conclusion leaves.

A prompt may end inside a thinking block: many chat templates end with `<think>`. Then the response
begins inside the block, although the response itself has no opening marker. Every verifier uses
this module. Every search takes linear time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# (opening, closing) marker of a thinking block, as published models write them.
MARKERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("◁think▷", "◁/think▷"),
)
# A turn that begins after an opening marker: the marker was in an earlier turn.
_TURN = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<(?:start|end)_of_turn>|\[/?INST\]|</?s>"
    r"|(?i:\n[#* ]{0,8}(?:user|human|assistant|system|question|problem)[* ]{0,4}:)"
)
_BEFORE_A_BLOCK = "\n>:]|▷｜"  # what a marker follows that opens a block; words are an instruction


def opened_by(prompt: str) -> tuple[str, str] | None:
    """The markers of the thinking block in which `prompt` ends; None when it ends in none.

    The prompt ends inside a block if the last opening marker has no closing marker after it, and
    only whitespace or the beginning of the thinking follows. A sentence such as `think within
    <think> tags` opens no block.
    """
    for opening, closing in MARKERS:
        start = prompt.rfind(opening)
        if start < 0 or prompt.rfind(closing) > start:
            continue
        rest = prompt[start + len(opening) :]
        if not rest.strip():
            return opening, closing
        before = prompt[:start].rstrip(" \t")
        if (not before or before[-1] in _BEFORE_A_BLOCK) and not _TURN.search(rest):
            return opening, closing
    return None


def conclusion(response: str, prompt: str = "") -> str | None:
    """The text of `response` after its thinking; the whole text where there is no thinking.

    None if the thinking does not end: `response` or `prompt` opened it, and the closing marker of
    the same kind does not follow.
    """
    opened, start = opened_by(prompt) if prompt else None, 0
    for markers in MARKERS:
        opening, closing = markers
        end = response.rfind(closing)
        if response.rfind(opening) > end or (end < 0 and markers == opened):
            return None
        if end >= 0:
            start = max(start, end + len(closing))
    return response[start:]


def prompt_text(prompt: Any) -> str:
    """The text with which a prompt ends: the text itself, or that of the last chat message.

    A message is `{"role": …, "content": …}`. Its content is a text, or a list of parts such as
    `{"type": "text", "text": …}`; None is empty. Raises ValueError for anything else.
    """
    if prompt is None:
        return ""
    if isinstance(prompt, str | int | float) and not isinstance(prompt, bool):
        return str(prompt)
    if isinstance(prompt, Sequence) and all(_is_message(message) for message in prompt):
        return _content(prompt[-1]["content"]) if prompt else ""
    raise ValueError(
        f"prompt ({type(prompt).__name__}) must be a text or a list of chat messages, each with a "
        "content; correct it or leave it out"
    )


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or "content" not in message:
        return False
    content = message["content"]
    return (
        content is None
        or isinstance(content, str)
        or (isinstance(content, list) and all(isinstance(part, dict | str) for part in content))
    )


def _content(content: Any) -> str:
    if not isinstance(content, list):
        return content or ""
    texts = (part if isinstance(part, str) else part.get("text") for part in content)
    return "".join(text for text in texts if isinstance(text, str))
