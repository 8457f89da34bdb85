"""What the client makes of refusals and connections of an SGLang server.

A server answers 400 to a wrong request, and also when it is broken itself. The first ends the run,
the second only costs a restart of the engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dapo_async.rollout import EngineFault
from dapo_async.rollout.sglang.client import CallRefused, SGLangClient

TOO_LONG = "The input (9 tokens) is longer than the model's context length (8 tokens)."
# What servers were seen to answer after the limit of their memory was reached.
NO_BUFFER = (
    "1 validation error:\n {'type': 'json_invalid', 'loc': ('body', 0), 'msg': 'JSON decode error',"
    " 'input': {}, 'ctx': {'error': 'Not enough memory to allocate buffer for parsing'}}"
)
BROKEN = [NO_BUFFER, "CUDA out of memory.", "std::bad_alloc", "DefaultCPUAllocator: can't allocate"]


def fault_of(
    call: Callable[[SGLangClient], Awaitable[None]],
    message: str,
    *,
    status: int,
    in_stream: bool = False,
) -> Exception:
    """What the client raises when a server answers every call with this error."""

    async def answer(request: web.Request) -> web.Response:
        if not in_stream:
            return web.json_response({"object": "error", "message": message}, status=status)
        event = json.dumps({"error": {"message": message, "code": status}})
        return web.Response(text=f"data: {event}\n\n", content_type="text/event-stream")

    async def ask() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        async with TestServer(app) as server:
            client = SGLangClient(str(server.make_url("")).rstrip("/"), api_key="")
            try:
                await call(client)
            finally:
                await client.close()

    with pytest.raises(Exception) as raised:
        asyncio.run(ask())
    return raised.value


async def stream(client: SGLangClient) -> None:
    async for _ in client.stream({"input_ids": [1]}):
        pass


async def pause(client: SGLangClient) -> None:
    await client.pause("retract")


@pytest.mark.parametrize("in_stream", [False, True])
@pytest.mark.parametrize("message", BROKEN)
def test_server_that_lacks_memory_is_lost_and_does_not_end_the_run(
    message: str, in_stream: bool
) -> None:
    fault = fault_of(stream, message, status=400, in_stream=in_stream)
    assert isinstance(fault, EngineFault), fault
    assert not isinstance(fault, CallRefused)


@pytest.mark.parametrize("in_stream", [False, True])
def test_request_that_the_server_finds_wrong_is_the_callers_error(in_stream: bool) -> None:
    fault = fault_of(stream, TOO_LONG, status=400, in_stream=in_stream)
    assert type(fault) is ValueError
    assert "longer than the model's context length" in str(fault)


@pytest.mark.parametrize(
    ("message", "status", "kind"),
    [
        ("no update was begun", 400, CallRefused),
        (NO_BUFFER, 400, EngineFault),
        ("no update was begun", 500, EngineFault),
    ],
)
def test_call_is_refused_by_a_server_that_works_only(
    message: str, status: int, kind: type[Exception]
) -> None:
    assert type(fault_of(pause, message, status=status)) is kind


def test_no_request_is_sent_on_a_connection_that_the_server_may_be_closing() -> None:
    told: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        told.append(request.headers["Connection"])
        return web.Response(text="ok")

    async def ask() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        async with TestServer(app) as server:
            client = SGLangClient(str(server.make_url("")).rstrip("/"), api_key="")
            try:
                await client.abort(["one"])
                await client.abort(["two"])
            finally:
                await client.close()

    asyncio.run(ask())
    assert told == ["close", "close"]


def test_a_sleeping_server_is_not_missed_and_a_silent_one_is() -> None:
    """The limit on silence begins anew when the server wakes."""
    calls: list[str] = []
    silence_s = 0.3

    async def answer(request: web.Request) -> web.StreamResponse:
        calls.append(request.path)
        if request.path != "/generate":
            return web.Response(text="ok")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(30)
        return response

    async def ask() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        async with TestServer(app) as server:
            url = str(server.make_url("")).rstrip("/")
            client = SGLangClient(url, api_key="", silence_s=silence_s)
            try:
                streaming = asyncio.create_task(stream(client))
                await asyncio.sleep(silence_s / 3)
                await client.release_memory()
                await asyncio.sleep(2 * silence_s)
                assert not streaming.done()
                await client.resume_memory()
                with pytest.raises(EngineFault, match=r"sent no token for 0\.3 s"):
                    await asyncio.wait_for(streaming, 10 * silence_s)
            finally:
                await client.close()

    asyncio.run(ask())
    assert calls == ["/generate", "/release_memory_occupation", "/resume_memory_occupation"]
