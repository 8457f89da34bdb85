"""Held-out evaluation: k responses per prompt; the parts of several engines add up."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from native_engine_world import packed_logprobs, tiny_decoder
from prompts import prompt

from dapo_async.evaluate import Evaluation, evaluate
from dapo_async.rollout.engine import GroupRequest, SamplingParams
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.types import Completion, FinishReason, Prompt
from dapo_async.utils.state_clock import StateClock


def sampling(max_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, stop_token_ids=(), seed=3, top_p=top_p
    )


class FakeEngine:
    """Answers prompt [row, …] with `row` tokens, at most 4, sampled by `versions` in turn."""

    def __init__(self, *versions: int) -> None:
        self.versions = versions
        self.requests: list[GroupRequest] = []

    async def generate(self, request: GroupRequest) -> tuple[Completion, ...]:
        self.requests.append(request)
        await asyncio.sleep(0)
        length = min(int(request.prompt_ids[0]), 4)
        versions = np.resize(np.array(self.versions, np.int32), length)
        finish = FinishReason.LENGTH if request.prompt_ids[0] > 4 else FinishReason.STOP
        return tuple(
            Completion(
                np.full(length, sibling, np.int32),
                np.zeros(length, np.float32),
                versions,
                0,
                finish,
            )
            for sibling in range(request.num_siblings)
        )


def odd_rows_are_correct(asked: Prompt, completion: Completion) -> float | None:
    return float(asked.row % 2)


def evaluated(
    engine: Any,
    prompts: Sequence[Prompt],
    judge: Callable[[Prompt, Completion], float | None] = odd_rows_are_correct,
    *,
    k: int = 1,
) -> Evaluation:
    work = evaluate(engine, prompts, judge=judge, num_samples=k, sampling=sampling(4))
    return asyncio.run(work)


def test_every_prompt_is_answered_under_an_id_that_no_group_has() -> None:
    engine = FakeEngine(7)
    evaluated(engine, [prompt(row, [row, 5]) for row in range(1, 7)])
    assert [request.group_id for request in engine.requests] == [-2, -3, -4, -5, -6, -7]
    assert [request.prompt_ids.tolist() for request in engine.requests] == [
        [row, 5] for row in range(1, 7)
    ]
    assert {request.num_siblings for request in engine.requests} == {1}
    assert {request.sampling for request in engine.requests} == {sampling(4)}


def test_the_sums_follow_the_judge_and_the_engine() -> None:
    result = evaluated(FakeEngine(7), [prompt(row, [row, 5]) for row in range(1, 7)])
    accuracies = {1: 1.0, 2: 0.0, 3: 1.0, 4: 0.0, 5: 1.0, 6: 0.0}
    assert result == Evaluation(
        num_prompts=6,
        num_correct=3.0,
        num_response_tokens=1 + 2 + 3 + 4 + 4 + 4,
        num_truncated=2,
        weight_versions=frozenset({7}),
        accuracies=accuracies,
    )
    assert (result.accuracy, result.mean_response_tokens) == (0.5, 3.0)


def test_the_parts_of_several_engines_add_up_to_the_whole() -> None:
    prompts = [prompt(row, [row, 5]) for row in range(1, 8)]
    whole = evaluated(FakeEngine(7), prompts)
    parts = [evaluated(FakeEngine(7), prompts[number::3]) for number in range(3)]
    assert parts[0] + parts[1] + parts[2] == whole
    # the mean of the parts' accuracies would be another number: they differ in size
    assert whole.accuracy == pytest.approx(4 / 7)
    assert sum(part.accuracy for part in parts) / 3 == pytest.approx(5 / 9)


def test_an_evaluation_of_more_than_one_model_shows_it() -> None:
    assert evaluated(FakeEngine(7, 8), [prompt(3, [3])]).weight_versions == {7, 8}
    assert (
        evaluated(FakeEngine(7), [prompt(3, [3])]) + evaluated(FakeEngine(9), [prompt(3, [3])])
    ).weight_versions == {7, 9}


def test_an_evaluation_is_the_same_after_a_json_file() -> None:
    whole = evaluated(FakeEngine(7), [prompt(row, [row, 5]) for row in range(1, 7)])
    assert Evaluation.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_an_engine_that_has_nothing_to_evaluate_adds_nothing() -> None:
    whole = evaluated(FakeEngine(7), [prompt(1, [1])])
    assert evaluated(FakeEngine(7), []) + whole == whole


def test_a_real_engine_gives_the_likeliest_tokens_and_its_version() -> None:
    prompts = [prompt(0, [5, 6]), prompt(1, [9]), prompt(2, [40, 41, 42])]
    seen: dict[int, Completion] = {}

    def judge(asked: Prompt, completion: Completion) -> float:
        seen[asked.row] = completion
        return 1.0

    async def main() -> Evaluation:
        engine = ThreadedEngine(
            TorchEngine(tiny_decoder(), num_slots=2, max_len=16, version=5), StateClock("rollout-0")
        )
        result = await evaluate(engine, prompts, judge=judge, num_samples=1, sampling=sampling(6))
        await engine.close()
        return result

    result = asyncio.run(main())
    assert (
        result.accuracy,
        result.num_response_tokens,
        result.num_truncated,
        result.weight_versions,
    ) == (1.0, 18, 3, frozenset({5}))
    for asked in prompts:
        tokens = seen[asked.row].token_ids
        assert (
            tokens.tolist()
            == packed_logprobs(tiny_decoder(), asked.token_ids, tokens).argmax(-1).tolist()
        )


def test_a_failed_verdict_is_neither_right_nor_wrong() -> None:
    result = evaluated(
        FakeEngine(7),
        [prompt(row, [row, 5]) for row in range(1, 5)],
        judge=lambda asked, _: None if asked.row == 2 else float(asked.row == 1),
    )
    assert (result.num_prompts, result.num_correct, result.num_unjudged) == (4, 1.0, 1)
    assert result.accuracy == pytest.approx(1 / 3)
    assert (result + result).num_unjudged == 2
    assert Evaluation.from_json(result.to_json()) == result


def test_avg_at_k_is_the_mean_over_prompts_of_the_mean_over_judged_responses() -> None:
    verdicts: dict[tuple[int, int], float | None] = {
        (1, 0): 1.0, (1, 1): 0.0, (1, 2): 1.0,
        (2, 0): None, (2, 1): 0.0, (2, 2): 1.0,
        (7, 0): None, (7, 1): None, (7, 2): None,
    }  # fmt: skip
    engine = FakeEngine(7)
    result = evaluated(
        engine,
        [prompt(row, [row, 5]) for row in (1, 2, 7)],
        judge=lambda asked, completion: verdicts[asked.row, int(completion.token_ids[0])],
        k=3,
    )
    assert [request.num_siblings for request in engine.requests] == [3, 3, 3]
    assert result.accuracies == pytest.approx({1: 2 / 3, 2: 1 / 2})
    assert result.accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert (result.num_prompts, result.num_responses, result.num_unjudged) == (3, 9, 1)
    assert result.mean_response_tokens == pytest.approx((1 + 2 + 4) / 3)
    assert result.truncated == pytest.approx(1 / 3)
    assert Evaluation.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_sampled_responses_differ_but_do_not_depend_on_how_prompts_are_shared() -> None:
    prompts = [prompt(row, [5 + row, 6]) for row in range(3)]
    params = sampling(6, temperature=1.0, top_p=0.9)

    async def main(*parts: Sequence[Prompt]) -> dict[int, list[list[int]]]:
        seen: dict[int, list[list[int]]] = {}

        def judge(asked: Prompt, completion: Completion) -> float:
            seen.setdefault(asked.row, []).append(completion.token_ids.tolist())
            return 1.0

        for part in parts:
            core = TorchEngine(tiny_decoder(), num_slots=2, max_len=16, version=5)
            engine = ThreadedEngine(core, StateClock("rollout-0"))
            await evaluate(engine, part, judge=judge, num_samples=4, sampling=params)
            await engine.close()
        return seen

    whole = asyncio.run(main(prompts))
    assert all(len({tuple(tokens) for tokens in siblings}) > 1 for siblings in whole.values())
    assert asyncio.run(main(prompts[::2], prompts[1::2])) == whole
