"""The tokenizer of a model folder; it encodes prompts and decodes responses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from dapo_async.data.plain_tokenizer import PlainTokenizer, is_plain

if TYPE_CHECKING:  # it imports torch, which prompts do not need
    from dapo_async.model import ModelConfig, SpecialTokens

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = (TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt")
JSON_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # tokenizer.json defines them wholly


class Tokenizer(Protocol):
    """The part of a `transformers` tokenizer that this project uses."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool = True
    ) -> dict[str, list[list[int]]]:
        """`input_ids` of each text, by default with the special tokens at the start of the text."""
        ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        strftime_now: Callable[[str], str],
    ) -> str:
        """The turns as one text, by the model's chat template; needs a `chat_template`.

        `strftime_now` gives the template the date.
        """
        ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, added tokens included."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, without network and without code of the folder.

    Raises ValueError when the folder has none, and whatever the libraries raise for broken files.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (TOKENIZER, TOKENIZER_CONFIG)):
        raise ValueError(
            f"model folder {folder} has no tokenizer.json; "
            "copy the tokenizer files of the base model into it"
        )
    if _class_name(folder) in GENERIC:
        if is_plain(folder):
            return PlainTokenizer(folder)
        # AutoTokenizer would choose the same class, but its import costs two more seconds.
        from transformers import PreTrainedTokenizerFast

        return cast(
            Tokenizer, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        )
    from transformers import AutoTokenizer  # takes seconds to import

    return cast(
        Tokenizer,
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
    )


def _class_name(folder: Path) -> str | None:
    config = folder / TOKENIZER_CONFIG
    try:
        values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError):
        return None  # AutoTokenizer then reports the error
    return values.get("tokenizer_class") if isinstance(values, dict) else None


def usable_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of `folder`. Raises ValueError with the file's name when it can't be loaded."""
    try:
        return load_tokenizer(folder)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        named = _broken_file(Path(folder))
        reason = named or " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"the tokenizer of {folder} can't be loaded: {reason}; "
            "copy the tokenizer files of the base model there"
        ) from error


def _broken_file(folder: Path) -> str | None:
    """The first tokenizer file that can't be read, and why; None where all can be read."""
    for name in JSON_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return f"{path} is not valid JSON ({' '.join(str(error).split())})"
        if not isinstance(values, dict):
            return f"{path} holds a {type(values).__name__}, not an object"
        if name == TOKENIZER_CONFIG and not _is_template(values.get("chat_template")):
            return f"chat_template in {path} is neither a text nor a list of {{name, template}}"
    for path in (folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")):
        try:
            if path.exists():
                path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            return f"{path} is not a text in UTF-8 ({error})"
    if not any((folder / name).is_file() for name in VOCABULARIES):
        return f"{folder / TOKENIZER} is missing"
    if (folder / TOKENIZER).is_file():
        from tokenizers import Tokenizer as Library

        try:
            Library.from_file(str(folder / TOKENIZER))
        except Exception as error:  # noqa: BLE001 (the library raises plain Exception)
            return f"{folder / TOKENIZER} is no tokenizer ({' '.join(str(error).split())[:200]})"
    return None


def _is_template(value: Any) -> bool:
    """Whether transformers can read a chat template from this value of a tokenizer_config.json."""
    if isinstance(value, list):
        return all(
            isinstance(each, dict)
            and isinstance(each.get("name"), str)
            and isinstance(each.get("template"), str)
            for each in value
        )
    return value is None or isinstance(value, str | dict)


def check_tokenizer(tokenizer: Tokenizer, model: ModelConfig, *, folder: Path) -> None:
    """Raises ValueError when tokenizer and model do not fit, or no response would ever stop.

    A vocabulary of the model that is larger than the tokenizer's is padded: that is fine. `folder`
    is the tokenizer's.
    """
    beyond = {
        token: token_id
        for token, token_id in tokenizer.get_vocab().items()
        if token_id >= model.vocab_size and _is_named(token, folder)
    }
    if beyond:
        token, largest = max(beyond.items(), key=lambda item: item[1])
        raise ValueError(
            f"the tokenizer of {folder} has token {largest} ({token!r}), but vocab_size of the "
            f"model is {model.vocab_size}; take tokenizer and weights from one model"
        )
    if not model.eos_token_ids:
        raise ValueError(
            f"model {folder} has no eos_token_id in config.json or generation_config.json and no "
            "eos_token in tokenizer_config.json, so a response could never stop; add it"
        )
    eos = tokenizer.eos_token_id
    if eos is not None and eos < model.vocab_size and eos not in model.eos_token_ids:
        raise ValueError(
            f"the tokenizer of {folder} ends a text with token {eos} ({tokenizer.decode([eos])!r}),"
            f" which none of the files names; add {eos} to eos_token_id in generation_config.json"
        )


def _is_named(token: str, folder: Path) -> bool:
    """Whether a tokenizer file has the token. transformers adds special tokens of its own to a
    tokenizer whose files name none; no text has them."""
    forms = {json.dumps(token, ensure_ascii=ascii_only).encode() for ascii_only in (True, False)}
    contents = [(folder / name).read_bytes() for name in JSON_FILES if (folder / name).is_file()]
    in_json = (folder / TOKENIZER).is_file() or (folder / "vocab.json").is_file()
    return not in_json or any(form in content for form in forms for content in contents)


def special_token_lines(tokens: SpecialTokens, tokenizer: Tokenizer) -> Iterator[str]:
    """One line each for stop tokens, begin of text and padding: ids, texts and files."""
    for what, found in (("stop", tokens.stop), ("bos", tokens.bos), ("pad", tokens.pad)):
        listed = ", ".join(
            f"{token_id} {tokenizer.decode([token_id])!r} ({', '.join(files)})"
            for token_id, files in found.items()
        )
        if listed:
            yield f"{what + ' tokens' if what == 'stop' else what:<10} {listed}"


def check_added_tokens(tokenizer: Tokenizer, before: str) -> None:
    """Checks the special tokens that the tokenizer adds to a prompt without a chat template.

    `before` is the template's text before the problem. Raises ValueError when the token at the
    begin of the text would be there twice, and when a stop token would end the prompt.
    """
    sample = (before or "1") + "1"
    bare = tokenizer([sample], add_special_tokens=False)["input_ids"][0]
    whole = tokenizer([sample])["input_ids"][0]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    doubled = bos is not None and whole[:2] == [bos, bos]
    if bos is not None and doubled and before.startswith(tokenizer.decode([bos])):
        raise ValueError(
            f"data.template begins with {tokenizer.decode([bos])!r}, which the tokenizer adds "
            "itself; remove it from data.template"
        )
    if eos is not None and whole[-1:] == [eos] != bare[-1:]:
        raise ValueError(
            f"the tokenizer ends every prompt with {tokenizer.decode([eos])!r}, so a response "
            "would begin after the end of the text; remove it from post_processor in tokenizer.json"
        )
