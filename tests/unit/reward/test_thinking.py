"""Thinking that the prompt opened: without its closing marker a response has no answer."""

from typing import Any

import numpy as np
import pytest
from completions import completion

from dapo_async.reward import get_verifier, score_group
from dapo_async.reward.math_verifier.verify import verify
from dapo_async.reward.thinking import MARKERS, conclusion, opened_by, prompt_text
from dapo_async.types import Admission, Prompt

OPENINGS = [opening for opening, _ in MARKERS]
CUT = "first try {answer}, let me double check by"
ANSWERS = (r"\boxed{4}", "Answer: 4\n", "the answer is: $4$\n", "A: 4", "#### 4\n", "x = 4", "4")


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("after", ["", "\n", " ", "\r\n", "\n\n", "\t\n "])
def test_a_prompt_that_ends_with_an_opening_marker_opens_the_thinking(
    opening: str, after: str
) -> None:
    prompt = f"<|im_start|>assistant\n{opening}{after}"
    response = CUT.format(answer=r"\boxed{4}")
    assert verify(response, "4", prompt=prompt).reason == "no_answer"
    assert verify(response, "4").reason == "correct"


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("extraction", ["marker", "any", "none"])
@pytest.mark.parametrize("opened", ["by the prompt", "by the response"])
def test_no_style_of_answer_counts_within_unclosed_thinking(
    answer: str, extraction: Any, opened: str
) -> None:
    prompt, start = ("Q<think>\n", "") if opened == "by the prompt" else ("Q", "<think>\n")
    for response in (start + answer, start + CUT.format(answer=answer)):
        verdict = verify(response, "4", extraction=extraction, prompt=prompt)
        assert (verdict.correct, verdict.extracted, verdict.reason) == (False, None, "no_answer")


@pytest.mark.parametrize("name", ["marker", "exact", "math"])
def test_every_built_in_verifier_knows_the_prompt(name: str) -> None:
    judge = get_verifier(name)
    response = {"marker": "#### 4", "exact": "4", "math": "Answer: 4"}[name]
    assert judge(response, "4").correct
    assert judge(response, "4", prompt="1+3=").correct
    assert judge(response, "4", prompt="1+3=<think>\n").reason == "no_answer"


@pytest.mark.parametrize(("opening", "closing"), MARKERS)
def test_the_answer_after_the_closing_marker_counts(opening: str, closing: str) -> None:
    response = rf"is it \boxed{{3}}? No.{closing} So \boxed{{4}}."
    for prompt, start in ((f"Q{opening}\n", ""), ("Q", opening), (f"Q{opening}", opening)):
        assert verify(start + response, "4", prompt=prompt).reason == "correct"
        assert verify(start + response, "3", prompt=prompt).reason == "wrong"


def test_another_kind_of_closing_marker_does_not_end_the_thinking() -> None:
    assert conclusion("4</thinking> 5", "Q<think>\n") is None
    assert conclusion("<think>4</thinking> 5") is None
    assert conclusion("4</think> 5<thinking>") is None
    assert conclusion("4</think> 5", "Q<thinking>") is None
    assert conclusion("4</think> 5", "Q<think>") == " 5"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "1+3=",
        "<think>\n\n</think>\n\n",
        "Q<think>a</think>",
        "Put your thoughts within <think> and </think>.",
        "First think inside <think> tags, then answer.",
        "Begin with <think>\nProblem: 1+3",
        "<|im_start|>user\nUse\n<think>\n<|im_end|>\n<|im_start|>assistant\n",
        "[INST] <think> [/INST]",
        "User:\n<think>\nwhat is this?\nAssistant:",
        "the marker `<think>`.",
    ],
)
def test_a_prompt_that_ends_outside_of_a_block_opens_no_thinking(prompt: str) -> None:
    assert opened_by(prompt) is None
    assert verify("Answer: 4", "4", prompt=prompt).correct


@pytest.mark.parametrize(
    "prompt",
    [
        "Q<think>",
        "think within <think> </think> tags. Assistant: <think>",
        "<u>1+3<a><think>\n",
        "<｜Assistant｜><think>\n",
        "<|im_start|>assistant\n<think>\nOkay, let me see.",
        "Assistant: <think> Let me solve this",
        "<think>a</think>\n<|im_start|>assistant\n<think>\n",
    ],
)
def test_a_prompt_that_ends_inside_a_block_opens_the_thinking(prompt: str) -> None:
    assert opened_by(prompt) == ("<think>", "</think>")
    assert verify("Answer: 4", "4", prompt=prompt).reason == "no_answer"
    assert verify("</think>Answer: 4", "4", prompt=prompt).correct


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (None, ""),
        ([], ""),
        ("Q<think>", "Q<think>"),
        (7, "7"),
        ([{"role": "user", "content": "Q<think>\n"}], "Q<think>\n"),
        (
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>\n"}],
            "<think>\n",
        ),
        ([{"role": "user", "content": "<think>"}, {"role": "user", "content": "Q"}], "Q"),
        ([{"role": "user", "content": [{"type": "text", "text": "Q<think>"}]}], "Q<think>"),
        ([{"role": "user", "content": [{"type": "image"}, "Q"]}], "Q"),
        ([{"role": "user", "content": None}], ""),
    ],
)
def test_the_text_of_a_prompt_is_its_last_message(prompt: Any, text: str) -> None:
    assert prompt_text(prompt) == text


@pytest.mark.parametrize("prompt", [True, {}, {"content": "Q"}, ["Q"], [{"role": "user"}], [[]]])
def test_a_prompt_of_another_form_is_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"^prompt \(\w+\) must be a text or a list of chat"):
        prompt_text(prompt)


@pytest.mark.parametrize("name", ["marker", "math"])
def test_the_group_of_a_prompt_that_opens_thinking_is_scored_by_its_conclusions(name: str) -> None:
    answer = {"marker": "#### 4", "math": "Answer: 4"}[name]
    texts = [answer, f"{answer}</think>", f"3</think>{answer}", f"<think>{answer}"]
    admission = Admission(0, Prompt(0, "Q<think>\n", np.array([1], np.int32), "4"), len(texts))
    group = score_group(
        admission,
        [completion(2)] * len(texts),
        texts=texts,
        verify=get_verifier(name),
        max_response_tokens=9,
        incarnation="run-0",
        temperature=1.0,
    )
    assert group.accuracies == (0.0, 0.0, 1.0, 0.0)
    assert [rollout.reason for rollout in group.rollouts] == [
        "no_answer",
        "no_answer",
        "correct",
        "no_answer",
    ]
