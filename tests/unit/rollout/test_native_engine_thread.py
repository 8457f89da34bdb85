"""The engine's thread: awaited calls, weight updates, crashes, and slot use that adds up."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, Never

import numpy as np
import pytest
from native_engine_world import group, naive_tokens, run, tiny_decoder, tiny_engine

from dapo_async.rollout import Aborted
from dapo_async.rollout.engine import SlotUse, TimeUse
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.rollout.slot_meter import SlotMeter
from dapo_async.utils.state_clock import StateClock

PROBE = np.arange(1, 6, dtype=np.int32)


def threaded(**options: Any) -> tuple[ThreadedEngine, StateClock]:
    clock = StateClock("engine")
    return ThreadedEngine(tiny_engine(**options), clock), clock


def slowly(engine: ThreadedEngine) -> None:
    """Slows decode steps down, so that the event loop of a busy machine sees it generate."""
    step = engine._core.step

    def slow_step() -> Any:
        time.sleep(0.005)
        return step()

    engine._core.step = slow_step  # type: ignore[method-assign]


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


def test_awaited_groups_equal_the_synchronous_engine_and_the_clock_follows() -> None:
    async def main() -> Any:
        engine, clock = threaded()
        await until(lambda: clock.state == "wait")
        requests = [group(key, [key + 1, 2], siblings=3, max_tokens=9) for key in range(4)]
        answers = await asyncio.gather(*(engine.generate(request) for request in requests))
        report = await engine.update_weights(
            tiny_decoder(seed=2).state_dict(), version=1, probe_ids=PROBE
        )
        assert (report.version, engine.version) == (1, 1)
        await engine.generate(requests[0])
        await until(lambda: clock.state == "wait")
        await engine.close()
        return requests, answers, [span.state for span in clock.take_spans()]

    requests, answers, states = asyncio.run(main())
    expected = run(tiny_engine(), *requests)
    for request, completions in zip(requests, answers, strict=True):
        for one, other in zip(completions, expected[request.group_id], strict=True):
            assert (
                one.behaviour_logprobs.tobytes() == other.behaviour_logprobs.tobytes()
            )  # one gather is one wave: bit for bit
    without_waits = [state for state in states if state not in ("start", "wait")]
    assert without_waits == ["generate", "sync", "generate"]


def test_ends_of_siblings_are_reported_while_their_group_runs() -> None:
    stops = tuple(range(8))

    async def main() -> Any:
        engine, _ = threaded(num_slots=4)
        ended: list[list[int]] = [[] for _ in range(3)]
        requests = [
            group(key, [key + 1, 2], siblings=8, max_tokens=30, stop=stops) for key in range(3)
        ]
        calls = [
            engine.generate(request, ended[key].append) for key, request in enumerate(requests)
        ]
        answers = await asyncio.gather(*calls)
        before = [sum(counts) for counts in ended]
        await engine.close()
        return answers, ended, before

    answers, ended, before = asyncio.run(main())
    assert [sum(counts) for counts in ended] == before, "an end was reported after the answer"
    for completions, counts in zip(answers, ended, strict=True):
        lengths = [len(completion.token_ids) for completion in completions]
        assert len(set(lengths)) > 2
        assert len(counts) > 1
        assert 0 < sum(counts) < 8, "the answer stands for the last end"


def test_a_crash_reaches_pending_and_later_calls_with_its_original_error() -> None:
    async def main() -> Any:
        engine, _ = threaded(num_slots=1)
        engine.weights()["model.norm.weight"][0] = float("nan")
        pending = [engine.generate(group(key, [1, 2])) for key in range(2)]
        errors = await asyncio.gather(*pending, return_exceptions=True)
        with pytest.raises(RuntimeError, match=r"not finite for the groups \[0\]"):
            await engine.generate(group(5, [1]))
        with pytest.raises(RuntimeError, match="not finite"):
            await engine.update_weights({}, version=1, probe_ids=PROBE)
        await engine.close()
        return errors

    errors = asyncio.run(main())
    assert [type(error) for error in errors] == [RuntimeError, RuntimeError]
    assert all("not finite for the groups [0]" in str(error) for error in errors)


def out_of_memory(*_: Any, **__: Any) -> Never:
    raise RuntimeError("out of memory")


async def assert_all_say_out_of_memory(engine: ThreadedEngine, *calls: Awaitable[Any]) -> None:
    """The calls, made in one turn, and any later one raise the thread's own error; nobody hangs."""
    async with asyncio.timeout(60):
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert [str(error) for error in errors] == ["out of memory"] * len(calls)
        with pytest.raises(RuntimeError, match="out of memory"):
            await engine.generate(group(99, [1]))
        await engine.close()


def test_an_update_that_breaks_the_engine_reaches_everybody() -> None:
    async def main() -> None:
        engine, _ = threaded()
        engine._core.update_weights = out_of_memory  # type: ignore[method-assign]
        updates = [
            engine.update_weights({}, version=version, probe_ids=PROBE) for version in (1, 2)
        ]
        await assert_all_say_out_of_memory(
            engine, engine.generate(group(0, [1, 2])), *updates, engine.generate(group(1, [1]))
        )

    asyncio.run(main())


def test_a_submit_that_breaks_the_engine_reaches_everybody() -> None:
    async def main() -> None:
        engine, _ = threaded()
        engine._core.submit = out_of_memory  # type: ignore[method-assign]
        calls = [engine.generate(group(key, [1, 2])) for key in range(2)]
        await assert_all_say_out_of_memory(
            engine, *calls, engine.abort([0]), engine.update_weights({}, version=1, probe_ids=PROBE)
        )

    asyncio.run(main())


def test_an_abort_that_breaks_the_engine_reaches_everybody() -> None:
    async def main() -> None:
        engine, _ = threaded()
        engine._core.abort = out_of_memory  # type: ignore[method-assign]
        await assert_all_say_out_of_memory(
            engine, engine.abort([0]), engine.generate(group(0, [1, 2]))
        )

    asyncio.run(main())


def test_an_aborted_and_a_cancelled_group_leave_the_engine() -> None:
    async def main() -> Any:
        engine, clock = threaded(max_len=120)
        slowly(engine)
        tasks = [
            asyncio.create_task(engine.generate(group(key, [1, 2], siblings=2, max_tokens=100)))
            for key in range(3)
        ]
        await until(lambda: clock.state == "generate")
        await engine.abort([0, 77])
        with pytest.raises(Aborted, match="group 0"):
            await tasks[0]
        tasks[1].cancel()
        completions = await tasks[2]
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        await engine.generate(group(1, [1, 2], max_tokens=1))  # the cancelled key is free again
        await engine.close()
        return completions

    completions = asyncio.run(main())
    request = group(2, [1, 2], max_tokens=100)
    assert completions[1].token_ids.tolist() == naive_tokens(tiny_decoder(), request, 1)


def test_request_or_update_that_does_not_fit_is_the_callers_error() -> None:
    async def main() -> None:
        engine, _ = threaded(max_len=16, weight_update="drain")
        with pytest.raises(ValueError, match="max_len"):
            await engine.generate(group(0, range(16)))
        with pytest.raises(ValueError, match="do not fit the engine's model"):
            await engine.update_weights({}, version=1, probe_ids=PROBE)
        assert len(await engine.generate(group(0, [1]))) == 1
        assert engine.version == 0
        await engine.close()

    asyncio.run(main())


def test_close_fails_what_is_pending_and_ends_the_thread() -> None:
    async def main() -> None:
        engine, clock = threaded(max_len=120)
        slowly(engine)
        task = asyncio.create_task(engine.generate(group(0, [1], max_tokens=100)))
        await until(lambda: clock.state == "generate")
        await engine.close()
        await engine.close()
        with pytest.raises(RuntimeError, match="the engine is closed"):
            await task

    asyncio.run(main())
    assert not any(thread.name == "engine" for thread in threading.enumerate())


def test_what_is_asked_for_in_the_same_turn_as_a_close_fails_on_both_sides_of_it() -> None:
    async def main() -> Any:
        engine, _ = threaded(max_len=120)
        before, after = (
            engine.generate(group(0, [1], max_tokens=100)),
            engine.generate(group(1, [1])),
        )
        async with asyncio.timeout(60):
            return await asyncio.gather(
                before, engine.close(), after, engine.abort([0]), return_exceptions=True
            )

    first, closed, *others = asyncio.run(main())
    assert closed is None
    assert [str(error) for error in (first, *others)] == ["the engine is closed"] * 3


def test_idle_slots_are_without_credit_exactly_while_an_admission_is_awaited() -> None:
    now = SimpleNamespace(s=100.0)
    clock: Any = SimpleNamespace(now_s=lambda: now.s)
    meter = SlotMeter(clock, slots=256)

    def after(seconds: float) -> None:
        now.s += seconds

    after(1)  # nothing was asked for yet: 256 of tail
    meter.starving(True)
    after(2)  # all idle: 512 without credit
    meter.spent(running=0)
    after(4)  # in the midst of a decode step of 128 slots: 512 occupied, 512 without credit
    meter.starving(False)
    after(8)  # the same step: 1024 occupied, 1024 of tail
    meter.spent(running=128)
    after(16)
    meter.starving(True)
    after(32)
    meter.spent(running=0, syncing=True)  # 48 s: 12288 of sync, hungry or not
    meter.spent(running=256)
    after(1)  # full: 256 occupied, although one more group is asked for
    meter.spent(running=256)
    after(2)  # a server runs 64 of its 256 requests: 128 occupied, 384 queued
    meter.spent(running=64, queued=192)
    use = meter.slots()
    assert use == SlotUse(
        slots=256,
        elapsed_s=66,
        occupied=512 + 1024 + 256 + 128,
        queued=384,
        no_credit=512 + 512,
        tail=256 + 1024,
        sync=12288,
    )
    assert use.occupied + use.queued + use.no_credit + use.tail + use.sync == 256 * 66
    time = meter.time()
    # Of the waits for an admission only those without a running sequence count: 2 s; the next 4 s
    # and 8 s belong to the decode step of 128 slots.
    assert time == TimeUse(66, running=4 + 8 + 1 + 2, no_credit=2, tail=1, sync=48)
    after(8)
    meter.spent(running=4, queued=2, heldout=4)  # only held-out prompts run
    after(16)
    meter.spent(running=5, heldout=4)  # a training group as well
    after(32)
    meter.spent(running=0, queued=7)
    meter.dead(True)
    after(64)
    meter.spent(running=0, syncing=True)  # a restarted server loads weights
    after(128)
    meter.dead(False)
    meter.spent(running=0)
    time, slots = meter.time(), meter.slots()
    assert (time.evaluation, time.running, time.queued, time.dead) == (8, 15 + 16, 32, 192)
    assert sum(seconds_of(time)) == time.elapsed_s == 66 + 248
    assert slots.evaluation == 4 * 8 + 4 * 16
    assert slots.dead == 256 * 192
    assert sum(seconds_of(slots)) == 256 * slots.elapsed_s


def seconds_of(use: SlotUse | TimeUse) -> list[float]:
    """The parts that add up."""
    names = [item.name for item in fields(use) if item.name not in ("slots", "elapsed_s")]
    return [getattr(use, name) for name in names]


def test_slot_use_adds_up_to_the_elapsed_time_and_tells_its_reasons_apart() -> None:
    async def main() -> Any:
        engine, _ = threaded(num_slots=4, max_len=120)
        engine.starving(True)
        await asyncio.sleep(0.05)
        engine.starving(False)
        before = engine.slot_use()
        running = asyncio.create_task(engine.generate(group(0, [1], siblings=3, max_tokens=100)))
        await asyncio.sleep(0)
        await engine.update_weights(tiny_decoder(seed=2).state_dict(), version=1, probe_ids=PROBE)
        await running
        after = engine.slot_use()
        await engine.close()
        return before, after

    before, after = asyncio.run(main())
    assert before.occupied == before.sync == 0
    assert before.no_credit >= 4 * 0.05
    assert after.occupied > 0
    assert after.tail - before.tail >= after.occupied / 3 * (
        1 - 1e-6
    )  # three of four slots, always together
    assert after.sync > 0
    assert after.no_credit == before.no_credit
    for use in (before, after):
        assert use.queued == 0
        assert use.occupied + use.no_credit + use.tail + use.sync == pytest.approx(
            4 * use.elapsed_s, rel=1e-6
        )


def test_the_package_imports_without_ray_and_other_heavy_libraries() -> None:
    heavy = ("ray", "sglang", "mlflow", "omegaconf", "transformers")
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy})); import dapo_async.rollout"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
