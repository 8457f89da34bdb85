"""A publish of several learner ranks to engines, in processes on gloo: what it takes of a step.

Each rank measures, one after the other and together with the other ranks: one copy of its shard
into memory that was used before, its snapshot, its answer to the probe, and the sending beside the
step. Engines check every bit by the content sum.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from dapo_async.model import (
    Layout,
    ModelConfig,
    build_decoder,
    build_mesh,
    checksum,
    join_store,
    open_store,
    score_tokens,
    shard_of,
    take_snapshot,
)
from dapo_async.weights import (
    BUCKET_BYTES,
    SENDER,
    Manifest,
    WeightGroup,
    receive,
    send_copy,
)

HOST, TIMEOUT_S, PROBE_TOKENS = "127.0.0.1", 300.0, 16


def joined(port: int, rank: int, world_size: int, sender: int) -> WeightGroup:
    return WeightGroup.join(
        (HOST, port),
        rank=rank,
        world_size=world_size,
        host=HOST,
        device="cpu",
        timeout_s=TIMEOUT_S,
        sender=sender,
    )


def engine_process(pipe: Connection, port: int, number: int, world_size: int, tp: int) -> None:
    """Receives each manifest's weights and answers with their content sum."""
    torch.set_num_threads(1)
    groups = [joined(port, 1 + number, world_size, sender) for sender in range(tp)]
    while (manifest := pipe.recv()) is not None:
        pipe.send(checksum(receive(groups, manifest, bucket_bytes=BUCKET_BYTES)))


def rank_process(
    pipe: Connection, shape: dict[str, Any], dp: int, tp: int, number: int, num_engines: int
) -> None:
    """Answers each message with the seconds of a publish, its share in the content sum, and the
    manifest. The first rank sends the ports of both rendezvous before; the others receive them."""
    torch.set_num_threads(1)
    if number == 0:
        store, weights = (open_store(HOST, timeout_s=TIMEOUT_S) for _ in range(2))
        pipe.send((store.port, weights.port))
        port = weights.port
    else:
        mesh_port, port = pipe.recv()
        store = join_store((HOST, mesh_port), timeout_s=TIMEOUT_S)
    mesh = build_mesh(
        store,
        rank=number,
        dp=dp,
        tp=tp,
        host=HOST,
        device=torch.device("cpu"),
        timeout_s=TIMEOUT_S,
    )
    group = joined(port, SENDER, 1 + num_engines, number) if number < tp else None
    decoder = build_decoder(ModelConfig.from_dict(shape), mesh=mesh)
    shards = [shard_of(each) for each in decoder.parameters()]
    for shard in shards:
        shard.normal_(std=0.02)
    used = [torch.empty_like(shard).copy_(shard) for shard in shards]
    layout, before = Layout.of(decoder, mesh), None
    while (version := pipe.recv()) is not None:
        times: dict[str, float] = {}

        def timed(name: str, work: Callable[[], Any], times: dict[str, float] = times) -> Any:
            mesh.every.sum(torch.zeros(1))  # all ranks begin together
            began_s = time.perf_counter()
            done = work()
            times[name] = time.perf_counter() - began_s
            return done

        shards[0].add_(0.001)
        timed("copy_of_shard_s", partial(torch._foreach_copy_, used, shards))
        copying = partial(take_snapshot, decoder, version=version, probe_tokens=PROBE_TOKENS)
        snapshot = timed("snapshot_s", partial(copying, mesh=mesh, layout=layout, over=before))
        before = snapshot.copy
        timed("probe_s", partial(score_tokens, decoder, snapshot.probe_ids))
        manifest = Manifest.of_copy(before, num_senders=tp)
        pipe.send((before.checksum(), manifest if mesh.is_first else None))
        send = partial(send_copy, before, mesh.publishing, group, manifest)
        timed("sending_s", partial(send, bucket_bytes=BUCKET_BYTES))
        pipe.send(times)


def publish_of_ranks(
    shape: dict[str, Any], *, dp: int, tp: int, num_engines: int, rounds: int
) -> dict[str, float]:
    """Medians over the rounds of the slowest rank's seconds, and `standstill_over_copy`.

    Raises RuntimeError if an engine got other weights than the learner's.
    """
    context = multiprocessing.get_context("spawn")

    def start(work: Callable[..., None], *arguments: Any) -> Connection:
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, *arguments), daemon=True).start()
        return ours

    ranks = [start(rank_process, shape, dp, tp, number, num_engines) for number in range(dp * tp)]
    ports = ranks[0].recv()
    for rank in ranks[1:]:
        rank.send(ports)
    engines = [
        start(engine_process, ports[1], number, 1 + num_engines, tp)
        for number in range(num_engines)
    ]
    rows = []
    for version in range(rounds + 1):
        for rank in ranks:
            rank.send(version)
        shares, manifests = zip(*(rank.recv() for rank in ranks), strict=True)
        for engine in engines:
            engine.send(manifests[0])
        rows.append([rank.recv() for rank in ranks])
        content = f"{sum(int(share, 16) for share in shares) % 2**64:016x}"
        if {engine.recv() for engine in engines} != {content}:
            raise RuntimeError("an engine got other weights than the learner's")
    for pipe in (*ranks, *engines):
        pipe.send(None)
    result = {
        name: statistics.median(max(times[name] for times in row) for row in rows[1:])
        for name in rows[0][0]
    }
    result["standstill_over_copy"] = statistics.median(
        max(times["snapshot_s"] for times in row) / max(times["copy_of_shard_s"] for times in row)
        for row in rows[1:]
    )
    return result
