"""Rows of a JSONL file become prompts: the template filled in, tokenised, over-long and empty ones left out and counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapo_async.data.tokenizer import Tokenizer
from dapo_async.types import Prompt

PLACEHOLDER = "{problem}"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable rows of one file, in the file's order."""

    path: Path
    prompts: tuple[Prompt, ...]
    num_overlong: int  # left out: more tokens than max_prompt_tokens
    num_empty: int  # left out: no problem, or no gold answer

    @property
    def summary(self) -> str:
        """One line for the log."""
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        left_out = f"{self.num_overlong} over-long and {self.num_empty} empty ones left out"
        return f"{len(self.prompts)} prompts of {min(lengths)} to {max(lengths)} tokens from {self.path.name}; {left_out}"


def load_prompts(
    path: Path, *, tokenizer: Tokenizer, prompt_key: str, answer_key: str, template: str, max_prompt_tokens: int, source_key: str = "data_source"
) -> PromptSet:
    """Reads one problem per line; numbers are taken as text. `template` stands around each, `{problem}` replaced (other braces are left alone).
    The column `source_key` is one that rows may lack.

    Raises ValueError for a missing file, a line that is no JSON object, a missing column, a column that holds neither text nor number, and when
    no row is left.
    """
    path = Path(path)
    assert PLACEHOLDER in template, template  # the config's rule
    texts, answers, sources, rows, num_empty = [], [], [], [], 0
    for row, values in enumerate(_read_rows(path)):
        problem = _column(values, prompt_key, knob="data.prompt_key", path=path, row=row)
        answer = _column(values, answer_key, knob="data.answer_key", path=path, row=row)
        if not problem.strip() or not answer.strip():
            num_empty += 1
            continue
        texts.append(template.replace(PLACEHOLDER, problem))
        answers.append(answer)
        sources.append(_column(values, source_key, knob="data.source_key", path=path, row=row) if source_key in values else "")
        rows.append(row)
    encoded = tokenizer(texts)["input_ids"] if texts else []
    prompts = [
        Prompt(row=row, text=text, token_ids=np.array(ids, dtype=np.int32), answer=answer, source=source)
        for row, text, ids, answer, source in zip(rows, texts, encoded, answers, sources, strict=True)
    ]
    kept = tuple(prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_tokens)
    if not kept:
        raise ValueError(
            f"{path} has no usable prompt: {num_empty} rows have no problem or no answer, {len(prompts)} are longer than data.max_prompt_tokens "
            f"({max_prompt_tokens}); give another file or raise the limit"
        )
    return PromptSet(path=path, prompts=kept, num_overlong=len(prompts) - len(kept), num_empty=num_empty)


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist; give the path of a JSONL file with one problem per line")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"data file {path} can't be read: {error.strerror}; give a readable JSONL file") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} of {path} is not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not valid JSON ({error}); write one JSON object per line") from error
        if not isinstance(values, dict):
            raise ValueError(f"line {number} of {path} holds a {type(values).__name__}; write one JSON object per line")
        yield values


def _column(values: dict[str, Any], key: str, *, knob: str, path: Path, row: int) -> str:
    if key not in values:
        raise ValueError(f"row {row} of {path} has no column {key!r}; set {knob} to one of {', '.join(map(str, values))}")
    value = values[key]
    if value is None:
        return ""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"column {key!r} in row {row} of {path} holds a {type(value).__name__}; write text or a number, or set {knob} to another column")
