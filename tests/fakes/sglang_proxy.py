"""A small HTTP proxy in front of a real SGLang server, which passes everything on but for what a test tampers with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
from aiohttp import web

Tamper = Callable[[str, Any], Any]
"""`(path, JSON of an answer or of one event of a stream) -> what is passed on`, or BREAK_OFF, STALL or a number: that HTTP status instead."""
BREAK_OFF, STALL, GARBAGE = object(), object(), object()


@asynccontextmanager
async def proxy(url: str, tamper: Tamper) -> AsyncIterator[str]:
    """The proxy's URL, on loopback."""
    async with aiohttp.ClientSession() as session:

        async def handle(request: web.Request) -> web.StreamResponse:
            headers = {
                "Authorization": request.headers["Authorization"],
                "Content-Type": "application/json",
            }
            async with session.request(
                request.method,
                f"{url}{request.path_qs}",
                headers=headers,
                data=await request.read(),
            ) as answer:
                if answer.content_type != "text/event-stream":
                    told = tamper(request.path, json.loads(await answer.read() or b"null"))
                    return (
                        web.Response(status=told)
                        if isinstance(told, int)
                        else web.json_response(told, status=answer.status)
                    )
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                with suppress(ConnectionResetError):  # whoever asked may be gone by now
                    await _stream(request, response, answer.content)
                return response

        async def _stream(
            request: web.Request, response: web.StreamResponse, lines: aiohttp.StreamReader
        ) -> None:
            await response.prepare(request)
            async for line in lines:
                data = line.removeprefix(b"data: ").strip()
                told = (
                    tamper(request.path, "[DONE]" if data == b"[DONE]" else json.loads(data))
                    if data
                    else None
                )
                if not data or told == "[DONE]":
                    await response.write(line)
                    continue
                if told is BREAK_OFF:
                    assert request.transport is not None
                    request.transport.close()
                    return
                if told is STALL:
                    await asyncio.sleep(30.0)
                await response.write(
                    b"data: {]\n"
                    if told is GARBAGE
                    else b"data: " + json.dumps(told).encode() + b"\n"
                )

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
