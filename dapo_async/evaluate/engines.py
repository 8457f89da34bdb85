"""Engines for an evaluation without a run: a checkpoint comes in, engines leave.

torch    one engine in this process
sglang   a new server, or all servers of `rollout.servers`; these load the checkpoint from their own
         disk and keep it

`command.py` calls it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import torch

from dapo_async.config import Config
from dapo_async.model import ModelConfig, folder_for_sglang, load_decoder
from dapo_async.rollout import Engine
from dapo_async.rollout.engine import EngineFault
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.rollout.sglang import SERVER_KEY
from dapo_async.rollout.sglang.client import SGLangClient
from dapo_async.rollout.sglang.engine import SGLangEngine
from dapo_async.rollout.sglang.server import ServerOptions, SGLangServer, missing_sglang
from dapo_async.utils.state_clock import StateClock

LOOPBACK = "127.0.0.1"
PROBE = np.arange(2, dtype=np.int32)  # any two tokens; an evaluation does not use the probe


def check_engines(config: Config) -> None:
    """Raises ValueError when this machine lacks SGLang or the GPU that the config asks for."""
    rollout = config.rollout
    if rollout.engine == "sglang" and not rollout.server_urls and (lack := missing_sglang()):
        raise ValueError(lack)
    if config.model.torch_device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"model.device ({config.model.device}) asks for a GPU, but this machine has no CUDA "
            "device; set model.device=cpu"
        )


@asynccontextmanager
async def open_engines(
    config: Config, *, checkpoint: Path, max_len: int, seed: int, log: Path
) -> AsyncIterator[Sequence[Engine]]:
    """Engines that serve `checkpoint`, with sequences of at most `max_len` tokens.

    `log` gets the output of a new SGLang server. Raises EngineFault or TimeoutError when an engine
    does not start.
    """
    async with AsyncExitStack() as stack:
        if config.rollout.engine == "torch":
            engine = await asyncio.to_thread(_torch_engine, config, checkpoint, max_len)
            stack.push_async_callback(engine.close)
            yield [engine]
        elif config.rollout.server_urls:
            yield [
                await stack.enter_async_context(_outer_server(config, url, checkpoint))
                for url in config.rollout.server_urls
            ]
        else:
            yield [
                await stack.enter_async_context(_own_server(config, checkpoint, max_len, seed, log))
            ]


def _torch_engine(config: Config, checkpoint: Path, max_len: int) -> ThreadedEngine:
    rollout = config.rollout
    torch.set_num_threads(max(1, int(config.model.num_cpus)))
    device = config.model.torch_device
    decoder = load_decoder(checkpoint, dtype=getattr(torch, config.model.dtype), device=device)
    return ThreadedEngine(
        TorchEngine(decoder, num_slots=rollout.fixed_slots, max_len=max_len),
        StateClock("evaluation"),
    )


@asynccontextmanager
async def _own_server(
    config: Config, checkpoint: Path, max_len: int, seed: int, log: Path
) -> AsyncIterator[SGLangEngine]:
    """A new server that is started with the checkpoint; its incarnation is empty."""
    rollout = config.rollout
    scratch = log.with_name(f"{log.name}-model")
    model = await asyncio.to_thread(_folder_for_server, checkpoint, scratch)
    options = ServerOptions(
        model=model,
        dtype=config.model.dtype,
        device=config.model.torch_device,
        tensor_parallel=rollout.tensor_parallel,
        num_slots=rollout.fixed_slots,
        max_len=max_len,
        host=LOOPBACK,
        ports=config.network.port_range,
        seed=seed,
        log=log,
        extra=tuple(shlex.split(rollout.server_flags)),
    )
    server = SGLangServer(options)
    try:
        await server.start(timeout_s=config.deadlines.start_s)
        client = SGLangClient(
            server.url,
            api_key=server.api_key,
            silence_s=config.deadlines.answer_s,
            why_ended=server.why_ended,
        )
        async with _engine(config, client, incarnation="") as engine:
            yield engine
    finally:
        await server.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _folder_for_server(checkpoint: Path, scratch: Path) -> Path:
    """SGLang must read the files that `load_decoder` reads."""
    return folder_for_sglang(checkpoint, ModelConfig.from_folder(checkpoint), scratch=scratch)


@asynccontextmanager
async def _outer_server(config: Config, url: str, checkpoint: Path) -> AsyncIterator[SGLangEngine]:
    """A running server, which loads the checkpoint from the same path and attests its version."""
    incarnation = f"evaluation-{secrets.token_hex(4)}"
    client = SGLangClient(
        url, api_key=os.environ.get(SERVER_KEY, ""), silence_s=config.deadlines.answer_s
    )

    async def load(weight_version: str, flush: bool) -> None:
        await client.update_from_disk(str(checkpoint), weight_version=weight_version, flush=flush)

    async with _engine(config, client, incarnation=incarnation) as engine:
        await client.wait_until_healthy(timeout_s=config.deadlines.start_s)
        await client.resume()  # a run that was killed may have left the server paused
        attested, report = await engine.update(load, version=0, probe_ids=PROBE)
        if (attested, report.version) != (incarnation, 0):
            raise EngineFault(
                f"{url} must serve {checkpoint} as {incarnation}:0, but serves "
                f"{attested}:{report.version}"
            )
        yield engine


@asynccontextmanager
async def _engine(
    config: Config, client: SGLangClient, *, incarnation: str
) -> AsyncIterator[SGLangEngine]:
    engine = SGLangEngine(
        client,
        StateClock("evaluation"),
        num_slots=config.rollout.fixed_slots,
        weight_update="drain",
        incarnation=incarnation,
    )
    try:
        yield engine
    finally:
        await engine.close()
