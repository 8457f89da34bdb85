"""Problems become prompts. The replay actor and evaluation call it through `sets.py`.

It leaves out and counts what may not be trained, fills in the template and tokenises the text.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dapo_async.config import Source
from dapo_async.data.cells import has_control_characters
from dapo_async.data.chat import has_chat_template
from dapo_async.data.presets import Preset, preset_of
from dapo_async.data.problems import NO_USER_TURN, PROMPT_KNOB, ProblemReader
from dapo_async.data.screening import (
    Problem,
    RowCounts,
    Screening,
    contaminated,
    deduplicated,
    fingerprints,
    of_language,
)
from dapo_async.data.templates import CHAT, PLACEHOLDER, TEMPLATES, Template, TurnsError
from dapo_async.data.tokenizer import Tokenizer
from dapo_async.types import Prompt


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable rows of one data set, in its order."""

    source: Source
    prompts: tuple[Prompt, ...]
    left_out: RowCounts
    contaminated: Mapping[str, int]  # number of problems that are in each evaluation set too
    contaminated_kept: int = 0  # number of them that are not left out
    with_control_characters: str = ""  # how many prompts, and the first of them

    @property
    def summary(self) -> str:
        """One line for the log."""
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        line = (
            f"{len(self.prompts)} prompts of {min(lengths)} to {max(lengths)} tokens "
            f"from {self.source.name}; left out: {self.left_out}"
        )
        if self.with_control_characters:
            line += f"; kept: {self.with_control_characters}"
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
    """Reads one problem per row; numbers become text, a chat keeps its earlier turns.

    Where a column is None, the preset decides; without a preset the columns are those of
    `problems.py`. Where the template is None, it is `default_template`.

    Raises ValueError for a source that can't be read, rows without the columns, a column that holds
    neither text nor a number nor a chat, turns that the template can't hold, and when no row is
    left.
    """
    preset, source = preset_of(Source(path=source) if isinstance(source, Path) else source)
    reader = ProblemReader(source, preset, prompt_key=prompt_key, answer_key=answer_key)
    left_out = reader.left_out
    problems, found, counts = _screened(reader, screening, preset, left_out)
    if template is None:
        template = default_template(source, prompt_key=prompt_key, answer_key=answer_key)
    texts, encoded = _tokenised(problems, template, system, tokenizer, reader)
    kept, unusual = [], RowCounts(reader.places)
    for problem, text, ids in zip(problems, texts, encoded, strict=True):
        if len(ids) > max_prompt_tokens:
            left_out.add("over-long", problem.row)
            continue
        if has_control_characters(problem.text):
            unusual.add("with control characters", problem.row)
        token_ids = np.array(ids, dtype=np.int32)
        kept.append(
            Prompt(problem.row, text, token_ids, answer=problem.answer, source=problem.source)
        )
    if not kept:
        raise _no_prompt(source, reader, max_prompt_tokens)
    return PromptSet(
        source,
        tuple(kept),
        left_out,
        counts,
        len(found) if screening.contamination == "warn" else 0,
        str(unusual) if unusual.counts else "",
    )


def _no_prompt(source: Source, reader: ProblemReader, max_prompt_tokens: int) -> ValueError:
    counts = reader.left_out.counts
    if not counts:
        return ValueError(
            f"{source.where} has no usable prompt; it has no rows: give a file with rows"
        )
    what, remedy = "", "change the knobs of data or the data"
    if "over-long" in counts:
        what = f"; over-long means more than data.max_prompt_tokens ({max_prompt_tokens})"
    if [*counts] == [NO_USER_TURN] and False in reader.user_turns:
        remedy = f"remove the last turns, or set {PROMPT_KNOB}={reader.user_turns[False]}"
    return ValueError(
        f"{source.where} has no usable prompt; left out: {reader.left_out}{what}; {remedy}"
    )


def default_template(
    source: Source, *, prompt_key: str | None = None, answer_key: str | None = None
) -> str:
    """The template of a training set without `data.template`.

    That is the template of its preset, or only the problem. If the first problem of the set has
    turns before it, it is this within the chat template. Sets of the hub are not read for this;
    rows with such turns are then an error.
    """
    preset, source = preset_of(source)
    text = preset.template if preset else PLACEHOLDER
    if source.path is None:
        return text
    reader = ProblemReader(source, preset, prompt_key=prompt_key, answer_key=answer_key)
    first = next(iter(reader), None)
    return f"{CHAT}{text}" if first is not None and first.context else text


def _tokenised(
    problems: Sequence[Problem],
    template: str,
    system: str | None,
    tokenizer: Tokenizer,
    reader: ProblemReader,
) -> tuple[list[str], list[list[int]]]:
    """The prompts as texts and token ids. Raises ValueError for turns that would be lost."""
    around = Template(template, system=system)
    chat = next((problem for problem in problems if problem.context), None)
    if chat is not None and not around.is_chat:
        within = f"{CHAT}{template}" if template in TEMPLATES else "chat"
        raise _lost_turns(
            reader,
            chat,
            f"which need a chat template, but data.template is {template!r}",
            f"set data.template={within}, or ",
        )
    if chat is not None and not has_chat_template(tokenizer):
        raise _lost_turns(
            reader,
            chat,
            "which need a chat template, but the model's tokenizer has none",
            "use an instruction-tuned model, or ",
        )
    try:
        return around.tokenised(
            [problem.text for problem in problems],
            tokenizer,
            contexts=[problem.context for problem in problems],
        )
    except TurnsError as error:
        raise _lost_turns(
            reader, problems[error.index], f"but {error}", "correct it, or "
        ) from error


def _lost_turns(reader: ProblemReader, problem: Problem, why: str, remedy: str) -> ValueError:
    roles = ", ".join(dict.fromkeys(turn.role for turn in problem.context))
    return ValueError(
        f"{reader.places.of(problem.row)} has turns before its problem ({roles}), {why}; "
        f"{remedy}set {PROMPT_KNOB}={reader.user_turns[True]} to leave the turns out"
    )


def _screened(
    rows: Iterable[Problem], screening: Screening, preset: Preset | None, left_out: RowCounts
) -> tuple[list[Problem], set[int], Counter[str]]:
    """The problems that pass; the rows of evaluation problems, and their number for each set."""
    if preset is not None and preset.language is not None:
        rows = of_language(rows, preset.language, left_out)
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
    reader = ProblemReader(
        source, preset, prompt_key=prompt_key, answer_key=None, with_answers=False
    )
    return fingerprints(problem.asked for problem in reader)
