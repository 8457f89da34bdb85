"""Rewards: verdicts on literal texts, DAPO's punishment at its edges, and scored groups."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
from completions import completion

from dapo_async.reward import get_verifier, score_group, soft_overlong_punishment
from dapo_async.types import Admission, FinishReason, Group, Prompt


def score(
    texts: Sequence[str],
    *,
    lengths: Sequence[int] | None = None,
    group_id: int = 0,
    answer: str = "4",
    max_response_tokens: int = 20,
    overlong_cache_tokens: int | None = None,
) -> Group:
    """A group with these texts, judged by `marker`."""
    admission = Admission(group_id, Prompt(0, "1+3=", np.array([1], np.int32), answer), len(texts))
    completions = [completion(length) for length in lengths or [5] * len(texts)]
    return score_group(
        admission,
        completions,
        texts=texts,
        verify=get_verifier("marker"),
        max_response_tokens=max_response_tokens,
        incarnation="run-0",
        temperature=0.7,
        overlong_cache_tokens=overlong_cache_tokens,
    )


@pytest.mark.parametrize(
    ("response", "gold", "correct", "extracted", "reason"),
    [
        ("####4", "4", True, "4", "correct"),
        ("She makes 9 * 2 = 18.\n#### 18\n", "18", True, "18", "correct"),
        ("#### 18", " 18 ", True, "18", "correct"),
        ("####3 no, wait: ####4", "4", True, "4", "correct"),
        ("####4 no, wait: ####3", "4", False, "3", "wrong"),
        ("#### 18 dollars", "18", False, "18 dollars", "wrong"),
        ("#### 4 4", "44", False, "4 4", "wrong"),
        ("####14", "4", False, "14", "wrong"),
        ("#####4", "4", True, "4", "correct"),
        ("4", "4", False, None, "no_answer"),
        ("###4", "4", False, None, "no_answer"),
        ("####", "4", False, None, "no_answer"),
        ("<think> so #### 4", "4", False, None, "no_answer"),
        ("####4####", "4", False, None, "no_answer"),
        ("", "4", False, None, "no_answer"),
        ("<think>####4</think> I give up", "4", False, None, "no_answer"),
        ("<think>####3</think> ####4", "4", True, "4", "correct"),
    ],
)
def test_marker_reads_what_follows_the_last_marker(
    response: str, gold: str, correct: bool, extracted: str | None, reason: str
) -> None:
    verdict = get_verifier("marker")(response, gold)
    assert (verdict.correct, verdict.extracted, verdict.reason) == (correct, extracted, reason)


@pytest.mark.parametrize(
    ("response", "gold", "correct", "extracted", "reason"),
    [
        (" 4321\n", "4321", True, "4321", "correct"),
        ("4321.", "4321", False, "4321.", "wrong"),
        ("A", "a", False, "A", "wrong"),
        (" ", "4", False, None, "no_answer"),
    ],
)
def test_exact_reads_the_whole_response(
    response: str, gold: str, correct: bool, extracted: str | None, reason: str
) -> None:
    verdict = get_verifier("exact")(response, gold)
    assert (verdict.correct, verdict.extracted, verdict.reason) == (correct, extracted, reason)


@pytest.mark.parametrize("name", ["marker", "exact"])
@pytest.mark.parametrize("gold", ["", " \n"])
def test_an_empty_gold_answer_is_refused(name: str, gold: str) -> None:
    with pytest.raises(ValueError, match="gold answer is empty"):
        get_verifier(name)("####", gold)


def test_an_unknown_verifier_names_the_nearest_one() -> None:
    with pytest.raises(
        ValueError,
        match=re.escape(
            "reward.verifier 'markr' is unknown; did you mean 'marker'? Known are marker, exact"
        ),
    ):
        get_verifier("markr")


@pytest.mark.parametrize(
    ("num_tokens", "punishment"),
    [
        (0, 0.0),
        (16_383, 0.0),
        (16_384, 0.0),
        (16_385, -1 / 4096),
        (18_432, -0.5),
        (20_479, -4095 / 4096),
        (20_480, -1.0),
        (20_481, -1.0),
        (1_000_000, -1.0),
    ],
)
def test_soft_overlong_punishment_at_the_edges_of_the_paper(
    num_tokens: int, punishment: float
) -> None:
    assert soft_overlong_punishment(num_tokens, max_tokens=20_480, cache_tokens=4_096) == punishment


def test_a_cache_as_long_as_the_response_punishes_from_the_first_token() -> None:
    assert [soft_overlong_punishment(n, max_tokens=4, cache_tokens=4) for n in (0, 1, 2, 4)] == [
        0.0,
        -0.25,
        -0.5,
        -1.0,
    ]


@pytest.mark.parametrize("cache_tokens", [0, -1, 11])
def test_a_cache_outside_the_response_is_refused(cache_tokens: int) -> None:
    with pytest.raises(
        ValueError,
        match=rf"overlong cache \({cache_tokens}\) must be between 1 and max_tokens \(10\)",
    ):
        soft_overlong_punishment(5, max_tokens=10, cache_tokens=cache_tokens)


def test_a_group_is_scored_rollout_by_rollout() -> None:
    group = score(["####4", "41####4", "####3", "412"], group_id=17)
    assert [rollout.accuracy for rollout in group.rollouts] == [1.0, 1.0, 0.0, 0.0]
    assert [rollout.reward for rollout in group.rollouts] == [1.0, 1.0, -1.0, -1.0]
    assert [rollout.extracted for rollout in group.rollouts] == ["4", "4", "3", None]
    assert [rollout.text for rollout in group.rollouts] == ["####4", "41####4", "####3", "412"]
    assert (group.group_id, group.prompt.answer, group.incarnation, group.temperature) == (
        17,
        "4",
        "run-0",
        0.7,
    )


def test_the_punishment_shapes_the_reward_and_leaves_the_accuracy_alone() -> None:
    group = score(
        ["####4", "####4", "####3", "412"],
        lengths=[15, 18, 18, 20],
        max_response_tokens=20,
        overlong_cache_tokens=5,
    )
    assert [rollout.accuracy for rollout in group.rollouts] == [1.0, 1.0, 0.0, 0.0]
    assert [rollout.reward for rollout in group.rollouts] == pytest.approx([1.0, 0.4, -1.6, -2.0])


def test_a_truncated_response_without_an_answer_is_wrong() -> None:
    admission = Admission(0, Prompt(0, "1+3=", np.array([1], np.int32), "4"), 1)
    (rollout,) = score_group(
        admission,
        [completion(20, FinishReason.LENGTH)],
        texts=["4" * 20],
        verify=get_verifier("marker"),
        max_response_tokens=20,
        incarnation="run-0",
        temperature=1.0,
    ).rollouts
    assert (rollout.truncated, rollout.accuracy, rollout.reward, rollout.extracted) == (
        True,
        0.0,
        -1.0,
        None,
    )
