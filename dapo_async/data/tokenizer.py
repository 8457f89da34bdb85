"""The tokenizer of a model folder; it encodes prompts and decodes responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # tokenizer.json defines them wholly


class Tokenizer(Protocol):
    """The part of a `transformers` tokenizer that this project uses."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool = True
    ) -> dict[str, list[list[int]]]:
        """`input_ids` of each text, by default with the special tokens at the start of the text."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The turns as one text, by the model's chat template; needs a `chat_template`."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, without network.

    Raises ValueError when the folder has none.
    """
    if not any(
        (Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    ):
        raise ValueError(
            f"model folder {folder} has no tokenizer.json; "
            "copy the tokenizer files of the base model into it"
        )
    if _class_name(Path(folder)) in GENERIC:
        # AutoTokenizer would choose the same class, but its import costs two more seconds.
        from transformers import PreTrainedTokenizerFast

        return cast(
            Tokenizer, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        )
    from transformers import AutoTokenizer  # takes seconds to import

    return cast(Tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def _class_name(folder: Path) -> str | None:
    config = folder / "tokenizer_config.json"
    try:
        values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError):
        return None  # AutoTokenizer then reports the error
    return values.get("tokenizer_class") if isinstance(values, dict) else None
