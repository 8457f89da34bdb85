"""What an engine says about its KV memory, prefix cache and queue, and what adapts to it."""

from __future__ import annotations

import asyncio
import re
import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from native_engine_world import tiny_engine

from dapo_async.rollout import EngineFault, GroupRequest, SamplingParams
from dapo_async.rollout.kv_meter import KVMeter
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.rollout.sglang import engine as sglang_engine
from dapo_async.rollout.sglang.client import (
    ServerLimits,
    ServerLoad,
    SGLangClient,
)
from dapo_async.rollout.sglang.engine import SGLangEngine
from dapo_async.rollout.sglang.stream import ResponseStream
from dapo_async.rollout.slot_control import SlotControl
from dapo_async.rollout.slot_meter import SLOT_STATES, SlotMeter
from dapo_async.utils.state_clock import StateClock

RANK = {
    "num_running_reqs": 15, "num_waiting_reqs": 49, "num_used_tokens": 900,
    "max_total_num_tokens": 1000,
}  # fmt: skip


def test_kv_use_is_the_mean_over_time() -> None:
    now = SimpleNamespace(s=0.0)
    meter = KVMeter(cast(Any, SimpleNamespace(now_s=lambda: now.s)))
    for used, seconds in ((0, 2.0), (50, 3.0), (100, 5.0)):
        meter.holds(used, capacity_tokens=100)
        now.s += seconds
    meter.read_prompt(10, cached=9)
    meter.retract(2)
    use = meter.use()
    assert (use.elapsed_s, use.full_s, use.retractions) == (10.0, 6.5, 2)
    assert (use.input_tokens, use.cached_tokens) == (10, 9)


def test_native_engine_tells_its_memory_and_its_shared_prompts() -> None:
    async def main() -> None:
        engine = ThreadedEngine(tiny_engine(num_slots=4, max_len=64), StateClock("engine"))
        sampling = SamplingParams(max_tokens=30, temperature=1.0, stop_token_ids=(), seed=0)
        prompt = np.arange(3, 13, dtype=np.int32)
        await engine.generate(GroupRequest(0, prompt, 4, sampling))
        use = engine.kv_use()
        await engine.close()
        assert (use.input_tokens, use.cached_tokens, use.retractions) == (40, 30, 0)
        assert 0 < use.full_s < use.elapsed_s

    asyncio.run(main())


def test_slot_seconds_follow_a_number_of_slots_that_changes() -> None:
    now = SimpleNamespace(s=0.0)
    meter = SlotMeter(cast(Any, SimpleNamespace(now_s=lambda: now.s)), slots=8)
    for slots, running, queued in ((8, 6, 0), (4, 5, 1), (10, 4, 0)):
        meter.resize(slots)
        meter.spent(running=running, queued=queued)
        now.s += 10.0
        meter.spent(running=running, queued=queued)
    use = meter.slots()
    # In the second part two requests more than slots are still at the server.
    assert sum(getattr(use, state) for state in SLOT_STATES) == 10 * (8 + 6 + 10)
    assert (use.occupied, use.queued, use.tail) == (150, 10, 20 + 0 + 60)
    assert sum(getattr(meter.time(), state) for state in ("running", "tail")) == 30.0


def asked(routes: dict[str, Any], *calls: str) -> list[Any]:
    """The client's answers if a server answers so; other paths give 404."""

    async def answer(request: web.Request) -> web.Response:
        if request.path not in routes:
            return web.json_response({"detail": "Not Found"}, status=404)
        content = routes[request.path]
        if isinstance(content, str):
            return web.Response(text=content)
        return web.json_response(content)

    async def main() -> list[Any]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        async with TestServer(app) as server:
            client = SGLangClient(str(server.make_url("")).rstrip("/"), api_key="")
            try:
                return [await getattr(client, call)() for call in calls]
            finally:
                await client.close()

    return asyncio.run(main())


def test_client_reads_load_and_limits() -> None:
    info = {
        "max_total_num_tokens": 2000,
        "internal_states": [{"effective_max_running_requests_per_dp": 65}],
    }
    routes = {
        "/v1/loads": {"loads": [RANK, {**RANK, "num_waiting_reqs": 1}]},
        "/server_info": info,
    }
    load, limits = asked(routes, "load", "limits")
    assert load == ServerLoad(running=30, queued=50, used_tokens=1800, capacity_tokens=2000)
    assert limits == ServerLimits(2000, 65)


@pytest.mark.parametrize(
    ("told", "exact"),
    [
        ({"enable_fp32_lm_head": False, "dtype": "bfloat16"}, False),
        ({"enable_fp32_lm_head": True, "dtype": "bfloat16"}, True),
        ({"enable_fp32_lm_head": False, "dtype": "float32"}, True),
        ({}, True),
    ],
)
def test_client_reads_whether_logits_are_summed_in_float32(
    told: dict[str, Any], exact: bool
) -> None:
    info = {
        **told,
        "max_total_num_tokens": 2000,
        "internal_states": [{"effective_max_running_requests_per_dp": 65}],
    }
    (limits,) = asked({"/server_info": info}, "limits")
    assert limits == ServerLimits(2000, 65, exact)


@pytest.mark.parametrize("call", ["load", "limits"])
def test_answers_without_the_numbers_are_faults(call: str) -> None:
    routes = {"/v1/loads": {"loads": [{}]}, "/server_info": {"internal_states": []}}
    with pytest.raises(EngineFault, match=r"malformed load|does not tell its capacity"):
        asked(routes, call)


def test_retractions_are_those_for_memory_and_not_those_of_pauses() -> None:
    response = ResponseStream("name", 4, 0)
    assert response.retracted(0) == 0
    assert response.retracted(2) == 2
    response.pauses += 1
    assert response.retracted(2) == 0, "a chunk from before the pause"
    assert response.retracted(3) == 0, "it ran when the server was paused"
    response.pauses += 1
    assert response.retracted(5) == 1
    response.pauses += 1
    assert response.retracted(5) == 0, "it was queued when the server was paused"


class StarvedServer:
    """Runs 16 requests at a time; the others queue. A response ends when the test says so."""

    url = "http://server"

    def __init__(self) -> None:
        self.requests: list[asyncio.Event] = []

    async def load(self) -> ServerLoad:
        count = len(self.requests)
        return ServerLoad(min(16, count), max(0, count - 16), 950, 1000)

    async def stream(self, body: Any) -> Any:
        end = asyncio.Event()
        self.requests.append(end)
        try:
            await end.wait()
            raise EngineFault("the test ends")
            yield
        finally:
            self.requests.remove(end)

    async def abort(self, request_ids: Any) -> None:
        return None

    async def close(self) -> None:
        return None


@pytest.mark.parametrize("adapts", [False, True])
def test_a_server_without_memory_gets_fewer_requests_with_auto(
    adapts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_engine, "LOAD_EVERY_S", 0.005)

    async def main() -> None:
        server = StarvedServer()
        engine = SGLangEngine(
            cast(SGLangClient, server),
            StateClock("engine"),
            num_slots=64,
            weight_update="recompute",
            incarnation="run",
            control=SlotControl(start=64, least=8, most=64) if adapts else None,
        )
        sampling = SamplingParams(max_tokens=9, temperature=1.0, stop_token_ids=(), seed=0)
        group = asyncio.create_task(
            engine.generate(GroupRequest(0, np.arange(4, dtype=np.int32), 80, sampling))
        )
        async with asyncio.timeout(20):
            use = engine.slot_use()
            while use.queued <= use.occupied or (adapts and engine.num_slots != 32):
                await asyncio.sleep(0.01)
                use = engine.slot_use()
        assert engine.num_slots == (32 if adapts else 64)
        assert len(server.requests) == 64
        kv = engine.kv_use()
        assert 0 < kv.full_s < 0.95 * kv.elapsed_s
        group.cancel()
        await asyncio.gather(group, return_exceptions=True)
        await engine.close()

    asyncio.run(main())


def test_a_step_of_the_engine_that_does_not_end_is_named_by_its_line() -> None:
    core, may_end, steps = tiny_engine(num_slots=4, max_len=64), threading.Event(), 0
    step = core.step

    def stuck() -> Any:
        nonlocal steps
        steps += 1
        may_end.wait(60.0)
        return step()

    core.step = stuck  # type: ignore[method-assign]

    async def main() -> None:
        engine = ThreadedEngine(core, StateClock("engine"))
        assert [engine.long_turn(), engine.long_turn()] == [None, None], "it has nothing to do"
        sampling = SamplingParams(max_tokens=5, temperature=1.0, stop_token_ids=(), seed=0)
        prompt = np.arange(3, 13, dtype=np.int32)
        answer = asyncio.create_task(engine.generate(GroupRequest(0, prompt, 1, sampling)))
        while not steps:
            await asyncio.sleep(0.01)
        engine.long_turn()
        line = engine.long_turn()
        assert line is not None
        assert re.fullmatch(r"rollout/native/thread\.py:\d+ _serve > wait", line), line
        may_end.set()
        await answer
        assert engine.long_turn() is None, "it goes on"
        await engine.close()

    asyncio.run(main())
