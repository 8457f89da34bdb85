"""Wrong answers of a server are faults that say what is wrong.

A proxy in front of the real server makes the answers wrong. No such response is returned.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Never

import numpy as np
import pytest
from sglang_proxy import BREAK_OFF, GARBAGE, STALL, Tamper, proxy
from sglang_world import (
    NUM_SLOTS,
    PROBE,
    World,
    forward_logprobs,
    from_disk,
    make_engine,
    request,
)
from tracking_world import free_port

from dapo_async.rollout import Aborted, EngineFault, GroupRequest, SlotUse
from dapo_async.types import Completion, FinishReason

pytestmark = pytest.mark.sglang
on_one_family = pytest.mark.parametrize("world", ["qwen3"], indirect=True)
PROMPT = (7, 11, 13, 17, 19, 23)
LONG = 200


def later(change: Callable[[Any], Any]) -> Tamper:
    """Changes all events of each response except the first."""
    seen = set()

    def tamper(path: str, event: Any) -> Any:
        if path != "/generate" or "output_ids" not in event:
            return event
        name = event["meta_info"]["id"]
        if name not in seen:
            seen.add(name)
            return event
        return change(copy.deepcopy(event))

    return tamper


def logprob_missing(event: Any) -> Any:
    event["meta_info"]["output_token_logprobs"][-1][0] = None
    return event


def logprobs_missing(event: Any) -> Any:
    del event["meta_info"]["output_token_logprobs"]
    return event


def attested_by_another_run(event: Any) -> Any:
    for span in event["meta_info"].get("weight_versions", ()):
        span["version"] = "another:0"
    return event


def serving_another_run(event: Any) -> Any:
    event["meta_info"]["weight_version"] = "another:0"
    return event


def last_version_missing(event: Any) -> Any:
    for span in event["meta_info"].get("weight_versions", ()):
        span["end"] -= 1
    return event


FAULTS = {
    "nan": (later(logprob_missing), "without a finite logprob for each"),
    "no logprobs": (later(logprobs_missing), "without a finite logprob for each"),
    "foreign version": (later(attested_by_another_run), "attests .*another:0.*; this run is test"),
    "foreign weights": (
        later(serving_another_run),
        "serves another:0 during a response; this run is test",
    ),
    "version missing": (later(last_version_missing), "attests versions for 39 of 40 tokens"),
    "broken off": (later(lambda event: BREAK_OFF), "broke off /generate"),
    "silent": (later(lambda event: STALL), r"sent no token for 1 s \(deadlines.answer_s\)"),
    "garbage": (later(lambda event: GARBAGE), "sent a malformed event"),
}


@on_one_family
@pytest.mark.parametrize("fault", FAULTS)
def test_stream_fault_names_its_reason_and_the_engine_accepts_another_server(
    world: World, fault: str
) -> None:
    tamper, line = FAULTS[fault]

    async def generate() -> tuple[tuple[Completion, ...], SlotUse]:
        async with world.engine() as prepared, proxy(world.server.url, tamper) as url:
            engine = make_engine(world.client(url, silence_s=1.0))
            with pytest.raises(EngineFault, match=line) as raised:
                await engine.generate(request(1, PROMPT, siblings=4))
            assert url in str(raised.value)
            wrong_weights = "version" in fault or "weights" in fault
            assert bool(raised.value.partial_completions) == (not wrong_weights)
            right = world.client()
            await engine.reconnect(right)
            assert (engine.version, prepared.version) == (-1, 0)
            await engine.update(from_disk(right, world.folder), version=3, probe_ids=PROBE)
            completions = await engine.generate(request(1, PROMPT, siblings=4))
            await engine.close()
            return completions, engine.slot_use()

    completions, use = asyncio.run(generate())
    versions = np.concatenate([completion.weight_versions for completion in completions])
    assert set(versions.tolist()) == {3}
    slot_seconds = use.occupied + use.queued + use.no_credit + use.tail + use.sync
    assert slot_seconds == pytest.approx(NUM_SLOTS * use.elapsed_s)


async def lose_and_continue(
    world: World, tamper: Tamper, asked: GroupRequest
) -> tuple[tuple[Completion | None, ...], tuple[Completion, ...]]:
    """Loses the server of a first engine; a second engine continues from the partial completions.

    Returns the partial completions and the completions.
    """
    async with world.engine() as second, proxy(world.server.url, tamper) as url:
        first = make_engine(world.client(url))
        with pytest.raises(EngineFault) as fault:
            await first.generate(asked)
        await first.close()
        partials = fault.value.partial_completions
        return partials, await second.generate(replace(asked, partial_completions=partials))


@on_one_family
def test_response_continues_elsewhere_where_the_lost_server_stopped(world: World) -> None:
    counts: Counter[int] = Counter()

    def tamper(path: str, event: Any) -> Any:
        if path != "/generate" or "output_ids" not in event:
            return event
        sibling = int(event["meta_info"]["id"].split(".")[3])
        counts[sibling] += 1
        return BREAK_OFF if sibling == 3 and counts[sibling] == 4 else event

    asked = request(1, PROMPT, siblings=4, max_tokens=LONG)
    partials, completions = asyncio.run(lose_and_continue(world, tamper, asked))
    assert partials[3] is not None
    assert len(partials[3].token_ids) == 1 + 2 * 8
    for partial, completion in zip(partials, completions, strict=True):
        assert partial is not None
        assert partial.finish_reason is FinishReason.ABORT
        length = len(partial.token_ids)
        assert 0 < length < LONG
        assert completion.token_ids[:length].tolist() == partial.token_ids.tolist()
        received = partial.behaviour_logprobs.tolist()
        assert completion.behaviour_logprobs[:length].tolist() == received
        assert (len(completion.token_ids), completion.finish_reason) == (LONG, FinishReason.LENGTH)
        assert completion.weight_versions.tolist() == [0] * LONG
        expected = forward_logprobs(world.base, PROMPT, completion.token_ids)
        np.testing.assert_allclose(completion.behaviour_logprobs, expected, atol=1e-4, rtol=0)


@on_one_family
def test_complete_sibling_is_not_generated_again(world: World) -> None:
    async def generate() -> tuple[tuple[Completion, ...], tuple[Completion, ...]]:
        async with world.engine() as engine:
            before = await engine.generate(request(1, PROMPT, siblings=2))
            asked = request(2, PROMPT, siblings=2)
            partials = (before[0], None)
            return before, await engine.generate(replace(asked, partial_completions=partials))

    (first, second), (kept, generated) = asyncio.run(generate())
    assert kept is first
    assert generated.token_ids.tolist() != second.token_ids.tolist()


@on_one_family
def test_response_that_ended_before_its_server_was_lost_is_complete(world: World) -> None:
    def tamper(path: str, event: Any) -> Any:
        return BREAK_OFF if event == "[DONE]" else event

    asked = request(1, PROMPT, max_tokens=5)
    (partial,), (completion,) = asyncio.run(lose_and_continue(world, tamper, asked))
    assert partial is not None
    assert partial.finish_reason is FinishReason.LENGTH
    assert completion is partial


@on_one_family
def test_engine_lost_while_requests_wait_for_an_update_can_reconnect(world: World) -> None:
    """With `drain` nothing is sent during an update: waiting requests have no connection."""
    asked = request(1, PROMPT, siblings=NUM_SLOTS + 4, max_tokens=LONG)

    async def fail(weight_version: str, flush: bool) -> Never:
        raise EngineFault("killed")

    async def generate() -> tuple[tuple[Completion | None, ...], tuple[Completion, ...]]:
        async with world.engine("drain") as engine:
            running = asyncio.create_task(engine.generate(asked))
            await asyncio.sleep(0.1)
            with pytest.raises(EngineFault, match="killed"):
                await engine.update(fail, version=1, probe_ids=PROBE)
            right = world.client()
            async with asyncio.timeout(10):
                await engine.reconnect(right)
            with pytest.raises(EngineFault, match="was lost before a request was sent") as fault:
                await running
            await engine.update(from_disk(right, world.folder), version=2, probe_ids=PROBE)
            partials = fault.value.partial_completions
            return partials, await engine.generate(replace(asked, partial_completions=partials))

    partials, completions = asyncio.run(generate())
    assert [partial is None for partial in partials] == [False] * NUM_SLOTS + [True] * 4
    assert all(len(completion.token_ids) == LONG for completion in completions)


@on_one_family
def test_calls_of_a_closed_client_raise_faults_only(world: World) -> None:
    async def ask() -> None:
        async with world.engine() as engine:
            running = asyncio.create_task(engine.generate(request(1, PROMPT, max_tokens=LONG)))
            await asyncio.sleep(0.1)
            await engine._client.close()
            await engine.abort([1])
            with pytest.raises((EngineFault, Aborted)):
                await running
            with pytest.raises(EngineFault, match="is not connected any more"):
                await engine._client.weight_version()

    asyncio.run(ask())


@on_one_family
def test_missing_or_failing_server_is_a_fault_of_every_call(world: World) -> None:
    async def ask(url: str) -> list[str]:
        client = world.client(url, silence_s=5.0)
        engine = make_engine(client)
        calls: list[Coroutine[Any, Any, object]] = [
            engine.generate(request(1, PROMPT, siblings=2)),
            engine.update(from_disk(client, world.folder), version=1, probe_ids=PROBE),
            client.weight_version(),
        ]
        lines = []
        for call in calls:
            with pytest.raises(EngineFault) as raised:
                await call
            lines.append(str(raised.value))
        assert not await client.healthy()
        await engine.close()
        return lines

    async def ask_both() -> tuple[list[str], list[str]]:
        missing = await ask(f"http://127.0.0.1:{free_port()}")
        async with proxy(world.server.url, lambda path, answer: 500) as url:
            return missing, await ask(url)

    missing, failing = asyncio.run(ask_both())
    assert "broke off /generate" in missing[0]
    assert all("failed to answer" in line for line in missing[1:])
    assert "answers /generate with 500" in failing[1]
    assert "answers /model_info with 500" in failing[2]


@on_one_family
def test_engine_reports_the_version_that_the_server_names(world: World) -> None:
    """The publisher compares it: see tests/unit/weights/test_weights.py."""

    def tamper(path: str, answer: Any) -> Any:
        return {**answer, "weight_version": "test:4"} if path == "/model_info" else answer

    async def update() -> tuple[str, int]:
        async with proxy(world.server.url, tamper) as url:
            client = world.client(url)
            engine = make_engine(client)
            load = from_disk(client, world.folder)
            incarnation, report = await engine.update(load, version=5, probe_ids=PROBE)
            await engine.close()
            return incarnation, report.version

    assert asyncio.run(update()) == ("test", 4)


@on_one_family
def test_server_of_a_run_that_ended_during_an_update_can_be_used_again(world: World) -> None:
    async def leave_and_come_back() -> tuple[Completion, ...]:
        async with world.engine() as engine:
            client = engine._client
            await client.pause("retract")
            await client._ask("POST", "/begin_weight_update", {})
            await client.clear(["a group that it was never in"])
            await engine.update(from_disk(client, world.folder), version=1, probe_ids=PROBE)
            return await engine.generate(request(1, PROMPT))

    assert len(asyncio.run(leave_and_come_back())) == 1
