"""Own verifiers and filters by `module:function`, and verifiers by the source of a row."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from completions import completion
from learner_world import sequences_of
from refusals import refusal
from worker_world import FakeEngine, FakeReplay, play, settled

from dapo_async.learner.batching import pack
from dapo_async.replay import custom_filter
from dapo_async.replay.step_stats import AcceptanceLog
from dapo_async.reward import (
    VERIFIER_FAILED,
    Verdict,
    VerifierFailed,
    choose_verifiers,
    get_verifier,
    named_sources,
    score_group,
)
from dapo_async.reward.verdict import FAILED, TOO_FEW_VERDICTS
from dapo_async.rollout.worker import RolloutWorker
from dapo_async.types import (
    Admission,
    Completion,
    FinishReason,
    Group,
    GroupFacts,
    Prompt,
    RejectReason,
    Rollout,
)
from dapo_async.utils.plugins import load_function


def halves(response: str, gold: str) -> Verdict:
    """Partial credit."""
    return Verdict(correct=1.0 if response == gold else 0.5, extracted=response, reason="half")


def repeats_the_prompt(response: str, gold: str, prompt: str) -> Verdict:
    return Verdict(correct=response == gold, extracted=prompt, reason="repeated")


def number_of_three(response: str, gold: str) -> Verdict:
    return Verdict(correct=3.0, extracted=None, reason="three")


def says_true(response: str, gold: str) -> bool:
    return True


def one_parameter(response: str) -> Verdict:
    return Verdict(correct=True, extracted=None, reason="correct")


async def later(response: str, gold: str) -> Verdict:
    return Verdict(correct=True, extracted=None, reason="correct")


def even_admissions(group: Group) -> bool:
    return group.group_id % 2 == 0


def says_nothing(group: Group) -> None:
    return None


HERE = __name__


def group(index: int, finish: FinishReason = FinishReason.STOP, length: int = 3) -> Group:
    return Group(
        index,
        Prompt(0, "", np.array([1], np.int32), "4"),
        (Rollout(completion(length, finish), "", 1.0, 1.0, None),),
        "run-0",
        1.0,
    )


def test_an_own_verifier_is_called_with_response_and_gold() -> None:
    verify = get_verifier(f"{HERE}:halves")
    assert (verify("a", "a").accuracy, verify("a", "b").accuracy, verify("a", "b").reason) == (
        1.0,
        0.5,
        "half",
    )


def test_an_own_verifier_with_a_parameter_prompt_gets_the_text_of_the_prompt() -> None:
    verify = get_verifier(f"{HERE}:repeats_the_prompt")
    assert verify("a", "a", prompt="Q<think>").extracted == "Q<think>"
    assert verify("a", "a").extracted == ""
    assert get_verifier(f"{HERE}:halves")("a", "a", prompt="Q<think>").accuracy == 1.0


@pytest.mark.parametrize(
    ("name", "says"),
    [("number_of_three", "accuracy 3.0, which must lie in [0, 1]"), ("says_true", "returned bool")],
)
def test_what_an_own_verifier_returns_is_checked(name: str, says: str) -> None:
    verdict = get_verifier(f"{HERE}:{name}")("a", "b")
    assert verdict.failed
    assert says in verdict.detail


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "no.such.module:judge",
            "ModuleNotFoundError: No module named 'no'; install the module or put its folder on "
            "PYTHONPATH",
        ),
        (f"{HERE}:absent", f"AttributeError: module '{HERE}' has no attribute 'absent'"),
        (f"{HERE}:one_parameter", "its parameters are (response: str)"),
        (f"{HERE}:later", "it is asynchronous"),
        (f"{HERE}:HERE", "it is a str; name a function"),
        (f"{HERE}:Verdict", "it is a class; name a function"),
        (":judge", "write for example my_package.rewards:judge"),
        ("module:", "write for example"),
    ],
)
def test_what_is_no_such_function_is_refused_in_one_line(name: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        load_function(name, knob="reward.verifier", parameters=("response", "gold"))
    assert str(error.value).startswith(
        f"reward.verifier ({name!r}) must be module:function, a function(response, gold)"
    )
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_choose_their_verifier_by_their_source() -> None:
    text = f"marker, gsm8k=exact, own = {HERE}:halves,"
    chosen = choose_verifiers(text)
    assert [
        chosen.of(source)("#### 4", "4").accuracy for source in ("", "unnamed", "gsm8k", "own")
    ] == [1.0, 1.0, 0.0, 0.5]
    assert named_sources(text) == ("gsm8k", "own")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("marker,exact", "must name one default verifier, .* correct the default"),
        ("marker,gsm8k=", "correct the source 'gsm8k'"),
        ("marker,a=exact,a=marker", "correct the source 'a'"),
        ("marker,=math", "has '=math', which names no source"),
        ("gsm8k=math", "has no default verifier"),
        ("", "has no default verifier"),
    ],
)
def test_a_choice_of_verifiers_of_another_form_is_refused(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        choose_verifiers(text)


def test_the_check_of_the_inputs_refuses_wrong_verifiers_sources_and_filters() -> None:
    assert "reward.verifier 'maths' is unknown; did you mean 'math'?" in refusal(
        "reward.verifier=maths"
    )
    assert "reward.verifier 'maths' is unknown; did you mean 'math'?" in refusal(
        "reward.verifier='marker,a=maths'"
    )
    assert "reward.verifier names the source a, which no row has in its column" in refusal(
        "reward.verifier='marker,a=math'"
    )
    assert "replay.filter ('no.such:keep') must be module:function, a function(group)" in refusal(
        "replay.filter=no.such:keep"
    )


def test_an_own_filter_rejects_with_a_reason_of_its_own() -> None:
    keeps = custom_filter(f"{HERE}:even_admissions")
    assert [keeps(group(index)) for index in (0, 1)] == [None, RejectReason.FILTERED]
    with pytest.raises(AssertionError, match="returned NoneType, must return bool"):
        custom_filter(f"{HERE}:says_nothing")(group(0))


def test_a_response_without_a_verdict_is_left_out_of_its_group() -> None:
    judged: list[str] = []

    def dying(response: str, gold: str, *, prompt: str = "") -> Verdict:
        judged.append(response)
        return Verdict(
            correct=False, extracted=None, reason="failed" if response == "c" else "wrong"
        )

    admission = Admission(0, Prompt(0, "", np.array([1], np.int32), "4"), 3)
    options: dict[str, Any] = {
        "verify": dying,
        "max_response_tokens": 9,
        "incarnation": "run-0",
        "temperature": 1.0,
    }

    def scored(texts: str) -> Group:
        judged.clear()
        of_all = replace(admission, group_size=len(texts))
        lengths = [completion(length) for length in range(1, len(texts) + 1)]
        return score_group(of_all, lengths, texts=list(texts), **options)

    assert [rollout.reason for rollout in scored("abd").rollouts] == ["wrong"] * 3
    group = scored("acb")
    assert [(each.text, each.num_tokens) for each in group.rollouts] == [("a", 1), ("b", 3)]
    assert (group.num_failed, GroupFacts.of(group).num_failed) == (1, 1)
    acceptance = AcceptanceLog(count_waves=False)
    acceptance.accept(GroupFacts.of(group))
    assert acceptance.step.verdicts == {"wrong": 2, FAILED: 1}
    # One sibling can't be compared; the prompt is not to blame.
    with pytest.raises(VerifierFailed, match=f"^{TOO_FEW_VERDICTS}$"):
        scored("cac")
    for texts in ("cc", "ccca", "cccccc"):
        with pytest.raises(VerifierFailed, match=f"^{VERIFIER_FAILED}$"):
            scored(texts)
        assert len(judged) <= 3, "each may have waited for its deadline"
    assert len(scored("ccaa").rollouts) == 2
    assert len(scored("a").rollouts) == 1, "groups of one are allowed"


def test_a_worker_reports_such_a_group_as_failed_and_goes_on() -> None:
    async def scene(worker: RolloutWorker, engine: FakeEngine, replay: FakeReplay) -> None:
        score = worker._score

        async def dying(admission: Admission, completions: Sequence[Completion]) -> Group:
            if admission.group_id == 1:
                raise VerifierFailed("verifier failed")
            return await score(admission, completions)

        worker._score = dying
        for key in (0, 1, 2):
            engine.finish(key)
        await settled()
        assert sorted(replay.offered) == [0, 2]
        assert replay.failed == [([1], "verifier failed")]
        assert 1 not in worker._wanted
        await asyncio.sleep(0)

    play(scene)


def test_overlong_filtering_masks_what_was_cut_and_nothing_that_ended() -> None:
    """At most 20 tokens: 19 and 20 that end with a stop token count, 20 that were cut do not."""
    lengths = (
        (19, FinishReason.STOP),
        (20, FinishReason.STOP),
        (20, FinishReason.LENGTH),
        (1, FinishReason.LENGTH),
    )
    rollouts = tuple(
        Rollout(completion(length, finish), "", reward, reward, None)
        for (length, finish), reward in zip(lengths, (1, 1, -1, -1), strict=True)
    )
    groups = [Group(0, Prompt(0, "", np.array([1, 2], np.int32), "4"), rollouts, "run-0", 1.0)]
    rows = sequences_of(groups, normalize_std=False, overlong_filtering=True)
    assert [row.in_loss for row in rows] == [True, True, False, False]
    assert [row.advantage for row in rows] == [1.0, 1.0, -1.0, -1.0]
    assert int(pack(rows).mask.sum()) == 39
    assert all(
        row.in_loss for row in sequences_of(groups, normalize_std=False, overlong_filtering=False)
    )
