"""A publish of several learner ranks, whose senders send beside a step, each in its own group."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gloo import HOST, TIMEOUT_S, on_ranks
from parallel_world import rank_on, uneven_groups
from torch import Tensor

from dapo_async.model import (
    Mesh,
    buckets,
    checksum,
    open_store,
    shard_copy,
    shard_of,
    take_snapshot,
)
from dapo_async.weights import Manifest, WeightGroup, receive, send_copy
from dapo_async.weights.collective import SENDER

pytestmark = pytest.mark.gloo
BUCKET_BYTES = 700  # several buckets per unit
ENGINES = 2


class Thread(threading.Thread):
    """Keeps what its work returns or raises."""

    def __init__(self, work: Any) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.result: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.work()
        except RuntimeError as error:
            self.result = error

    def end(self) -> Any:
        self.join(TIMEOUT_S)
        assert not self.is_alive()
        return self.result


def joined(port: int, rank: int, sender: int) -> WeightGroup:
    return WeightGroup.join(
        (HOST, port),
        rank=rank,
        world_size=1 + ENGINES,
        host=HOST,
        device="cpu",
        timeout_s=TIMEOUT_S,
        sender=sender,
    )


@contextmanager
def weight_groups(mesh: Mesh) -> Iterator[tuple[WeightGroup | None, list[WeightGroup]]]:
    """The group of this rank as a sender, and those of the engine in the process of the last ones.

    Each engine joins all groups while the senders join theirs.
    """
    store = open_store(HOST, timeout_s=TIMEOUT_S) if mesh.is_first else None
    number = mesh.every.sum(torch.tensor(store.port if store is not None else 0))
    port, senders = int(number), mesh.tp.size
    place = mesh.every.rank - (mesh.every.size - ENGINES)
    engine = Thread(
        lambda: [joined(port, 1 + place, sender) for sender in range(senders if place >= 0 else 0)]
    )
    own = joined(port, SENDER, mesh.every.rank) if mesh.every.rank < senders else None
    groups = engine.end()
    assert isinstance(groups, list), groups
    yield own, groups
    mesh.every.sum(torch.zeros(1))  # nobody leaves before all are done
    del store


def received_by(groups: list[WeightGroup], manifest: Manifest) -> dict[str, Tensor] | RuntimeError:
    """What an engine receives; it leaves its groups when one of them breaks off."""
    if not groups:
        return {}
    try:
        return receive(groups, manifest, bucket_bytes=BUCKET_BYTES)
    except RuntimeError as error:
        groups.clear()
        return error


def published(mesh: Mesh, during: bool, breaks_off: bool) -> tuple[Any, ...]:
    """One step, a snapshot, and its publish beside the next step or before it.

    Returns this rank's share in the checksum, the checksum of what its engine received, why the
    sending broke off, the weights after the steps, and whether the engine noticed a failure.
    """
    rank = rank_on(mesh, model={"tie_embeddings": False})
    rank.step(uneven_groups())
    snapshot = take_snapshot(
        rank.decoder, version=1, probe_tokens=4, dtype=torch.bfloat16, mesh=mesh
    )
    manifest = Manifest.of_copy(snapshot.copy, num_senders=mesh.tp.size)
    with weight_groups(mesh) as (own, groups):
        if breaks_off and mesh.every.rank == mesh.every.size - 1:
            groups.clear()  # this engine is lost: the others can't go on
        engine = Thread(lambda: received_by(groups, manifest))
        sending = Thread(
            lambda: send_copy(
                snapshot.copy, mesh.publishing, own, manifest, bucket_bytes=BUCKET_BYTES
            )
        )
        if not during:
            sending.end()
        rank.step(uneven_groups())
        failure = sending.end()
        received = engine.end()
    weights = torch.cat([shard_of(each).flatten() for each in rank.decoder.parameters()])
    share = snapshot.copy.checksum()
    content = checksum(received) if isinstance(received, dict) and received else ""
    return share, content, str(failure or ""), weights.clone(), isinstance(received, RuntimeError)


@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (2, 2)])
def test_engines_get_the_snapshot_bit_for_bit_while_the_next_step_runs(
    dp: int, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = {**(buckets.__kwdefaults__ or {}), "limit": 500}
    monkeypatch.setattr(buckets, "__kwdefaults__", limit)  # many units
    monkeypatch.setattr(shard_copy, "BUCKET_ELEMENTS", 300)
    beside = on_ranks(published, True, False, dp=dp, tp=tp)
    before = on_ranks(published, False, False, dp=dp, tp=tp)
    content = f"{sum(int(share, 16) for share, *_ in beside) % 2**64:016x}"
    assert [each[1] for each in beside] == [""] * (dp * tp - ENGINES) + [content] * ENGINES
    assert [each[2] for each in beside] == [""] * (dp * tp)
    for one, other in zip(beside, before, strict=True):
        assert one[:2] == other[:2]
        assert torch.equal(one[3], other[3])


def test_ranks_end_a_publish_that_an_engine_breaks_off_and_train_on() -> None:
    began_s = time.monotonic()
    ranks = on_ranks(published, True, True, dp=2, tp=2)
    assert time.monotonic() - began_s < TIMEOUT_S  # nobody waits for a deadline
    whole = on_ranks(published, True, False, dp=2, tp=2)
    assert ranks[0][2]
    assert [failure for _, _, failure, *_ in ranks[2:]] == ["", ""]  # they only deal
    assert ranks[2][4]  # the other engine notices
    for one, other in zip(ranks, whole, strict=True):
        assert torch.equal(one[3], other[3])
