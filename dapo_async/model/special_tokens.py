"""The special tokens of a model folder: stop tokens, begin of text, padding.

In: the JSON files of a folder. Out: token ids, each with the files that give it. Published folders
keep these facts in `config.json`, `generation_config.json` and the tokenizer's files, and the files
differ. A response stops at the tokens of all of them. `ModelConfig` reads them, so that learner,
engines, evaluation and export have one set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_REMEDY = "copy the tokenizer files of the base model there"
Sources = Mapping[int, tuple[str, ...]]  # token id -> the files that give it


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids and their files, in the order in which the files are read."""

    stop: Sources
    bos: Sources
    pad: Sources


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError with the file's name and the remedy."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid JSON ({reason}); {remedy}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object; {remedy}")
    return values


def token_ids(value: Any, *, key: str, vocab_size: int) -> tuple[int, ...]:
    """The ids of an `*_token_id` entry: null, one id or a list of ids.

    Raises ValueError, without the file's name, for anything else and for ids that are not in the
    vocabulary.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        is_id = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not is_id or not 0 <= token_id < vocab_size:
            raise ValueError(
                f"{key} ({value!r}) must be a token id or a list of ids, each from 0 to "
                f"{vocab_size - 1} (vocab_size {vocab_size}); correct it, or set it to null"
            )
    return tuple(ids)


def read_special_tokens(
    folder: Path, config: Mapping[str, Any], *, vocab_size: int, tokenizer: Path | None = None
) -> SpecialTokens:
    """The special tokens of `folder`, whose `config.json` has the content `config`.

    `tokenizer` is the tokenizer's folder, None for the same. Raises ValueError with the file's name
    for a broken file and for ids that are not in the vocabulary.
    """
    entries = [*_from_config(folder / CONFIG, config), *_from_generation_config(folder)]
    entries += _from_tokenizer(tokenizer or folder)
    found: dict[str, dict[int, tuple[str, ...]]] = {"eos": {}, "bos": {}, "pad": {}}
    for path, kind, value in entries:
        key = (
            f"{kind}_token"
            if path.name.startswith(("tokenizer", "special"))
            else f"{kind}_token_id"
        )
        try:
            ids = token_ids(value, key=key, vocab_size=vocab_size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        for token_id in ids:
            known = found[kind].get(token_id, ())
            if path.name not in known:
                found[kind][token_id] = (*known, path.name)
    return SpecialTokens(found["eos"], found["bos"], found["pad"])


def _from_config(path: Path, config: Mapping[str, Any]) -> Iterator[tuple[Path, str, Any]]:
    """(file, kind, value); a nested text_config counts too."""
    nested = config.get("text_config")
    for section in (config, nested if isinstance(nested, Mapping) else {}):
        for kind in ("eos", "bos", "pad"):
            yield path, kind, section.get(f"{kind}_token_id")


def _from_generation_config(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    path = folder / GENERATION
    if not path.is_file():
        return
    values = read_json(path, "copy it from the base model, or remove it")
    for kind in ("eos", "bos", "pad"):
        yield path, kind, values.get(f"{kind}_token_id")


def _from_tokenizer(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """The tokenizer's files name tokens by their text.

    As in transformers, `special_tokens_map.json` counts where `tokenizer_config.json` lists no
    added tokens.
    """
    path, map_path = folder / TOKENIZER_CONFIG, folder / "special_tokens_map.json"
    values = _tokenizer_json(path) if path.is_file() else {}
    mapped: dict[str, Any] = {}
    if "added_tokens_decoder" not in values and map_path.is_file():
        mapped = _tokenizer_json(map_path)
    for kind in ("eos", "bos", "pad"):
        key = f"{kind}_token"
        source, token = (map_path, mapped[key]) if key in mapped else (path, values.get(key))
        text = token.get("content") if isinstance(token, Mapping) else token
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(
                f"{source}: {key} ({token!r}) must be a token's text; {TOKENIZER_REMEDY}"
            )
        yield source, kind, _token_id(text, folder, values)


def _tokenizer_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, TOKENIZER_REMEDY)
    except ValueError as error:
        raise ValueError(f"the tokenizer of {path.parent} can't be loaded: {error}") from error


def _token_id(text: str, folder: Path, tokenizer_config: Mapping[str, Any]) -> int | None:
    """None: the JSON files do not say it. The tokenizer itself is checked later, at the start."""
    added = tokenizer_config.get("added_tokens_decoder")
    for token_id, token in added.items() if isinstance(added, Mapping) else ():
        if isinstance(token, Mapping) and token.get("content") == text and token_id.isdecimal():
            return int(token_id)
    if (folder / TOKENIZER).is_file():
        return _id_in_tokenizer_json(text, _tokenizer_json(folder / TOKENIZER))
    for name in ("added_tokens.json", "vocab.json"):
        if (folder / name).is_file():
            token_id = _tokenizer_json(folder / name).get(text)
            if isinstance(token_id, int):
                return token_id
    return None


def _id_in_tokenizer_json(text: str, values: Mapping[str, Any]) -> int | None:
    for token in values.get("added_tokens") or ():
        if isinstance(token, Mapping) and token.get("content") == text:
            token_id = token.get("id")
            return token_id if isinstance(token_id, int) else None
    model = values.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):  # BPE, WordLevel, WordPiece
        token_id = vocabulary.get(text)
        return token_id if isinstance(token_id, int) else None
    for token_id, piece in enumerate(vocabulary or ()):  # Unigram: [text, score]
        if isinstance(piece, list) and piece and piece[0] == text:
            return token_id
    return None
