"""The native engine against a naive loop of packed forward passes.

Tokens, logprobs, noise, refills, stop tokens, aborts.
"""

from typing import Any

import numpy as np
import pytest
import torch
from native_engine_world import (
    FAMILIES,
    chosen,
    group,
    naive_tokens,
    packed_logprobs,
    run,
    tiny_decoder,
    tiny_engine,
)

from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.types import FinishReason


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logprobs_equal_a_naive_loop_of_packed_forwards(family: str) -> None:
    engine, decoder = tiny_engine(family, num_slots=3), tiny_decoder(family)
    requests = [
        group(7, [5, 6, 7], siblings=3, temperature=0.8),
        group(8, [1], siblings=2, max_tokens=11),
        group(9, [9] * 20, max_tokens=3),
    ]
    finished = run(engine, *requests)
    for request in requests:
        for sibling, completion in enumerate(finished[request.group_id]):
            assert completion.token_ids.tolist() == naive_tokens(decoder, request, sibling)
            expected = packed_logprobs(
                decoder, request.prompt_ids, completion.token_ids, request.sampling.temperature
            )
            np.testing.assert_allclose(
                completion.behaviour_logprobs, chosen(expected, completion), atol=1e-5, rtol=0
            )
            assert completion.finish_reason is FinishReason.LENGTH


def test_on_policy_identity_holds_when_engine_and_learner_use_other_kernels() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "head_dim": 32,
    }
    engine, decoder = (
        TorchEngine(tiny_decoder(std=0.1, **sizes), num_slots=64, max_len=64),
        tiny_decoder(std=0.1, **sizes),
    )
    requests = [group(key, range(key, key + 32), siblings=8, max_tokens=32) for key in range(8)]
    finished = run(engine, *requests)
    worst = 0.0
    for request in requests:
        for completion in finished[request.group_id]:
            expected = packed_logprobs(decoder, request.prompt_ids, completion.token_ids)
            worst = max(
                worst,
                float(np.abs(completion.behaviour_logprobs - chosen(expected, completion)).max()),
            )
    assert worst <= 1e-5


def test_siblings_share_one_prefill_even_when_some_wait_for_a_slot() -> None:
    engine = tiny_engine(num_slots=3)
    finished = run(engine, group(0, range(10, 20), siblings=8))
    assert engine.prefilled_tokens == 10
    decoder = tiny_decoder()
    for sibling, completion in enumerate(finished[0]):
        assert completion.token_ids.tolist() == naive_tokens(
            decoder, group(0, range(10, 20)), sibling
        )


def test_a_finished_slot_is_refilled_at_the_next_decode_step() -> None:
    engine = tiny_engine(num_slots=2)
    for key, max_tokens in enumerate((2, 5, 4)):
        engine.submit(group(key, [3, 4], max_tokens=max_tokens))
    ends, drawn = {}, []
    for step in range(1, 7):
        ends.update(dict.fromkeys(dict(engine.step()), step))
        drawn.append(engine.num_drawn)
    # key 0 ends with step 2, key 2 takes its slot in step 3 and ends its four tokens with step 6
    assert ends == {0: 2, 1: 5, 2: 6}
    assert drawn == [2, 2, 2, 2, 2, 1]


def test_a_completion_depends_on_its_key_and_not_on_slots_or_neighbours_or_order() -> None:
    requests = [group(key, [key + 1, 2, 3], siblings=2, max_tokens=4 + key) for key in range(5)]
    alone = {
        request.group_id: run(tiny_engine(num_slots=1), request)[request.group_id]
        for request in requests
    }
    crowded = run(tiny_engine(num_slots=7), *reversed(requests))
    for key, completions in alone.items():
        for one, other in zip(completions, crowded[key], strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()


def test_another_seed_key_or_sibling_draws_other_tokens() -> None:
    one = run(tiny_engine(), group(3, [1, 2], siblings=2, max_tokens=12))[3]
    other_seed = run(tiny_engine(), group(3, [1, 2], max_tokens=12, seed=1))[3]
    other_key = run(tiny_engine(), group(4, [1, 2], max_tokens=12))[4]
    texts = {tuple(completion.token_ids.tolist()) for completion in (*one, *other_seed, *other_key)}
    assert len(texts) == 4


def test_the_same_calls_between_the_same_steps_repeat_bit_for_bit_on_a_used_engine() -> None:
    requests = [group(key, range(1, 4 + key), siblings=3, max_tokens=5 + key) for key in range(4)]
    engine = tiny_engine(num_slots=5)
    run(engine, *(group(100 + key, [7] * 30, siblings=2, max_tokens=20) for key in range(3)))
    again, first = run(engine, *requests), run(tiny_engine(num_slots=5), *requests)
    for key in first:
        for one, other in zip(first[key], again[key], strict=True):
            assert one.behaviour_logprobs.tobytes() == other.behaviour_logprobs.tobytes()


def test_a_stop_token_ends_its_response_and_is_kept() -> None:
    free = run(tiny_engine(), group(0, [5, 6], max_tokens=30))[0][0].token_ids.tolist()
    stop = free[4]
    completion = run(
        tiny_engine(),
        group(0, [5, 6], max_tokens=30, stop=(60, stop)),
        group(1, [5, 6], max_tokens=3),
    )[0][0]
    assert completion.token_ids.tolist() == free[: free.index(stop) + 1]
    assert completion.finish_reason is FinishReason.STOP


def test_an_aborted_group_frees_its_slots_and_leaves_the_others_alone() -> None:
    engine = tiny_engine(num_slots=4)
    requests = [
        group(0, [1, 2], siblings=3, max_tokens=9),
        group(1, [3], siblings=3, max_tokens=9),
        group(2, [4], max_tokens=9),
    ]
    for request in requests:
        engine.submit(request)
    engine.step()
    assert engine.abort([0, 99]) == [0]
    assert engine.num_running == 1
    finished = run(engine)
    assert sorted(finished) == [1, 2]
    for request in requests[1:]:
        for sibling, completion in enumerate(finished[request.group_id]):
            assert completion.token_ids.tolist() == naive_tokens(tiny_decoder(), request, sibling)
    assert run(engine, requests[0])[0][2].token_ids.tolist() == naive_tokens(
        tiny_decoder(), requests[0], 2
    )


def test_greedy_takes_the_likeliest_token_and_reports_it_at_temperature_one() -> None:
    completion = run(
        tiny_engine(), group(0, [5, 6], temperature=0.0), group(1, [5, 6], temperature=0.5)
    )[0][0]
    expected = packed_logprobs(tiny_decoder(), [5, 6], completion.token_ids)
    assert completion.token_ids.tolist() == expected.argmax(-1).tolist()
    np.testing.assert_allclose(
        completion.behaviour_logprobs, expected.max(-1).values.numpy(), atol=1e-5, rtol=0
    )


def test_truncated_sampling_draws_from_the_few_but_reports_the_full_distribution() -> None:
    plain = group(1, [5, 6], siblings=4, max_tokens=8)
    finished = run(
        tiny_engine(num_slots=8), group(0, [5, 6], siblings=4, max_tokens=8, top_k=2), plain
    )
    for completion in finished[0]:
        expected = packed_logprobs(tiny_decoder(), [5, 6], completion.token_ids)
        rank = (expected > torch.from_numpy(chosen(expected, completion))[:, None]).sum(-1)
        assert rank.max() <= 1
        np.testing.assert_allclose(
            completion.behaviour_logprobs, chosen(expected, completion), atol=1e-5, rtol=0
        )
    for sibling, completion in enumerate(finished[1]):
        assert completion.token_ids.tolist() == naive_tokens(tiny_decoder(), plain, sibling)


def test_logits_that_are_not_finite_name_the_group() -> None:
    engine = tiny_engine()
    engine.weights()["model.embed_tokens.weight"][13] = float("nan")
    engine.weights()["model.norm.weight"][0] = float("nan")
    engine.submit(group(42, [13]))
    with pytest.raises(RuntimeError, match=r"not finite for the groups \[42\]"):
        engine.step()


def test_a_request_that_can_never_fit_is_refused_with_its_remedy() -> None:
    engine = tiny_engine(max_len=16)
    with pytest.raises(
        ValueError,
        match=r"prompt \(10\) \+ max_tokens \(7\) must not exceed the engine's max_len \(16\)",
    ):
        engine.submit(group(0, range(10), max_tokens=7))
    with pytest.raises(ValueError, match="outside the model's vocabulary of 61"):
        engine.submit(group(0, [61]))
    with pytest.raises(ValueError, match="0 prompt tokens"):
        engine.submit(group(0, []))
    engine.submit(group(0, range(10)))
    with pytest.raises(ValueError, match="already on the engine"):
        engine.submit(group(0, [1]))


def test_a_long_prompt_waits_for_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dapo_async.rollout.native.engine.PASS_TOKENS", 12)
    engine = tiny_engine()
    requests = [group(key, [key + 1] * 8) for key in range(3)]
    finished = run(engine, *requests)
    for request in requests:
        assert finished[request.group_id][0].token_ids.tolist() == naive_tokens(
            tiny_decoder(), request, 0
        )


def test_slots_that_end_in_every_pattern_leave_the_others_their_tokens() -> None:
    # Random stops empty neighbouring and scattered slots at once: all ways of moving are taken.
    stop = tuple(range(12))
    requests = [
        group(key, [3, 4, 5 + key % 7], siblings=1 + key % 5, max_tokens=20, stop=stop)
        for key in range(40)
    ]
    crowded = run(tiny_engine(num_slots=48), *requests)
    for request in requests:
        for sibling, alone in enumerate(run(tiny_engine(num_slots=8), request)[request.group_id]):
            np.testing.assert_array_equal(
                crowded[request.group_id][sibling].token_ids, alone.token_ids
            )
