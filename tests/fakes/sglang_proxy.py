"""An HTTP proxy in front of a real SGLang server that changes answers as a test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
from aiohttp import web

Tamper = Callable[[str, Any], Any]
"""`(path, JSON of an answer or of one event of a stream) → what the proxy passes on`.

Instead of JSON it may return BREAK_OFF, STALL or GARBAGE for an event, or an HTTP status for an
answer.
"""
BREAK_OFF, STALL, GARBAGE = object(), object(), object()
STALL_S = 30.0


@asynccontextmanager
async def proxy(url: str, tamper: Tamper) -> AsyncIterator[str]:
    """Yields the URL of a proxy for the server at `url`."""
    async with aiohttp.ClientSession() as session:

        async def handle(request: web.Request) -> web.StreamResponse:
            headers = {
                "Authorization": request.headers["Authorization"],
                "Content-Type": "application/json",
            }
            target, body = f"{url}{request.path_qs}", await request.read()
            async with session.request(
                request.method, target, headers=headers, data=body
            ) as answer:
                if answer.content_type == "text/event-stream":
                    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                    with suppress(ConnectionResetError):  # the client has left
                        await _pass_on_events(request, response, answer.content, tamper)
                    return response
                content = json.loads(await answer.read() or b"null")
                changed = tamper(request.path, content)
                if isinstance(changed, int):
                    return web.Response(status=changed)
                return web.json_response(changed, status=answer.status)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


async def _pass_on_events(
    request: web.Request,
    response: web.StreamResponse,
    lines: aiohttp.StreamReader,
    tamper: Tamper,
) -> None:
    await response.prepare(request)
    async for line in lines:
        data = line.removeprefix(b"data: ").strip()
        if not data:
            await response.write(line)
            continue
        event = "[DONE]" if data == b"[DONE]" else json.loads(data)
        changed = tamper(request.path, event)
        if changed == "[DONE]":
            await response.write(line)
        elif changed is BREAK_OFF:
            assert request.transport is not None
            request.transport.close()
            return
        elif changed is GARBAGE:
            await response.write(b"data: {]\n")
        elif changed is STALL:
            await asyncio.sleep(STALL_S)
        else:
            await response.write(b"data: " + json.dumps(changed).encode() + b"\n")
