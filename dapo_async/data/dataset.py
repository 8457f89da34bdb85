"""A JSONL file of problems becomes tokenized prompts; what cannot be used is left out, counted and named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapo_async.types import Prompt


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer of a model folder; no code of the folder is run. Raises ValueError when there is none."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"model folder {folder} has no tokenizer.json; save its fast tokenizer there")
    from transformers import AutoTokenizer  # costs seconds: only for those who tokenize

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable prompts of one file and how many rows were left out for which reason."""

    prompts: tuple[Prompt, ...]
    left_out: Mapping[str, int]

    @property
    def summary(self) -> str:
        """Such as `4096 prompts (left out: 3 too long)`."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items() if count)
        return f"{len(self.prompts)} prompts" + (f" (left out: {reasons})" if reasons else "")


def load_prompts(path: Path, *, tokenizer: Any, prompt_key: str, answer_key: str, template: str, max_prompt_tokens: int) -> PromptSet:
    """Reads `path`, puts each problem into `template` and tokenizes it.

    Rows with an empty answer or more than `max_prompt_tokens` tokens are counted and left out. Raises ValueError for a missing or empty file,
    a line that is no JSON object, a missing column, or when nothing is left.
    """
    prompts, left_out = [], {"with an empty answer": 0, "too long": 0}
    for number, row in _rows(path):
        for key in (prompt_key, answer_key):
            if key not in row:
                raise ValueError(f"{path}:{number} has no column {key!r}, only {sorted(row)}; set data.prompt_key and data.answer_key")
        answer, text = str(row[answer_key]).strip(), template.replace("{problem}", str(row[prompt_key]))
        token_ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        if not answer:
            left_out["with an empty answer"] += 1
        elif not 1 <= len(token_ids) <= max_prompt_tokens:
            left_out["too long"] += 1
        else:
            prompts.append(Prompt(number - 1, text, token_ids, answer))
    if not prompts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise ValueError(f"{path} has no usable problem ({reasons}); give a JSONL file with problems and answers, or raise data.max_prompt_tokens")
    return PromptSet(tuple(prompts), left_out)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not Path(path).is_file():
        raise ValueError(f"data file {path} does not exist; give the path of a JSONL file")
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error.msg}); give one JSON object per line") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number} is {type(row).__name__}, not a JSON object; give one object per line")
            yield number, row
