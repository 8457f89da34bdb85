"""Verdicts for a file (L3): JSONL rows with a prediction and its gold answer come in, the same rows with their verdicts leave. Called by `cli.py`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, get_args

from dapo_async.reward.math_verifier.pool import NUM_PROCESSES
from dapo_async.reward.math_verifier.verify import TIMEOUT_S, Extraction, verify

CHUNK_ROWS = 1000


def grade(source: Path, target: Path, *, timeout_s: float = TIMEOUT_S) -> Counter[str]:
    """Writes each row of `source` to `target` with `correct`, `extracted` and `reason` added; returns how many rows had which reason.

    A row has `prediction` and `gold`, and `extraction` where it is not `marker`; its other fields pass through, in their order. Raises ValueError,
    naming the line, for what is no such row, and for files that can't be used or are one; `target` is then as it was before.
    """
    counts: Counter[str] = Counter()
    try:
        if any(
            path.exists() and source.exists() and path.samefile(source)
            for path in (target, _partial(target))
        ):
            raise ValueError(
                f"--output ({target}) must be another file than --input, also with .partial behind its name; give another path"
            )
        with _whole(target) as out, ThreadPoolExecutor(NUM_PROCESSES) as threads:
            for chunk in _chunks(source):
                for row in threads.map(
                    lambda numbered: _graded(source, *numbered, timeout_s=timeout_s), chunk
                ):
                    counts[row["reason"]] += 1
                    out.write(json.dumps(row) + "\n")
    except OSError as error:
        raise ValueError(
            f"{error.filename or target} can't be used: {error.strerror}; give a readable --input and a writable --output"
        ) from error
    return counts


@contextmanager
def _whole(target: Path) -> Iterator[TextIO]:
    """A file that becomes `target` when all is written, and nothing before. What is there and no file, such as a pipe, is written as it comes."""
    if target.exists() and not target.is_file():
        with target.open("w", encoding="utf-8") as out:
            yield out
        return
    partial = _partial(target)
    try:
        with partial.open("w", encoding="utf-8") as out:
            yield out
        partial.replace(target.resolve())
    finally:
        partial.unlink(missing_ok=True)


def _partial(target: Path) -> Path:
    """Beside the file itself where `target` is a link to it, which stays one."""
    real = target.resolve()
    return real.with_name(f"{real.name}.partial")


def _chunks(source: Path) -> Iterator[list[tuple[int, bytes]]]:
    chunk: list[tuple[int, bytes]] = []
    with source.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                chunk.append((number, line))
            if len(chunk) == CHUNK_ROWS:
                yield chunk
                chunk = []
    yield chunk


def _graded(source: Path, number: int, line: bytes, *, timeout_s: float) -> dict[str, Any]:
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
    extraction: Any = row.get("extraction") or "marker"
    if extraction not in get_args(Extraction):
        raise ValueError(
            f"{where}: extraction ({extraction!r}) must be one of {', '.join(get_args(Extraction))}; set it, or leave it out"
        )
    if not gold.strip():
        raise ValueError(
            f"{where}: gold is empty, so nothing can be judged by it; drop the row or fill it in"
        )
    verdict = verify(prediction, gold, timeout_s=timeout_s, extraction=extraction)
    return {
        **row,
        "correct": verdict.correct,
        "extracted": verdict.extracted,
        "reason": verdict.reason,
    }


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(
        f"{where} has no text in {key} ({'missing' if key not in row else type(value).__name__}); every row needs prediction and gold"
    )
