"""Verdicts for a whole file: JSONL rows with a prediction and a gold answer come in, the same rows
with their verdicts leave. `dapo-async grade` calls it.

docs/rewards.md describes the format of the rows.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO, get_args

from dapo_async.reward.math_verifier.pool import NUM_PROCESSES
from dapo_async.reward.math_verifier.verify import TIMEOUT_S, Extraction, verify
from dapo_async.reward.thinking import prompt_text
from dapo_async.reward.verdict import FAILED, Verdict
from dapo_async.reward.verifiers import get_verifier
from dapo_async.utils.files import atomic_file, partial_path

CHUNK_ROWS = 1000


class RowJudge(Protocol):
    """Judges one row."""

    def __call__(
        self, row: dict[str, Any], prediction: str, gold: str, /, *, prompt: str
    ) -> Verdict: ...


@dataclass(slots=True)
class Grades:
    """What the verdicts of a file add up to."""

    reasons: Counter[str] = field(default_factory=Counter)  # number of rows by reason
    sum_accuracy: float = 0.0

    @property
    def num_rows(self) -> int:
        return self.reasons.total()

    @property
    def num_failed(self) -> int:
        """Rows over which the verifier died."""
        return self.reasons[FAILED]

    @property
    def accuracy(self) -> float:
        """Mean accuracy of all rows; 0 for an empty file."""
        return self.sum_accuracy / max(1, self.num_rows)


def grade(
    source: Path, target: Path, *, verifier: str = "math", timeout_s: float = TIMEOUT_S
) -> Grades:
    """Writes each row of `source` to `target` with `correct`, `extracted` and `reason` added.

    A row has `prediction` and `gold`; its other fields pass through in their order. The optional
    field `prompt` is the text that the prediction continues, or a list of chat messages. `verifier`
    is `math`, `marker`, `exact` or the user's `module:function`. Only `math` reads the optional
    field `extraction` and uses `timeout_s`. Rows are judged one at a time, except by `math`.

    Raises ValueError with the line number for a row that breaks these rules and for a
    `module:function` that fails on a row, and ValueError for files that cannot be used.
    `target` then keeps its old content.
    """
    grades = Grades()
    judge = _row_judge(verifier, timeout_s)
    num_threads = NUM_PROCESSES if verifier == "math" else 1
    try:
        if any(_is_same_file(path, source) for path in (target, partial_path(target))):
            raise ValueError(
                f"--output ({target}) and its {partial_path(target).name} must not be the --input; "
                "give another path"
            )
        with _whole_file(target) as out, ThreadPoolExecutor(num_threads) as threads:
            for chunk in _chunks(source):
                judged = threads.map(
                    lambda numbered: _judge_line(*numbered, source=source, judge=judge), chunk
                )
                for row, verdict in judged:
                    grades.reasons[verdict.reason] += 1
                    grades.sum_accuracy += verdict.accuracy
                    out.write(json.dumps(row) + "\n")
    except OSError as error:
        raise ValueError(
            f"{error.filename or target} can't be used: {error.strerror}; "
            "give a readable --input and a writable --output"
        ) from error
    return grades


def _row_judge(verifier: str, timeout_s: float) -> RowJudge:
    """The function that judges one row: `(row, prediction, gold, prompt=…) -> Verdict`.

    It raises ValueError without the row's place, which the caller adds.
    """
    if verifier == "math":
        get_verifier(verifier)  # refuses early where math-verify is not installed
        return functools.partial(_judge_math, timeout_s=timeout_s)
    function = get_verifier(verifier, knob="--verifier")

    def judge(row: dict[str, Any], prediction: str, gold: str, *, prompt: str) -> Verdict:
        if "extraction" in row:
            raise ValueError(
                f"extraction needs --verifier math, but the verifier is {verifier}; leave it out"
            )
        verdict = function(prediction, gold, prompt=prompt)
        if verdict.detail:  # the user's own function raised, hung or returned something else
            raise ValueError(f"{verdict.detail}; correct the function")
        return verdict

    return judge


def _judge_math(
    row: dict[str, Any], prediction: str, gold: str, *, prompt: str, timeout_s: float
) -> Verdict:
    extraction: Any = row.get("extraction") or "marker"
    if extraction not in get_args(Extraction):
        raise ValueError(
            f"extraction ({extraction!r}) must be one of {', '.join(get_args(Extraction))}; "
            "leave it out for marker"
        )
    return verify(prediction, gold, timeout_s=timeout_s, extraction=extraction, prompt=prompt)


def _judge_line(
    number: int,
    line: bytes,
    *,
    source: Path,
    judge: RowJudge,
) -> tuple[dict[str, Any], Verdict]:
    """The row of one line with its verdict added, and the verdict."""
    where = f"line {number} of {source}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not valid JSON ({error}); write one JSON object per line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} holds a {type(row).__name__}; write one JSON object per line")
    prediction, gold = (_text(row, key, where) for key in ("prediction", "gold"))
    if not gold.strip():
        raise ValueError(f"{where}: gold is empty; fill it in or remove the row")
    try:
        verdict = judge(row, prediction, gold, prompt=prompt_text(row.get("prompt")))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    added = {
        "correct": verdict.correct,
        "extracted": verdict.extracted,
        "reason": verdict.reason,
    }
    return {**row, **added}, verdict


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    found = "missing" if key not in row else type(value).__name__
    raise ValueError(f"{where} has no text in {key} ({found}); write a text or a number there")


def _chunks(source: Path) -> Iterator[list[tuple[int, bytes]]]:
    """Lines with their numbers from 1; empty lines are skipped."""
    chunk: list[tuple[int, bytes]] = []
    with source.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                chunk.append((number, line))
            if len(chunk) == CHUNK_ROWS:
                yield chunk
                chunk = []
    yield chunk


@contextmanager
def _whole_file(target: Path) -> Iterator[TextIO]:
    """A file that replaces `target` once it is complete. A pipe or device is written directly."""
    if target.exists() and not target.is_file():
        with target.open("w", encoding="utf-8") as out:
            yield out
        return
    with atomic_file(target) as partial, partial.open("w", encoding="utf-8") as out:
        yield out


def _is_same_file(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)
