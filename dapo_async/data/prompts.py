"""Rows of a data set become prompts: columns found, what may not be trained left out and counted, the template filled in, tokenised."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapo_async.config import Source
from dapo_async.data.presets import Preset, answer_of, preset_of
from dapo_async.data.screening import (
    LeftOut,
    Problem,
    Screening,
    contaminated,
    deduplicated,
    fingerprints,
    of_language,
)
from dapo_async.data.sources import read_rows
from dapo_async.data.templates import Template
from dapo_async.data.tokenizer import Tokenizer
from dapo_async.types import Prompt


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable rows of one data set, in its order."""

    source: Source
    prompts: tuple[Prompt, ...]
    left_out: LeftOut
    contaminated: Mapping[
        str, int
    ]  # how many of the problems are in each evaluation set too, left out or not
    contaminated_kept: int = 0

    @property
    def summary(self) -> str:
        """One line for the log."""
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        line = f"{len(self.prompts)} prompts of {min(lengths)} to {max(lengths)} tokens from {self.source.name}; left out: {self.left_out}"
        if not self.contaminated:
            return line
        sets = ", ".join(f"{name} {count}" for name, count in self.contaminated.items())
        return f"{line}; evaluation problems among them, {'trained all the same' if self.contaminated_kept else 'left out'}: {sets}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that a run sees of it, in order."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(
                f"{prompt.row}\0{prompt.text}\0{prompt.answer}\0{prompt.source}\0".encode()
            )
        return digest.hexdigest()


def load_prompts(
    source: Source | Path,
    *,
    tokenizer: Tokenizer,
    prompt_key: str | None = None,
    answer_key: str | None = None,
    source_key: str = "data_source",
    template: str | None = None,
    system: str | None = None,
    max_prompt_tokens: int,
    screening: Screening = Screening(),  # noqa: B008 (frozen)
) -> PromptSet:
    """Reads one problem per row; numbers are taken as text. What is None is the preset's, or else: columns `prompt` and `answer`, no template.
    The column `source_key` is one that rows may lack.

    Raises ValueError for what can't be read, rows without the columns, a column that holds neither text nor number, and when no row is left.
    """
    preset, source = preset_of(Source(path=source) if isinstance(source, Path) else source)
    left_out = LeftOut()
    problems = _problems(source, preset, prompt_key, answer_key, left_out, source_key=source_key)
    if screening.language is not None:
        problems = of_language(problems, screening.language, left_out)
    deduplicate = (
        screening.deduplicate
        if screening.deduplicate is not None
        else preset is not None and preset.deduplicate
    )
    chosen = deduplicated(problems, left_out) if deduplicate else list(problems)
    found, counts = (
        contaminated(chosen, screening.against)
        if screening.contamination != "off"
        else (set[int](), Counter[str]())
    )
    if screening.contamination == "drop":
        for row in sorted(found):
            left_out.add("contaminated", row)
        chosen = [problem for problem in chosen if problem.row not in found]
    around = Template(template or (preset.template if preset else "{problem}"), system=system)
    texts, encoded = around.tokenised([problem.text for problem in chosen], tokenizer)
    kept = []
    for problem, text, ids in zip(chosen, texts, encoded, strict=True):
        if len(ids) > max_prompt_tokens:
            left_out.add("over-long", problem.row)
        else:
            kept.append(
                Prompt(
                    row=problem.row,
                    text=text,
                    token_ids=np.array(ids, dtype=np.int32),
                    answer=problem.answer,
                    source=problem.source,
                )
            )
    if not kept:
        raise ValueError(
            f"{source.where} has no usable prompt; left out: {left_out}; over-long are those of more than data.max_prompt_tokens "
            f"({max_prompt_tokens}): give other data or change the knobs of data"
        )
    return PromptSet(
        source,
        tuple(kept),
        left_out,
        counts,
        contaminated_kept=len(found) if screening.contamination == "warn" else 0,
    )


def load_fingerprints(source: Source, *, prompt_key: str | None = None) -> frozenset[str]:
    """The problems of an evaluation set, for the contamination check. Columns and errors as in `load_prompts`; answers do not matter."""
    preset, source = preset_of(source)
    return fingerprints(
        problem.text
        for problem in _problems(source, preset, prompt_key, None, LeftOut(), with_answers=False)
    )


def _problems(
    source: Source,
    preset: Preset | None,
    prompt_key: str | None,
    answer_key: str | None,
    left_out: LeftOut,
    *,
    source_key: str | None = None,
    with_answers: bool = True,
) -> Iterator[Problem]:
    """Every row with a problem and an answer. At the end: ValueError if some had no such column."""
    keys = {
        "data.prompt_key": (prompt_key,)
        if prompt_key
        else preset.problem
        if preset
        else ("prompt",),
        "data.answer_key": (answer_key,)
        if answer_key
        else preset.answer
        if preset
        else ("answer",),
    }
    if not with_answers:
        del keys["data.answer_key"]
    columns = [
        *(key for known in keys.values() for key in known),
        *([source_key] if source_key else []),
    ]
    wrapped = Template(preset.wrapped) if preset and preset.wrapped else None
    missing: list[tuple[int, str, tuple[str, ...]]] = []
    for row, values in enumerate(read_rows(source, columns=columns)):
        found = {
            knob: next((key for key in known if _has(values, key)), None)
            for knob, known in keys.items()
        }
        if lacking := next((knob for knob, key in found.items() if key is None), None):
            missing.append((row, lacking, tuple(map(str, values))))
            continue
        texts = {
            knob: _text(values, str(key), knob=knob, source=source, row=row)
            for knob, key in found.items()
        }
        problem = texts["data.prompt_key"]
        answer = answer_of(
            texts.get("data.answer_key", ""),
            preset.answer_form.get(str(found.get("data.answer_key"))) if preset else None,
        )
        problem = wrapped.without(problem) if wrapped else problem
        if problem.strip() and (answer.strip() or not with_answers):
            origin = (
                _text(values, source_key, knob="data.source_key", source=source, row=row)
                if source_key and _has(values, source_key)
                else ""
            )
            yield Problem(row, problem, answer, origin)
        else:
            left_out.add("empty", row)
    if missing:
        row, knob, there = missing[0]
        more = f", the first of {len(missing)} such rows," if len(missing) > 1 else ""
        raise ValueError(
            f"row {row} of {source.where}{more} has no column {keys[knob][0]!r}; set {knob} to one of {', '.join(there)}"
        )


_ABSENT = object()


def _lookup(values: Any, key: str) -> Any:
    """`values[key]`, or along the dots of `key` through objects and lists; `_ABSENT` where there is nothing."""
    if isinstance(values, dict) and key in values:
        return values[key]
    for part in key.split("."):
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif (
            isinstance(values, Sequence)
            and not isinstance(values, str)
            and part.isdecimal()
            and int(part) < len(values)
        ):
            values = values[int(part)]
        else:
            return _ABSENT
    return values


def _has(values: Any, key: str) -> bool:
    return _lookup(values, key) is not _ABSENT


def _text(values: Any, key: str, *, knob: str, source: Source, row: int) -> str:
    value = _lookup(values, key)
    if value is None or (
        isinstance(value, float) and not math.isfinite(value)
    ):  # NaN: how tables say that there is nothing
        return ""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(
        f"column {key!r} in row {row} of {source.where} holds a {type(value).__name__}; write text or a number, or set {knob} to another column"
    )
