"""A real SGLang server at an IPv6 address of an interface that has an IPv4 address, too.

Weights come from disk: see `test_two_hosts.py` for a broadcast.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest
from sglang_world import PROBE, World, forward_logprobs, from_disk, request, start_world

from dapo_async.rollout import UpdateReport
from dapo_async.types import Completion
from dapo_async.utils.network import split

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]
HOST = "::1"
PROMPT = (7, 11, 13, 17, 19, 23)
TOLERANCE = 1e-4  # nats, float32: kernels round differently


def addresses(world: World) -> set[tuple[str, int]]:
    """Where the server's processes listen."""
    mains = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(world.folder) in (process.info["cmdline"] or ())
    ]
    return {
        (each.laddr.ip, each.laddr.port)
        for main in mains
        for process in (main, *main.children(recursive=True))
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }


def test_server_at_an_ipv6_address_generates_and_receives_weights(tmp_path: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    world = start_world("qwen3", tmp_path / "world", host=HOST)

    async def generate() -> tuple[Completion, UpdateReport, Completion]:
        async with world.engine() as engine:
            (before,) = await engine.generate(request(1, PROMPT))
            load = from_disk(engine._client, world.other_folder)
            _, report = await engine.update(load, version=5, probe_ids=PROBE)
            (after,) = await engine.generate(request(2, PROMPT))
            return before, report, after

    try:
        assert world.server.url.startswith("http://[::1]:")
        before, report, after = asyncio.run(generate())
        listening = addresses(world)
    finally:
        asyncio.run(world.server.close())
    for completion, model in ((before, world.base), (after, world.other)):
        expected = forward_logprobs(model, PROMPT, completion.token_ids)
        np.testing.assert_allclose(completion.behaviour_logprobs, expected, atol=TOLERANCE, rtol=0)
    assert (report.version, set(after.weight_versions.tolist())) == (5, {5})
    _, port = split(world.server.url)
    assert (HOST, port) in listening
    assert {ip for ip, _ in listening} <= {HOST, "127.0.0.1"}, listening
