"""Groups that one native engine begins and another one ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from native_engine_world import group, naive_tokens, run, tiny_decoder, tiny_engine

from dapo_async.replay import num_tokens
from dapo_async.rollout import Aborted
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.types import Completion, FinishReason
from dapo_async.utils.state_clock import StateClock

# Five siblings in three slots: some end early, some run and some wait when they are taken off.
LONG = group(7, [3, 1, 4, 1, 5], siblings=5, max_tokens=12, stop=(11, 12, 13, 14, 15, 16))


def received_after(steps: int) -> tuple[Completion | None, ...]:
    engine = tiny_engine(num_slots=3)
    engine.submit(LONG)
    for _ in range(steps):
        engine.step()
    received = engine.received([7, 99])[7]
    assert engine.abort([7]) == [7]
    assert engine.received([7]) == {}
    return received


@pytest.mark.parametrize("steps", [1, 3, 6, 9])
def test_continued_group_gets_the_tokens_that_one_engine_would_have_drawn(steps: int) -> None:
    whole = run(tiny_engine(num_slots=3), LONG)[7]
    received = received_after(steps)
    assert 0 < num_tokens(received) < num_tokens(whole)
    engine = tiny_engine(num_slots=3)
    ended = run(engine, replace(LONG, partial_completions=received))[7]
    for one, other in zip(whole, ended, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert np.abs(one.behaviour_logprobs - other.behaviour_logprobs).max() < 1e-5
        assert one.weight_versions.tolist() == other.weight_versions.tolist()
        assert one.finish_reason is other.finish_reason
    assert engine.continued_tokens == sum(
        len(LONG.prompt_ids) + len(each.token_ids) - 1
        for each in received
        if each is not None and not each.is_complete
    )
    decoder = tiny_decoder()
    assert [ended[3].token_ids.tolist()] == [naive_tokens(decoder, LONG, 3)]


def test_partial_completions_say_which_siblings_are_complete() -> None:
    received = received_after(6)
    assert any(each is not None and each.is_complete for each in received)
    assert any(each is not None and not each.is_complete for each in received)
    for each in received:
        if each is not None:
            in_group = int(each.token_ids[-1]) in LONG.sampling.stop_token_ids
            assert in_group == (each.finish_reason is FinishReason.STOP)


def test_versions_of_both_engines_stay_with_their_tokens() -> None:
    received = received_after(3)
    engine = tiny_engine(num_slots=3, version=4)
    ended = run(engine, replace(LONG, partial_completions=received))[7]
    for before, after in zip(received, ended, strict=True):
        count = 0 if before is None else len(before.token_ids)
        expected = [0] * count + [4] * (len(after.token_ids) - count)
        assert after.weight_versions.tolist() == expected
        assert after.prefill_version == (0 if count else 4)


def test_group_that_is_taken_off_twice_keeps_what_both_engines_drew() -> None:
    received = received_after(2)
    engine = tiny_engine(num_slots=1)  # most siblings still wait
    engine.submit(replace(LONG, partial_completions=received))
    engine.step()
    again = engine.received([7])[7]
    assert num_tokens(again) == num_tokens(received) + 1
    whole, ended = (
        run(tiny_engine(), each)[7] for each in (LONG, replace(LONG, partial_completions=again))
    )
    assert [each.token_ids.tolist() for each in whole] == [
        each.token_ids.tolist() for each in ended
    ]


def test_thread_tells_what_an_aborted_group_has_and_books_what_it_reads_again() -> None:
    async def scene() -> None:
        engine = ThreadedEngine(tiny_engine(num_slots=3, max_len=128), StateClock("rollout-0"))
        slow = group(7, [3, 1, 4], siblings=4, max_tokens=120)
        generating = asyncio.create_task(engine.generate(slow))
        while engine.tokens.counts.generated < 6:
            await asyncio.sleep(0.001)
        await engine.abort([7])
        with pytest.raises(Aborted) as caught:
            await generating
        received, count = caught.value.partial_completions, caught.value.num_tokens
        assert count == num_tokens(received) == engine.tokens.counts.generated
        await engine.close()
        other = ThreadedEngine(tiny_engine(num_slots=3, max_len=128), StateClock("rollout-1"))
        ended_siblings: list[int] = []
        completions = await other.generate(
            replace(slow, partial_completions=received), ended_siblings.append
        )
        counts = other.tokens.counts
        assert num_tokens(completions) == count + counts.generated
        assert counts.recomputed >= count
        assert sum(ended_siblings) <= 4
        await other.close()

    asyncio.run(scene())
