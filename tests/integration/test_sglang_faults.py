"""What is wrong with a server's answers is a fault that says so, in front of the real server; nothing of such a response is returned."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from dataclasses import replace
from typing import Never

import numpy as np
import pytest
from sglang_proxy import BREAK_OFF, GARBAGE, STALL, proxy
from sglang_world import NUM_SLOTS, PROBE, World, forward_logprobs, from_disk, request

from dapo_async.rollout import Aborted, EngineFault
from dapo_async.rollout.sglang.client import SGLangClient
from dapo_async.rollout.sglang.engine import SGLangEngine
from dapo_async.rollout.sglang.server import free_port
from dapo_async.types import FinishReason
from dapo_async.utils.state_clock import StateClock

pytestmark = pytest.mark.sglang
on_one_family = pytest.mark.parametrize("world", ["qwen3"], indirect=True)
PROMPT = (7, 11, 13, 17, 19, 23)
LONG = 200


def later(change):
    """Changes the second event of each response and those after it; the first one passes."""
    seen = set()

    def tamper(path, told):
        if path != "/generate" or "output_ids" not in told:
            return told
        name = told["meta_info"]["id"]
        if name not in seen:
            seen.add(name)
            return told
        return change(copy.deepcopy(told))

    return tamper


def without_a_number(told):
    told["meta_info"]["output_token_logprobs"][-1][0] = None
    return told


def without_logprobs(told):
    del told["meta_info"]["output_token_logprobs"]
    return told


def of_another_run(told):
    for span in told["meta_info"].get("weight_versions", ()):
        span["version"] = "another:0"
    return told


def under_foreign_weights(told):
    told["meta_info"]["weight_version"] = "another:0"
    return told


def of_no_version_at_the_end(told):
    for span in told["meta_info"].get("weight_versions", ()):
        span["end"] -= 1
    return told


FAULTS = {
    "nan": (later(without_a_number), "without a finite logprob for each"),
    "no logprobs": (later(without_logprobs), "without a finite logprob for each"),
    "foreign version": (later(of_another_run), "attests .*another:0.*; this run is test"),
    "foreign weights": (
        later(under_foreign_weights),
        "serves another:0 in the midst of a response; this run is test",
    ),
    "version missing": (later(of_no_version_at_the_end), "attests versions for 39 of 40 tokens"),
    "broken off": (later(lambda told: BREAK_OFF), "broke off generate"),
    "silent": (
        later(lambda told: STALL),
        r"sent nothing for 1 s while it generated \(deadlines.answer_s\)",
    ),
    "garbage": (later(lambda told: GARBAGE), "sent something else than a piece of a response"),
}


@on_one_family
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_stream_is_told_and_the_engine_goes_on_with_another_server(
    world: World, fault: str
) -> None:
    tamper, line = FAULTS[fault]

    async def generate():
        async with world.engine() as prepared, proxy(world.server.url, tamper) as url:
            client = SGLangClient(url, api_key=world.server.api_key, silence_s=1.0)
            engine = SGLangEngine(
                client,
                StateClock("test"),
                num_slots=NUM_SLOTS,
                weight_update="recompute",
                incarnation="test",
            )
            with pytest.raises(EngineFault, match=line) as told:
                await engine.generate(request(1, PROMPT, siblings=4))
            assert url in str(told.value)
            assert bool(told.value.partial_completions) == (
                "version" not in fault and "weights" not in fault
            )  # of wrong weights nothing is handed on
            right = SGLangClient(world.server.url, api_key=world.server.api_key)
            await engine.reconnect(right)
            assert (engine.version, prepared.version) == (-1, 0)
            await engine.update(from_disk(right, world.folder), version=3, probe_ids=PROBE)
            completions = await engine.generate(request(1, PROMPT, siblings=4))
            await engine.close()
            return completions, engine.slot_use()

    completions, use = asyncio.run(generate())
    assert {
        version for completion in completions for version in completion.weight_versions.tolist()
    } == {3}
    assert use.occupied + use.no_credit + use.tail + use.sync == pytest.approx(
        NUM_SLOTS * use.elapsed_s
    )


@on_one_family
def test_response_goes_on_elsewhere_from_where_the_lost_server_had_told_of_it(world: World) -> None:
    counts = Counter()

    def tamper(path, told):
        if path != "/generate" or "output_ids" not in told:
            return told
        number = int(told["meta_info"]["id"].split(".")[3])
        counts[number] += 1
        return BREAK_OFF if number == 3 and counts[number] == 4 else told

    async def generate():
        async with world.engine() as engine, proxy(world.server.url, tamper) as url:
            client = SGLangClient(url, api_key=world.server.api_key)
            lossy = SGLangEngine(
                client,
                StateClock("test"),
                num_slots=NUM_SLOTS,
                weight_update="recompute",
                incarnation="test",
            )
            with pytest.raises(EngineFault) as fault:
                await lossy.generate(request(1, PROMPT, siblings=4, max_tokens=LONG))
            await lossy.close()
            whole = request(1, PROMPT, siblings=4, max_tokens=LONG)
            return fault.value.partial_completions, await engine.generate(
                replace(whole, partial_completions=fault.value.partial_completions)
            )

    partials, completions = asyncio.run(generate())
    assert [partial.finish_reason for partial in partials if partial is not None] == [
        FinishReason.ABORT
    ] * 4
    assert len(partials[3].token_ids) == 1 + 2 * 8
    for partial, completion in zip(partials, completions, strict=True):
        length = len(partial.token_ids)
        assert 0 < length < LONG
        assert completion.token_ids[:length].tolist() == partial.token_ids.tolist()
        assert (
            completion.behaviour_logprobs[:length].tolist() == partial.behaviour_logprobs.tolist()
        )
        assert (len(completion.token_ids), completion.finish_reason) == (LONG, FinishReason.LENGTH)
        assert completion.weight_versions.tolist() == [0] * LONG
        np.testing.assert_allclose(
            completion.behaviour_logprobs,
            forward_logprobs(world.base, PROMPT, completion.token_ids),
            atol=1e-4,
            rtol=0,
        )


@on_one_family
def test_sibling_that_was_whole_is_not_generated_again(world: World) -> None:
    async def generate():
        async with world.engine() as engine:
            first, second = await engine.generate(request(1, PROMPT, siblings=2))
            return (
                first,
                await engine.generate(
                    replace(request(2, PROMPT, siblings=2), partial_completions=(first, None))
                ),
                second,
            )

    first, (kept, anew), second = asyncio.run(generate())
    assert kept is first
    assert anew.token_ids.tolist() != second.token_ids.tolist()


@on_one_family
def test_response_that_had_ended_when_its_server_was_lost_is_whole(world: World) -> None:
    async def generate():
        async with (
            world.engine() as engine,
            proxy(
                world.server.url, lambda path, told: BREAK_OFF if told == "[DONE]" else told
            ) as url,
        ):
            client = SGLangClient(url, api_key=world.server.api_key)
            lossy = SGLangEngine(
                client,
                StateClock("test"),
                num_slots=NUM_SLOTS,
                weight_update="recompute",
                incarnation="test",
            )
            with pytest.raises(EngineFault) as fault:
                await lossy.generate(request(1, PROMPT, max_tokens=5))
            await lossy.close()
            return fault.value.partial_completions, await engine.generate(
                replace(
                    request(1, PROMPT, max_tokens=5),
                    partial_completions=fault.value.partial_completions,
                )
            )

    (partial,), (completion,) = asyncio.run(generate())
    assert partial.finish_reason is FinishReason.LENGTH
    assert completion is partial


@on_one_family
def test_engine_that_is_lost_while_responses_wait_for_an_update_can_be_mended(world: World) -> None:
    """In `drain` nothing is sent meanwhile: what waits has no connection that could break."""

    async def generate():
        async with world.engine("drain") as engine:

            async def fail(weight_version, flush) -> Never:
                raise EngineFault("killed")

            running = asyncio.create_task(
                engine.generate(request(1, PROMPT, siblings=NUM_SLOTS + 4, max_tokens=LONG))
            )
            await asyncio.sleep(0.1)
            with pytest.raises(EngineFault, match="killed"):
                await engine.update(fail, version=1, probe_ids=PROBE)
            right = SGLangClient(world.server.url, api_key=world.server.api_key)
            async with asyncio.timeout(10):
                await engine.reconnect(right)
            with pytest.raises(
                EngineFault, match="was lost before a response could be sent there"
            ) as fault:
                await running
            await engine.update(from_disk(right, world.folder), version=2, probe_ids=PROBE)
            again = replace(
                request(1, PROMPT, siblings=NUM_SLOTS + 4, max_tokens=LONG),
                partial_completions=fault.value.partial_completions,
            )
            return fault.value.partial_completions, await engine.generate(again)

    partials, completions = asyncio.run(generate())
    assert [partial is None for partial in partials] == [False] * NUM_SLOTS + [True] * 4
    assert all(len(completion.token_ids) == LONG for completion in completions)


@on_one_family
def test_closed_client_and_abort_on_a_server_that_is_gone_raise_nothing_else_than_a_fault(
    world: World,
) -> None:
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
def test_server_that_is_not_there_or_fails_is_a_fault_of_every_call(world: World) -> None:
    async def ask(url: str) -> list[str]:
        client = SGLangClient(url, api_key=world.server.api_key, silence_s=5.0)
        engine = SGLangEngine(
            client,
            StateClock("test"),
            num_slots=NUM_SLOTS,
            weight_update="recompute",
            incarnation="test",
        )
        lines = []
        for call in (
            engine.generate(request(1, PROMPT, siblings=2)),
            engine.update(from_disk(client, world.folder), version=1, probe_ids=PROBE),
            client.weight_version(),
        ):
            with pytest.raises(EngineFault) as told:
                await call
            lines.append(str(told.value))
        assert not await client.healthy()
        await engine.close()
        return lines

    async def both():
        gone = await ask(f"http://127.0.0.1:{free_port('127.0.0.1')}")
        async with proxy(world.server.url, lambda path, told: 500) as url:
            return gone, await ask(url)

    gone, failing = asyncio.run(both())
    assert "broke off generate" in gone[0]
    assert all("can't be asked" in line for line in gone[1:])
    assert "answers /generate with 500" in failing[1]
    assert "answers /model_info with 500" in failing[2]


@on_one_family
def test_version_that_the_server_names_is_told_as_it_is(world: World) -> None:
    """The publisher judges it: see tests/test_weights.py for what a wrong one leads to."""

    def tamper(path, told):
        return {**told, "weight_version": "test:4"} if path == "/model_info" else told

    async def update():
        async with proxy(world.server.url, tamper) as url:
            client = SGLangClient(url, api_key=world.server.api_key)
            engine = SGLangEngine(
                client,
                StateClock("test"),
                num_slots=NUM_SLOTS,
                weight_update="recompute",
                incarnation="test",
            )
            incarnation, report = await engine.update(
                from_disk(client, world.folder), version=5, probe_ids=PROBE
            )
            await engine.close()
            return incarnation, report.version

    assert asyncio.run(update()) == ("test", 4)


@on_one_family
def test_server_that_a_run_left_in_the_midst_of_an_update_can_be_used_again(world: World) -> None:
    async def leave_and_come_back():
        async with world.engine() as engine:
            client = engine._client
            await client.pause("retract")
            await client._ask("POST", "/begin_weight_update", {})
            await client.clear("a group that it was never in")
            await engine.update(from_disk(client, world.folder), version=1, probe_ids=PROBE)
            return await engine.generate(request(1, PROMPT))

    assert len(asyncio.run(leave_and_come_back())) == 1
