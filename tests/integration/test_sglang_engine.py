"""The SGLang engine against the real server and a forward pass of Hugging Face's model: logprobs, versions, weights while it generates, aborts."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from sglang_world import (
    CONFIGS,
    INCARNATION,
    NUM_SLOTS,
    PROBE,
    VOCABULARY,
    broadcasting,
    forward_logprobs,
    from_disk,
    request,
)

from dapo_async.config import AlgorithmConfig, LearnerConfig
from dapo_async.learner import LearnerRank
from dapo_async.model import load_decoder, score_tokens
from dapo_async.rollout import Aborted
from dapo_async.types import FinishReason, Group, Prompt, Rollout

pytestmark = pytest.mark.sglang
on_one_family = pytest.mark.parametrize(
    "world", ["qwen3"], indirect=True
)  # the same server as that of the test of all families

TOLERANCE = 1e-4  # nats, float32: kernels round differently
PROMPT = (7, 11, 13, 17, 19, 23)
LONG = 300  # tokens: long enough for an update in their midst


async def some_tokens(engine, *, least=20) -> None:
    """Waits until every response at the server has told of so many tokens."""
    async with asyncio.timeout(30):
        while True:
            responses = [
                response
                for group in engine._running.values()
                for response in group.responses.values()
            ]
            if responses and all(len(response.token_ids) >= least for response in responses):
                return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("world", CONFIGS, indirect=True)
def test_behaviour_logprobs_are_those_of_the_model_at_the_temperature(world) -> None:
    async def generate():
        async with world.engine() as engine:
            greedy = request(2, PROMPT, max_tokens=12, temperature=0.0)
            return await asyncio.gather(
                engine.generate(request(1, PROMPT, siblings=4, temperature=0.7)),
                engine.generate(greedy),
            )

    sampled, (greedy,) = asyncio.run(generate())
    decoder = load_decoder(world.folder)
    assert len({completion.token_ids.tobytes() for completion in sampled}) == 4
    for completion in sampled:
        assert len(completion.token_ids) == 40
        assert completion.finish_reason is FinishReason.LENGTH
        assert completion.prefill_version == 0
        assert completion.weight_versions.tolist() == [0] * 40
        expected = forward_logprobs(world.base, PROMPT, completion.token_ids, 0.7)
        np.testing.assert_allclose(completion.behaviour_logprobs, expected, atol=TOLERANCE, rtol=0)
    with torch.no_grad():
        chosen = forward_logprobs(world.base, PROMPT, greedy.token_ids)
        np.testing.assert_allclose(greedy.behaviour_logprobs, chosen, atol=TOLERANCE, rtol=0)
        learner = score_tokens(decoder, np.asarray([*PROMPT, *greedy.token_ids], dtype=np.int32))[
            len(PROMPT) - 1 :
        ]
        np.testing.assert_allclose(greedy.behaviour_logprobs, learner, atol=TOLERANCE, rtol=0)


@on_one_family
def test_response_ends_with_its_stop_token(world) -> None:
    async def generate():
        async with world.engine() as engine:
            every = tuple(range(VOCABULARY // 2))
            return await engine.generate(request(1, PROMPT, siblings=8, stop_token_ids=every))

    for completion in asyncio.run(generate()):
        assert completion.finish_reason is FinishReason.STOP
        assert completion.token_ids[-1] < VOCABULARY // 2
        assert all(token >= VOCABULARY // 2 for token in completion.token_ids[:-1])
        expected = forward_logprobs(world.base, PROMPT, completion.token_ids)
        np.testing.assert_allclose(completion.behaviour_logprobs, expected, atol=TOLERANCE, rtol=0)


@on_one_family
@pytest.mark.parametrize("transport", ["disk", "broadcast"])
@pytest.mark.parametrize("mode", ["recompute", "keep_kv", "drain"])
def test_weights_change_while_it_generates_as_the_mode_says(world, mode, transport) -> None:
    async def generate():
        async with world.engine(mode) as engine:
            running = asyncio.create_task(
                engine.generate(request(1, PROMPT, siblings=4, max_tokens=LONG))
            )
            await some_tokens(engine)
            if transport == "disk":
                attested = await engine.update(
                    from_disk(engine._client, world.other_folder), version=5, probe_ids=PROBE
                )
            else:
                async with broadcasting(engine._client, world.other_folder) as load:
                    attested = await engine.update(load, version=5, probe_ids=PROBE)
            before = await running
            (after,) = await engine.generate(request(2, PROMPT))
            return attested, before, after

    (incarnation, report), before, after = asyncio.run(generate())
    assert (incarnation, report.version) == (INCARNATION, 5)
    np.testing.assert_allclose(
        report.probe_before,
        forward_logprobs(world.base, PROBE[:1], PROBE[1:]),
        atol=TOLERANCE,
        rtol=0,
    )
    np.testing.assert_allclose(
        report.probe_after,
        forward_logprobs(world.other, PROBE[:1], PROBE[1:]),
        atol=TOLERANCE,
        rtol=0,
    )
    # The same prompt again: nothing that the old weights left in the cache is used.
    assert set(after.weight_versions.tolist()) == {5}
    np.testing.assert_allclose(
        after.behaviour_logprobs,
        forward_logprobs(world.other, PROMPT, after.token_ids),
        atol=TOLERANCE,
        rtol=0,
    )
    assert (report.recomputed_tokens > 0) == (mode == "recompute")
    for completion in before:
        old = completion.weight_versions == 0
        assert len(completion.token_ids) == LONG
        assert completion.prefill_version == 0
        assert sorted(completion.weight_versions.tolist()) == completion.weight_versions.tolist()
        expected = forward_logprobs(world.base, PROMPT, completion.token_ids)
        np.testing.assert_allclose(
            completion.behaviour_logprobs[old], expected[old], atol=TOLERANCE, rtol=0
        )
        if mode == "drain":
            assert old.all()
            continue
        assert set(completion.weight_versions.tolist()) == {0, 5}
        expected = forward_logprobs(world.other, PROMPT, completion.token_ids)
        gap = np.abs(completion.behaviour_logprobs - expected)[~old]
        if mode == "recompute":
            assert gap.max() <= TOLERANCE
        else:
            assert gap.max() > 0.1  # on the KV of weights that have nothing in common with these


@on_one_family
def test_metrics_of_the_learner_are_those_of_an_independent_forward_pass(world) -> None:
    """Gap of old KV and mismatch of fresh tokens, by the learner's step on what the server generated, against Hugging Face in float64."""

    async def generate():
        async with world.engine("keep_kv") as engine:
            running = asyncio.create_task(
                engine.generate(request(1, PROMPT, siblings=4, max_tokens=LONG))
            )
            await some_tokens(engine)
            await engine.update(
                from_disk(engine._client, world.other_folder), version=5, probe_ids=PROBE
            )
            return [await running, await engine.generate(request(2, PROMPT, siblings=4))]

    answers = asyncio.run(generate())
    prompt = Prompt(0, "", np.array(PROMPT, np.int32), "")
    groups = [
        Group(
            number,
            prompt,
            tuple(
                Rollout(completion, "", 0.0, float(sibling % 2), None)
                for sibling, completion in enumerate(answer)
            ),
            "test",
            1.0,
        )
        for number, answer in enumerate(answers)
    ]
    rank = LearnerRank(
        load_decoder(world.other_folder),
        algorithm=AlgorithmConfig(),
        learner=LearnerConfig(),
        seed=0,
        version=5,
    )
    metrics = rank.step(groups).flat()

    gaps = {"mismatch": [], "kv_gap": []}
    for completion in (completion for answer in answers for completion in answer):
        gap = (
            forward_logprobs(world.other, PROMPT, completion.token_ids).astype(np.float64)
            - completion.behaviour_logprobs
        )
        gaps["mismatch" if completion.prefill_version == 5 else "kv_gap"] += gap[
            completion.weight_versions == 5
        ].tolist()
    fresh, stale = np.array(gaps["mismatch"]), np.array(gaps["kv_gap"])
    assert len(fresh) == 4 * 40
    assert len(stale) > 100
    assert metrics["kv_gap"] == pytest.approx(np.abs(stale).mean(), abs=TOLERANCE)
    assert metrics["kv_gap_max"] == pytest.approx(np.abs(stale).max(), abs=TOLERANCE)
    assert metrics["kv_gap"] > 0.01
    # Two float32 kernels against a third: what is left is rounding, which has to be small, and there.
    assert 0 < metrics["mismatch"] <= metrics["mismatch_max"] <= TOLERANCE
    assert np.abs(fresh).max() <= TOLERANCE
    assert 0 < metrics["mismatch_k3"] < TOLERANCE**2


@on_one_family
def test_aborted_group_leaves_and_the_others_go_on(world) -> None:
    async def generate():
        async with world.engine() as engine:
            groups = [
                asyncio.create_task(
                    engine.generate(request(key, PROMPT, siblings=8, max_tokens=LONG))
                )
                for key in (1, 12, 3)
            ]
            await some_tokens(engine, least=8)
            await engine.abort([1, 3, 99])  # 3 still waits for slots, and 99 was never here
            outcomes = await asyncio.gather(*groups, return_exceptions=True)
            last = await engine.generate(request(4, PROMPT, siblings=NUM_SLOTS))
            return outcomes, last, engine.slot_use()

    outcomes, last, use = asyncio.run(generate())
    assert [type(outcome) for outcome in outcomes] == [Aborted, tuple, Aborted]
    assert [len(completion.token_ids) for completion in outcomes[1]] == [LONG] * 8
    assert len(last) == NUM_SLOTS
    assert use.occupied > 0
    assert use.occupied + use.no_credit + use.tail + use.sync == pytest.approx(
        NUM_SLOTS * use.elapsed_s
    )


@on_one_family
def test_group_may_come_again_at_once(world) -> None:
    async def generate():
        async with world.engine() as engine:
            return [
                await engine.generate(request(1, PROMPT, siblings=NUM_SLOTS, max_tokens=8))
                for _ in range(20)
            ]

    for completions in asyncio.run(generate()):
        assert [len(completion.token_ids) for completion in completions] == [8] * NUM_SLOTS


@on_one_family
def test_request_that_never_fits_is_the_callers_fault(world) -> None:
    async def generate():
        async with world.engine() as engine:
            with pytest.raises(ValueError, match="refuses the request"):
                await engine.generate(request(1, PROMPT, siblings=2, max_tokens=10_000))
            return await engine.generate(request(2, PROMPT))

    assert len(asyncio.run(generate())) == 1
