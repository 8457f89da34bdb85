"""The native engine gives its device memory away and goes on as if it never had."""

import asyncio
import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from native_engine_world import group, run, tiny_decoder, tiny_engine

from dapo_async.model import checksum
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.utils.state_clock import StateClock

PROBE = np.arange(1, 9, dtype=np.int32)


def kv_tensors() -> Iterator[torch.Tensor]:
    """Every live tensor with the six dimensions of keys and values."""
    gc.collect()
    return (each for each in gc.get_objects() if type(each) is torch.Tensor and each.ndim == 6)


def test_a_sleeping_engine_holds_neither_keys_and_values_nor_weights() -> None:
    before = {id(each) for each in kv_tensors()}
    engine = tiny_engine(num_slots=2)
    engine.submit(group(0, range(1, 9), siblings=3))
    engine.step()
    own = [each for each in kv_tensors() if id(each) not in before]
    assert sum(each.numel() for each in own) > 0
    del own

    engine.sleep()

    assert [each for each in kv_tensors() if id(each) not in before] == []
    assert sum(each.untyped_storage().nbytes() for each in engine.weights().values()) == 0
    assert (engine.asleep, engine.has_work, engine.num_running) == (True, False, 2)


@pytest.mark.parametrize("weight_update", ["recompute", "keep_kv"])
def test_sequences_continue_after_a_sleep_as_if_there_had_been_none(
    weight_update: str,
) -> None:
    requests = [group(each, range(1, 8 + each), siblings=3, max_tokens=12) for each in range(3)]
    awake = run(tiny_engine(weight_update=weight_update), *requests)
    engine = tiny_engine(weight_update=weight_update)
    for request in requests:
        engine.submit(request)
    finished = dict(engine.step())
    for _ in range(3):
        engine.sleep()
        engine.wake()
        finished.update(engine.step())
    while engine.has_work:
        finished.update(engine.step())

    assert finished.keys() == awake.keys()
    for group_id, completions in awake.items():
        for ours, theirs in zip(finished[group_id], completions, strict=True):
            assert ours.token_ids.tolist() == theirs.token_ids.tolist()
            np.testing.assert_allclose(
                ours.behaviour_logprobs, theirs.behaviour_logprobs, atol=1e-5
            )


def test_a_wake_reads_running_sequences_again_but_not_their_last_token() -> None:
    engine = tiny_engine()
    engine.submit(group(0, range(1, 9), siblings=2))
    engine.step()
    engine.step()
    engine.sleep()
    assert engine.wake() == 2 * (8 + 2 - 1)


def test_new_weights_wait_for_the_end_of_the_sleep_and_so_do_groups() -> None:
    async def scenario() -> None:
        clock = StateClock("rollout-0")
        engine = ThreadedEngine(tiny_engine(), clock)
        new = dict(tiny_decoder(seed=2).named_parameters())
        weights = checksum(engine.weights())
        await engine.sleep()
        update = asyncio.create_task(engine.update_weights(new, version=1, probe_ids=PROBE))
        running = asyncio.create_task(engine.generate(group(0, range(1, 9))))
        await asyncio.sleep(0.05)
        assert not update.done()
        assert not running.done()
        assert clock.state == "asleep"
        await engine.wake()
        report = await update
        (completion,) = await running
        assert report.version == 1
        assert set(completion.weight_versions.tolist()) <= {0, 1}
        assert checksum(engine.weights()) != weights
        use = engine.time_use()
        assert use.asleep >= 0.05
        assert engine.slot_use().asleep == pytest.approx(4 * use.asleep, rel=0.2)
        await engine.close()

    asyncio.run(scenario())


def test_a_closed_engine_may_sleep() -> None:
    async def scenario() -> None:
        engine = ThreadedEngine(tiny_engine(), StateClock("rollout-0"))
        await engine.sleep()
        await engine.close()

    asyncio.run(scenario())
