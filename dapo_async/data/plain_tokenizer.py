"""A tokenizer.json without additions, read by the library `tokenizers` alone.

`tokenizer.py` uses it where transformers would add nothing. The import of transformers brings torch
along and takes seconds in each process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# Values of tokenizer_config.json that change nothing beside tokenizer.json.
NEUTRAL = {*SPECIAL, "tokenizer_class", "model_max_length", "clean_up_tokenization_spaces"}
# transformers reads these too, where they exist.
OTHER_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
AS_IT_IS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def is_plain(folder: Path) -> bool:
    """Whether transformers would use the folder's tokenizer.json exactly as it is.

    Of a folder with broken files it is not, so that transformers reports the error.
    """
    if any((folder / name).exists() for name in OTHER_FILES):
        return False
    try:
        config = _read(folder / "tokenizer_config.json")
        if not config.keys() <= NEUTRAL or config.get("clean_up_tokenization_spaces", False):
            return False
        whole = _read(folder / "tokenizer.json")
        special = {
            token["content"]
            for token in whole["added_tokens"]
            if token["special"] and all(token[name] is value for name, value in AS_IT_IS.items())
        }
        named = {config[name] for name in SPECIAL if config.get(name) is not None}
        return named <= special and whole["truncation"] is None and whole["padding"] is None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


class PlainTokenizer:
    """Gives what transformers would give for a folder that `is_plain`. See `Tokenizer`."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._config = _read(folder / "tokenizer_config.json")

    def __call__(
        self, text: list[str], *, add_special_tokens: bool = True
    ) -> dict[str, list[list[int]]]:
        found = self._tokenizer.encode_batch(text, add_special_tokens=add_special_tokens)
        return {"input_ids": [each.ids for each in found]}

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        strftime_now: Callable[[str], str],
    ) -> str:
        raise AssertionError("a plain tokenizer has no chat template")

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    def _id(self, name: str) -> int | None:
        token = self._config.get(name)
        found: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return found

    def get_vocab(self) -> dict[str, int]:
        vocab: dict[str, int] = self._tokenizer.get_vocab()
        return vocab

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text
