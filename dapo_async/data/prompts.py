"""Rows of a data set become prompts. The replay actor and evaluation call it through `sets.py`.

It finds the columns, leaves out and counts what may not be trained, fills in the template and
tokenises the text.
"""

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
from dapo_async.data.templates import PLACEHOLDER, Template
from dapo_async.data.tokenizer import Tokenizer
from dapo_async.types import Prompt

SOURCE_COLUMN = "data_source"  # names the data set that a row is from; rows may lack it
PROMPT_KNOB, ANSWER_KNOB = "data.prompt_key", "data.answer_key"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable rows of one data set, in its order."""

    source: Source
    prompts: tuple[Prompt, ...]
    left_out: LeftOut
    contaminated: Mapping[str, int]  # number of problems that are in each evaluation set too
    contaminated_kept: int = 0  # number of them that are not left out

    @property
    def summary(self) -> str:
        """One line for the log."""
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        line = (
            f"{len(self.prompts)} prompts of {min(lengths)} to {max(lengths)} tokens "
            f"from {self.source.name}; left out: {self.left_out}"
        )
        if not self.contaminated:
            return line
        sets = ", ".join(f"{name} {count}" for name, count in self.contaminated.items())
        done = "kept for training" if self.contaminated_kept else "left out"
        return f"{line}; evaluation problems among them, {done}: {sets}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the rows, texts, answers and sources of all prompts, in order."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            fields = (prompt.row, prompt.text, prompt.answer, prompt.source)
            digest.update("".join(f"{field}\0" for field in fields).encode())
        return digest.hexdigest()


def load_prompts(
    source: Source | Path,
    *,
    tokenizer: Tokenizer,
    prompt_key: str | None = None,
    answer_key: str | None = None,
    template: str | None = None,
    system: str | None = None,
    max_prompt_tokens: int,
    screening: Screening = Screening(),  # noqa: B008 (frozen)
) -> PromptSet:
    """Reads one problem per row; numbers become text.

    Where a column or the template is None, the preset decides; without a preset the columns are
    `prompt` and `answer` and there is no template.

    Raises ValueError for a source that can't be read, rows without the columns, a column that holds
    neither text nor a number, and when no row is left.
    """
    preset, source = preset_of(Source(path=source) if isinstance(source, Path) else source)
    left_out = LeftOut()
    rows = _problems(source, preset, prompt_key, answer_key, left_out)
    problems, found, counts = _screened(rows, screening, preset, left_out)
    around = Template(template or (preset.template if preset else PLACEHOLDER), system=system)
    texts, encoded = around.tokenised([problem.text for problem in problems], tokenizer)
    kept = []
    for problem, text, ids in zip(problems, texts, encoded, strict=True):
        if len(ids) > max_prompt_tokens:
            left_out.add("over-long", problem.row)
            continue
        token_ids = np.array(ids, dtype=np.int32)
        kept.append(
            Prompt(problem.row, text, token_ids, answer=problem.answer, source=problem.source)
        )
    if not kept and not left_out.counts:
        raise ValueError(
            f"{source.where} has no usable prompt; it has no rows: give a file with rows"
        )
    if not kept:
        raise ValueError(
            f"{source.where} has no usable prompt; left out: {left_out}; over-long means more than "
            f"data.max_prompt_tokens ({max_prompt_tokens}): change the knobs of data or the data"
        )
    contaminated_kept = len(found) if screening.contamination == "warn" else 0
    return PromptSet(source, tuple(kept), left_out, counts, contaminated_kept)


def _screened(
    rows: Iterator[Problem], screening: Screening, preset: Preset | None, left_out: LeftOut
) -> tuple[list[Problem], set[int], Counter[str]]:
    """The problems that pass; the rows of evaluation problems, and their number for each set."""
    if screening.language is not None:
        rows = of_language(rows, screening.language, left_out)
    deduplicate = screening.deduplicate
    if deduplicate is None:
        deduplicate = preset is not None and preset.deduplicate
    problems = deduplicated(rows, left_out) if deduplicate else list(rows)
    if screening.contamination == "off":
        return problems, set(), Counter()
    found, counts = contaminated(problems, screening.against)
    if screening.contamination == "drop":
        for row in sorted(found):
            left_out.add("contaminated", row)
        problems = [problem for problem in problems if problem.row not in found]
    return problems, found, counts


def load_fingerprints(source: Source, *, prompt_key: str | None = None) -> frozenset[str]:
    """The problems of an evaluation set, for the contamination check.

    Columns and errors are those of `load_prompts`, without the answers.
    """
    preset, source = preset_of(source)
    problems = _problems(source, preset, prompt_key, None, LeftOut(), with_answers=False)
    return fingerprints(problem.text for problem in problems)


def _problems(
    source: Source,
    preset: Preset | None,
    prompt_key: str | None,
    answer_key: str | None,
    left_out: LeftOut,
    *,
    with_answers: bool = True,
) -> Iterator[Problem]:
    """Every row with a problem and an answer; the others are counted in `left_out`.

    Raises ValueError at the end when rows lacked a column.
    """
    keys = {PROMPT_KNOB: _keys(prompt_key, preset.problem if preset else None, "prompt")}
    if with_answers:
        keys[ANSWER_KNOB] = _keys(answer_key, preset.answer if preset else None, "answer")
    columns = [*(key for known in keys.values() for key in known), SOURCE_COLUMN]
    wrapped = Template(preset.wrapped) if preset and preset.wrapped else None
    missing: list[tuple[int, str, tuple[str, ...]]] = []
    for row, values in enumerate(read_rows(source, columns=columns)):
        found: dict[str, str] = {}
        for knob, known in keys.items():
            key = next((key for key in known if _has(values, key)), None)
            if key is None:
                missing.append((row, knob, tuple(map(str, values))))
                break
            found[knob] = key
        if len(found) < len(keys):
            continue
        texts = {
            knob: _text(values, key, knob=knob, source=source, row=row)
            for knob, key in found.items()
        }
        problem = texts[PROMPT_KNOB]
        problem = wrapped.without(problem) if wrapped else problem
        form = preset.answer_form.get(found.get(ANSWER_KNOB, "")) if preset else None
        answer = answer_of(texts.get(ANSWER_KNOB, ""), form)
        if not problem.strip() or (with_answers and not answer.strip()):
            left_out.add("empty", row)
            continue
        origin = ""
        if with_answers and _has(values, SOURCE_COLUMN):
            origin = _text(values, SOURCE_COLUMN, knob=None, source=source, row=row)
        yield Problem(row, problem, answer, origin)
    if missing:
        row, knob, there = missing[0]
        more = f", the first of {len(missing)} such rows," if len(missing) > 1 else ""
        raise ValueError(
            f"row {row + 1} of {source.where}{more} has no column {keys[knob][0]!r}; "
            f"set {knob} to one of {', '.join(there)}"
        )


def _keys(
    configured: str | None, of_preset: tuple[str, ...] | None, default: str
) -> tuple[str, ...]:
    """The columns to look for, in order."""
    return (configured,) if configured else of_preset or (default,)


_ABSENT = object()


def _lookup(values: Any, key: str) -> Any:
    """`values[key]`, or the value at the dotted path `key`; `_ABSENT` where there is none."""
    if isinstance(values, dict) and key in values:
        return values[key]
    for part in key.split("."):
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif _is_index(values, part):
            values = values[int(part)]
        else:
            return _ABSENT
    return values


def _is_index(values: Any, part: str) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    return is_list and part.isdecimal() and int(part) < len(values)


def _has(values: Any, key: str) -> bool:
    return _lookup(values, key) is not _ABSENT


def _text(values: Any, key: str, *, knob: str | None, source: Source, row: int) -> str:
    """The text or number in a column as text; empty for null, NaN and infinity."""
    value = _lookup(values, key)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    remedy = f", or set {knob} to another column" if knob else ""
    raise ValueError(
        f"column {key!r} in row {row + 1} of {source.where} holds a {type(value).__name__}; "
        f"write text or a number{remedy}"
    )
