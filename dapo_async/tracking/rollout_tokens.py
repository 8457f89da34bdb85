"""What the report colours in a response: the weight version of its tokens, and its advantage.

In: the rows of rollouts/, and the recorded batch of the step (`train.record=true`) with the model's
tokenizer, which say where in the text a version begins. Out: coloured pieces per response.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_async.tracking.report_reading import RunRecord, number
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.samples import version_spans

EPS = 1e-6  # as in algorithm.group_advantages
Spans = list[tuple[int, int, int]]  # weight version, first token, end


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one weight version. `version` is None where it is not known."""

    text: str
    version: int | None
    first: int = 0
    end: int = 0


class TokenReader:
    """The pieces of the responses of one step of a run."""

    def __init__(self, run: RunRecord, step: int) -> None:
        """`step` as in metrics.jsonl, from 0. What can't be read becomes a note of the run."""
        self._recorded: dict[tuple[Any, int], tuple[list[int], list[int]]] = {}
        self._tokenizer: Any = None
        path = RunDir(run.root).root / "recorded" / f"step_{step:06d}.safetensors"
        if path.is_file():
            try:
                self._read(path, Path(str(run.config.get("model.path"))))
            except Exception as error:  # noqa: BLE001 (a broken file or tokenizer: shown without)
                why = " ".join(str(error).split())[:200] or repr(error)
                run.notes.append(f"{path.name} can't colour tokens by weight version: {why}")

    def _read(self, path: Path, model: Path) -> None:
        from dapo_async.data.tokenizer import load_tokenizer
        from dapo_async.replay.group_io import read_groups

        self._tokenizer = load_tokenizer(model)
        for group in read_groups(path):
            for sibling, rollout in enumerate(group.rollouts):
                completion = rollout.completion
                self._recorded[group.group_id, sibling] = (
                    completion.token_ids.tolist(),
                    completion.weight_versions.tolist(),
                )

    def pieces(self, row: Mapping[str, Any]) -> list[Piece]:
        """The response of one row of rollouts/ in pieces.

        One piece without a version where several versions sampled it and the batch was not
        recorded.
        """
        response = str(row.get("response"))
        known = self._recorded.get((row.get("group_id"), row.get("sibling")))  # type: ignore[arg-type]
        if known is not None:
            found = self._cut(*known)
            if "".join(piece.text for piece in found) == response:
                return found
        spans = spans_of(row)
        if len(spans) == 1:
            version, first, end = spans[0]
            return [Piece(response, version, first, end)]
        return [Piece(response, None)]

    def _cut(self, token_ids: Sequence[int], versions: Sequence[int]) -> list[Piece]:
        """Text of each span: the decoded text up to its end without that of the spans before."""
        found, done = list[Piece](), ""
        for version, first, end in version_spans(versions):
            text = self._tokenizer.decode(token_ids[:end], skip_special_tokens=True)
            found.append(Piece(text[len(done) :], version, first, end))
            done = text
        return found


def spans_of(row: Mapping[str, Any]) -> Spans:
    """`weight_versions` of a row of rollouts/; empty where it has another form."""
    spans = row.get("weight_versions")
    if not isinstance(spans, list):
        return []
    whole = [
        span
        for span in spans
        if isinstance(span, list) and len(span) == 3 and all(isinstance(each, int) for each in span)
    ]
    return [(span[0], span[1], span[2]) for span in whole] if len(whole) == len(spans) else []


def advantages(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[float]:
    """The advantage of each sibling of a group, by the formula of `algorithm.group_advantages`.

    All nan where the group is not whole or a reward is missing.
    """
    rewards = [number(row.get("reward")) for row in rows]
    size = config.get("replay.group_size", len(rows))
    if len(rewards) != size or any(math.isnan(reward) for reward in rewards):
        return [math.nan] * len(rewards)
    if len(rewards) == 1:
        return [0.0]
    mean = statistics.fmean(rewards)
    scale = 1.0
    if config.get("algorithm.normalize_std", True):
        scale = statistics.stdev(rewards) + EPS
    return [(reward - mean) / scale for reward in rewards]
