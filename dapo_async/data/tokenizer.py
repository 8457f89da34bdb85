"""The tokenizer of a model's own folder; prompts are encoded and responses decoded by the same one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that are all in tokenizer.json


class Tokenizer(Protocol):
    """What this project uses of a `transformers` tokenizer."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool = True
    ) -> dict[str, list[list[int]]]:
        """`input_ids` of each text, with the special tokens that the model expects at its start unless told otherwise."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The turns as one text, in the words of the model's own template; only where there is a `chat_template`."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """Of a plain Hugging Face folder, never from the network. Raises ValueError when the folder has none."""
    if not any(
        (Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    ):
        raise ValueError(
            f"model folder {folder} has no tokenizer.json; copy the tokenizer's files of the base model into it"
        )
    if _class_name(Path(folder)) in GENERIC:
        # What AutoTokenizer would choose as well; asking it costs each process two seconds of imports more.
        from transformers import PreTrainedTokenizerFast

        return cast(
            Tokenizer, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        )
    from transformers import (
        AutoTokenizer,
    )  # seconds of import: whoever only counts prompts need not wait for it

    return cast(Tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def _class_name(folder: Path) -> str | None:
    config = folder / "tokenizer_config.json"
    try:
        values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError):
        return None  # AutoTokenizer says what is wrong with it
    return values.get("tokenizer_class") if isinstance(values, dict) else None
