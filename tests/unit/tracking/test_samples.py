"""Readable rollouts: which groups of a step are shown, and what each line says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dapo_async.tracking.samples import choose_samples, version_spans, write_rollouts
from dapo_async.types import Completion, FinishReason, Group, GroupFacts, Prompt, Rollout


def test_versions_per_token_become_spans() -> None:
    assert version_spans([7, 7, 8]) == [[7, 0, 2], [8, 2, 3]]
    assert version_spans([3]) == [[3, 0, 1]]
    assert version_spans([1, 2, 1]) == [[1, 0, 1], [2, 1, 2], [1, 2, 3]]
    assert version_spans([]) == []


def test_each_line_of_a_sample_names_its_group_step_and_weight_versions(tmp_path: Path) -> None:
    completion = Completion(
        np.array([4, 5, 6], np.int32),
        np.zeros(3, np.float32),
        np.array([7, 7, 8], np.int32),
        6,
        FinishReason.STOP,
    )
    prompt = Prompt(0, "12 + 30 =", np.array([1], np.int32), "42")
    right, wrong = (
        Rollout(completion, "#### 42 – quod erat", 1.0, 1.0, "42"),
        Rollout(completion, "", 0.0, -1.0, None),
    )
    write_rollouts(tmp_path, step=12, groups=[Group(31, prompt, (right, wrong), "first", 1.0)])
    rows = [
        json.loads(line)
        for line in (tmp_path / "step_000012.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert rows[0] == {
        "step": 12,
        "group_id": 31,
        "sibling": 0,
        "prompt": "12 + 30 =",
        "response": "#### 42 – quod erat",
        "gold": "42",
        "extracted": "42",
        "accuracy": 1.0,
        "reward": 1.0,
        "tokens": 3,
        "finish_reason": "stop",
        "weight_versions": [[7, 0, 2], [8, 2, 3]],
        "prefill_version": 6,
    }
    assert (rows[1]["sibling"], rows[1]["extracted"], rows[1]["reward"]) == (1, None, -1.0)


def group_of(
    group_id: int,
    accuracies: Sequence[float],
    *,
    prompt: str = "",
    num_tokens: int = 3,
    versions: Sequence[int] = (7,),
) -> Group:
    """A group of `num_tokens` tokens per response, the last of which have these versions."""
    per_token = np.array([*[versions[0]] * (num_tokens - len(versions)), *versions], np.int32)
    completion = Completion(
        np.zeros(num_tokens, np.int32),
        np.zeros(num_tokens, np.float32),
        per_token,
        int(per_token.min()),
        FinishReason.STOP,
    )
    rollouts = tuple(Rollout(completion, "", each, each, None) for each in accuracies)
    row = Prompt(group_id, prompt or f"prompt {group_id}", np.zeros(1, np.int32), "")
    return Group(group_id, row, rollouts, "first", 1.0)


def chosen_ids(groups: Sequence[Group], count: int) -> list[int]:
    facts = [GroupFacts.of(group) for group in groups]
    chosen = choose_samples(facts, [group.prompt.text for group in groups], count)
    return [groups[position].group_id for position in chosen]


def test_samples_are_the_best_the_worst_and_the_most_asynchronous_group() -> None:
    groups = [
        group_of(0, (1.0, 0.0)),
        group_of(1, (0.0, 0.25)),
        group_of(2, (1.0, 0.75)),
        group_of(3, (1.0, 0.0), versions=(5, 6, 7)),
        group_of(4, (1.0, 0.0), num_tokens=9),
        group_of(5, (1.0, 0.0), num_tokens=2),
    ]
    chosen = chosen_ids(groups, 5)
    assert chosen == [2, 1, 3, 4, 5]
    assert chosen_ids(groups[::-1], 5) == chosen
    assert chosen_ids(groups[::-1], 6) == [0, 1, 2, 3, 4, 5]
    assert chosen_ids([], 2) == chosen_ids(groups, 0) == []


def test_a_prompt_is_shown_twice_only_when_no_other_is_left() -> None:
    groups = [
        group_of(0, (1.0, 1.0), prompt="1 + 1"),
        group_of(1, (0.0, 0.0), prompt="1 + 1"),
        group_of(2, (0.5, 0.5), prompt="2 + 2"),
        group_of(3, (0.5, 0.5), prompt="2 + 2"),
    ]
    assert chosen_ids(groups, 2) == [0, 2]
    assert chosen_ids(groups, 3) == [0, 2, 1]


def test_groups_of_equal_outcome_are_told_apart_by_their_weight_versions() -> None:
    groups = [
        group_of(0, (0.5, 0.5)),
        group_of(1, (0.5, 0.5), versions=(6, 7)),
        group_of(2, (0.5,)),
    ]
    assert chosen_ids(groups, 2) == [1, 0]


def test_the_facts_of_a_group_say_what_the_group_says() -> None:
    for versions in ((7,), (5, 7), (5, 6, 7)):
        group = group_of(0, (0.5, 0.0), num_tokens=4, versions=versions)
        facts = GroupFacts.of(group)
        assert facts.num_versions == len(group.weight_versions) == len(versions)
        assert facts.oldest_version == group.oldest_version == min(versions)
