"""SGLang engines on this machine: tokens per second, and the cost of weight updates.

- Rates: 1, 16 and 64 different prompts of 32 tokens with 64 new tokens each, beside the native
  engine, in alternation, one thread per process.
- Updates, per mode and transport, while 16 responses run: `update` is the time from the decision to
  the proof by the probe, `standstill` the part of it without generation, also in copies
  of the weights in memory. `lost` is how much later the responses end because of one update.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import NEW_TOKENS, PROMPT_TOKENS, SHAPE, hardware, prompts
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from dapo_async.bench.about import commit
from dapo_async.model import load_decoder, open_store, read_weights
from dapo_async.rollout import Engine, EngineFault, GroupRequest, SamplingParams
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.native.thread import ThreadedEngine
from dapo_async.rollout.sglang.client import SGLangClient
from dapo_async.rollout.sglang.engine import SGLangEngine
from dapo_async.rollout.sglang.server import ServerOptions, SGLangServer
from dapo_async.utils.state_clock import StateClock
from dapo_async.weights import Manifest, WeightGroup
from dapo_async.weights.collective import GROUP_NAME
from dapo_async.weights.disk import version_folder, write_version

HOST, MODES, TRANSPORTS = "127.0.0.1", ("recompute", "keep_kv", "drain"), ("broadcast", "disk")
LARGE = {
    **SHAPE,
    "hidden_size": 640,
    "intermediate_size": 1920,
    "num_hidden_layers": 10,
    "num_attention_heads": 10,
}
UNDER_WAY, UPDATE_AFTER_S = 16, 0.3
LOG_LINES = 60
PROBE = np.arange(16, dtype=np.int32)
BUCKET_BYTES = 64 * 2**20
SEEDS = itertools.count()
Load = Callable[[str, bool], Awaitable[None]]


def requests(count: int, new_tokens: int) -> list[GroupRequest]:
    """Prompts that no request had before: the server's prefix cache knows none of them."""
    sampling = SamplingParams(max_tokens=new_tokens, temperature=1.0, stop_token_ids=(), seed=0)
    return [
        GroupRequest(key, prompt, 1, sampling)
        for key, prompt in enumerate(prompts(count, seed=next(SEEDS)))
    ]


async def seconds(engine: Engine, batch: list[GroupRequest]) -> float:
    start_s = time.perf_counter()
    await asyncio.gather(*(engine.generate(each) for each in batch))
    return time.perf_counter() - start_s


async def rates(
    server: SGLangServer, folder: Path, *, batches: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    """Medians over `rounds`, after one of warm-up."""
    rows = []
    for batch in batches:
        core = TorchEngine(
            load_decoder(folder), num_slots=batch, max_len=PROMPT_TOKENS + NEW_TOKENS
        )
        own, works = (
            ThreadedEngine(core, StateClock("torch")),
            [requests(batch, NEW_TOKENS) for _ in range(rounds + 1)],
        )
        async with sglang(server, "recompute") as (engine, _):
            taken = [(await seconds(engine, work), await seconds(own, work)) for work in works][1:]
        await own.close()
        tokens = batch * NEW_TOKENS
        rows.append(
            {
                "batch": batch,
                "sglang_tokens_per_s": round(
                    tokens / statistics.median(theirs for theirs, _ in taken)
                ),
                "torch_tokens_per_s": round(tokens / statistics.median(ours for _, ours in taken)),
                "sglang_over_torch": round(
                    statistics.median(ours / theirs for theirs, ours in taken), 3
                ),
            }
        )
    return rows


@asynccontextmanager
async def sglang(
    server: SGLangServer, mode: Any
) -> AsyncIterator[tuple[SGLangEngine, SGLangClient]]:
    client = SGLangClient(server.url, api_key=server.api_key, why_ended=server.why_ended)
    engine = SGLangEngine(
        client, StateClock("sglang"), num_slots=64, weight_update=mode, incarnation="benchmark"
    )
    folder = server.options.model

    async def base(weight_version: str, flush: bool) -> None:
        await client.update_from_disk(str(folder), weight_version=weight_version, flush=flush)

    try:
        await engine.update(base, version=0, probe_ids=PROBE)
        yield engine, client
    finally:
        await engine.close()


@asynccontextmanager
async def transported(
    transport: str, client: SGLangClient, weights: dict[str, Tensor], folder: Path
) -> AsyncIterator[Load]:
    """What brings `weights` to the server: from this process, as its learner."""
    if transport == "disk":

        async def from_disk(weight_version: str, flush: bool) -> None:
            await asyncio.to_thread(write_version, weights, folder, version=1)
            await client.update_from_disk(
                str(version_folder(folder, 1)), weight_version=weight_version, flush=flush
            )

        yield from_disk
        return
    store = open_store(HOST, timeout_s=60.0)
    joining = asyncio.create_task(
        client.join_group(
            (HOST, store.port), name=GROUP_NAME, first_rank=1, world_size=2, backend="gloo"
        )
    )
    group = await asyncio.to_thread(
        WeightGroup, store, rank=0, world_size=2, host=HOST, device="cpu", timeout_s=60.0
    )
    await joining
    manifest = Manifest.of(weights)

    async def by_broadcast(weight_version: str, flush: bool) -> None:
        buckets = manifest.buckets(BUCKET_BYTES)
        lines = [(GROUP_NAME, [spec.header for spec in bucket]) for bucket in buckets]
        sending = asyncio.create_task(
            asyncio.to_thread(group.send, weights, manifest, bucket_bytes=BUCKET_BYTES)
        )
        await client.receive(lines, weight_version=weight_version, flush=flush)
        await sending

    try:
        yield by_broadcast
    finally:
        await client.leave_group(GROUP_NAME)


async def updates(
    server: SGLangServer, folder: Path, *, rounds: int, response_tokens: int
) -> list[dict[str, Any]]:
    """Each mode by each transport; medians over `rounds`."""
    weights = read_weights(folder)
    copy_s = statistics.median(copying(weights) for _ in range(5))
    rows = []
    for mode in MODES:
        for transport in TRANSPORTS:
            taken = []
            with tempfile.TemporaryDirectory() as out:
                async with (
                    sglang(server, mode) as (engine, client),
                    transported(transport, client, weights, Path(out)) as load,
                ):
                    for number in range(rounds):
                        undisturbed_s = await seconds(engine, requests(UNDER_WAY, response_tokens))
                        running = asyncio.create_task(
                            seconds(engine, requests(UNDER_WAY, response_tokens))
                        )
                        await asyncio.sleep(UPDATE_AFTER_S)
                        start_s = time.perf_counter()
                        _, report = await engine.update(load, version=number + 1, probe_ids=PROBE)
                        update_s = time.perf_counter() - start_s
                        taken.append((update_s, report.pause_s, await running - undisturbed_s))
            update_s, standstill_s, lost_s = (
                statistics.median(column) for column in zip(*taken, strict=True)
            )
            rows.append(
                {
                    "mode": mode,
                    "transport": transport,
                    "update_ms": round(update_s * 1e3, 1),
                    "standstill_ms": round(standstill_s * 1e3, 1),
                    "standstill_over_copy": round(standstill_s / copy_s, 1),
                    "lost_ms": round(lost_s * 1e3, 1),
                }
            )
    return [{"copy_ms": round(copy_s * 1e3, 2), **row} for row in rows]


def copying(weights: dict[str, Tensor]) -> float:
    start_s = time.perf_counter()
    copies = [tensor.clone() for tensor in weights.values()]
    assert len(copies) == len(weights)
    return time.perf_counter() - start_s


def measure(shape: dict[str, Any], root: Path, *, quick: bool, with_rates: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**shape))
    folder = root / "model"
    model.save_pretrained(folder)
    options = ServerOptions(
        model=folder,
        dtype="float32",
        device="cpu",
        tensor_parallel=1,
        num_slots=64,
        max_len=512,
        host=HOST,
        seed=0,
        log=root / "server.log",
    )
    server = SGLangServer(options)
    asyncio.run(server.start(timeout_s=300.0))
    try:
        rounds = 1 if quick else 5
        part: dict[str, Any] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters())
        }
        if with_rates:
            part["rates"] = asyncio.run(
                rates(server, folder, batches=(1, 16) if quick else (1, 16, 64), rounds=rounds)
            )
        large = not with_rates  # a token takes it long: shorter responses
        short = large or quick
        part["updates"] = asyncio.run(
            updates(server, folder, rounds=rounds, response_tokens=48 if short else 192)
        )
        return part
    except EngineFault:
        lines = options.log.read_text(errors="replace").splitlines()
        print("\n".join([f"the last lines of {options.log}:", *lines[-LOG_LINES:]]))
        raise
    finally:
        asyncio.run(server.close())


def measured(shape: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """As `measure`. A server that was lost is replaced once, as in a run."""
    with tempfile.TemporaryDirectory() as root:
        try:
            return measure(shape, Path(root), quick=quick, with_rates=shape is SHAPE)
        except EngineFault as fault:
            print(f"measuring again with a new server, because {fault}")
    with tempfile.TemporaryDirectory() as root:
        return measure(shape, Path(root), quick=quick, with_rates=shape is SHAPE)


def show(part: dict[str, Any]) -> None:
    print(f"\n{part['parameters'] / 1e6:.2f} M parameters")
    for name in ("rates", "updates"):
        if rows := part.get(name):
            print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
            for row in rows:
                print(f"| {' | '.join(str(value) for value in row.values())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result there")
    parser.add_argument("--quick", action="store_true", help="the small model alone, once each")
    options = parser.parse_args()
    if importlib.util.find_spec("sglang") is None:
        sys.exit("SGLang is not installed; run cluster/sglang_cpu/install.sh first")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    parts = []
    for shape in (SHAPE,) if options.quick else (SHAPE, LARGE):
        parts.append(measured(shape, quick=options.quick))
        show(parts[-1])
    report = {
        "benchmark": "sglang_engine",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "models": parts,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
