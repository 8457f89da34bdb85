"""Readable samples of a step for `rollouts/` (L3): groups come in, a JSON line per rollout leaves.

Called by the replay actor when it hands a batch to the learner.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from dapo_async.types import Group, GroupFacts
from dapo_async.utils.files import atomic_write


def choose_samples(groups: Sequence[GroupFacts], prompts: Sequence[str], count: int) -> list[int]:
    """Positions of up to `count` groups of a step that differ from each other; `prompts`: texts.

    In turn: the highest mean accuracy, the lowest, the most weight versions, the most response
    tokens, the fewest; then again from the first criterion. A prompt is shown twice only when no
    other is left. Ties go to more weight versions, then to older weights, then to the lower id.
    With `count` for all of them there is no choice: they come by id.
    """
    if count >= len(groups):
        return sorted(range(len(groups)), key=lambda each: groups[each].group_id)
    accuracy = [sum(group.accuracies) / len(group.accuracies) for group in groups]
    versions = [group.num_versions for group in groups]
    tokens = [group.num_response_tokens for group in groups]
    in_turn: list[tuple[Sequence[float], int]] = [
        (accuracy, -1),
        (accuracy, 1),
        (versions, -1),
        (tokens, -1),
        (tokens, 1),
    ]
    criteria = cycle(in_turn)
    chosen: list[int] = []
    left = list(range(len(groups)))
    while left and len(chosen) < count:
        values, sign = next(criteria)
        shown = {prompts[each] for each in chosen}
        best = min(
            left,
            key=lambda each: (
                prompts[each] in shown,
                sign * values[each],
                -versions[each],
                groups[each].oldest_version,
                groups[each].group_id,
            ),
        )
        chosen.append(best)
        left.remove(best)
    return chosen


def write_rollouts(folder: Path, *, step: int, groups: Sequence[Group]) -> Path:
    """Writes the file of a step and returns it.

    A JSON line per rollout; `weight_versions` as spans of [version, first token, end]."""
    rows = [
        {
            "step": step,
            "group_id": group.group_id,
            "sibling": sibling,
            "prompt": group.prompt.text,
            "response": rollout.text,
            "gold": group.prompt.answer,
            "extracted": rollout.extracted,
            "accuracy": rollout.accuracy,
            "reward": rollout.reward,
            "tokens": rollout.num_tokens,
            "finish_reason": rollout.completion.finish_reason.value,
            "weight_versions": version_spans(rollout.completion.weight_versions.tolist()),
            "prefill_version": rollout.completion.prefill_version,
        }
        for group in groups
        for sibling, rollout in enumerate(group.rollouts)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = folder / f"step_{step:06d}.jsonl"
    atomic_write(path, text)
    return path


def version_spans(versions: Sequence[int]) -> list[list[int]]:
    """Run-length form of the versions per token: `[7, 7, 8] -> [[7, 0, 2], [8, 2, 3]]`."""
    spans: list[list[int]] = []
    for index, version in enumerate(versions):
        if spans and spans[-1][0] == version:
            spans[-1][2] = index + 1
        else:
            spans.append([version, index, index + 1])
    return spans
