"""Publishing without Ray: gloo groups on threads, folders on disk, real decoders."""

from __future__ import annotations

import asyncio
import gc
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from weights_world import (
    FakeEngine,
    FakeLearner,
    Groups,
    Transport,
    make_decoder,
    make_publisher,
    publish,
)

from dapo_async.model import buckets, checksum, open_store, take_snapshot
from dapo_async.weights import (
    Announcement,
    Attestation,
    HandshakeOutcome,
    Manifest,
    WeightGroup,
    check_attestation,
    receive,
)
from dapo_async.weights.disk import read_version, write_version
from dapo_async.weights.publisher import HandshakeError, Publisher


async def ignore(version: int) -> None:
    """For `on_served`."""


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_published_weights_are_served_and_pass_the_handshake(
    transport: Transport, tmp_path: Path
) -> None:
    learner = FakeLearner(tmp_path)
    engine = FakeEngine(learner)
    publisher = make_publisher(learner, engine, transport=transport)
    assert publish(publisher, learner.announce(1)) == [1]
    assert publisher.outcomes == {"passed": 1}
    assert checksum(engine.model.state_dict()) == checksum(learner.model.state_dict())


def test_publishing_the_same_weights_again_is_inconclusive_never_passed(tmp_path: Path) -> None:
    learner = FakeLearner(tmp_path)
    publisher = make_publisher(learner, FakeEngine(learner, seed=0))
    publish(publisher, learner.announce(1))
    assert publisher.outcomes == {"inconclusive": 1}


def test_engine_that_skipped_the_update_is_quarantined_and_reloaded(tmp_path: Path) -> None:
    learner = FakeLearner(tmp_path)
    engine = FakeEngine(learner)
    learner.sends = dict(engine.model.state_dict())  # the engine gets its own old weights
    publisher = make_publisher(learner, engine)
    assert publish(publisher, learner.announce(1)) == [1]
    assert publisher.outcomes == {"mismatch": 1, "passed": 1}
    assert engine.quarantined == [1]
    assert engine.confirmed == [1]
    assert checksum(engine.model.state_dict()) == checksum(learner.model.state_dict())


def test_second_mismatch_stops_the_run_with_both_values(tmp_path: Path) -> None:
    learner = FakeLearner(tmp_path)
    engine = FakeEngine(learner)
    wrong = {name: tensor + 1 for name, tensor in engine.model.state_dict().items()}
    engine.loads = wrong
    publisher = make_publisher(learner, engine)
    announcement = learner.announce(3)
    assert announcement.checksum is not None
    values = f"{checksum(wrong)[:12]}.*{announcement.checksum[:12]}"
    with pytest.raises(HandshakeError, match=f"wrong weights twice.*{values}"):
        publish(publisher, announcement)
    assert engine.quarantined == [3]
    assert engine.confirmed == []


def test_attestation_without_checksum_is_checked_by_version_and_probe(tmp_path: Path) -> None:
    announcement = FakeLearner(tmp_path).announce(4)
    before = announcement.probe_logprobs + np.float32(0.5)
    good = Attestation("rollout-0", "first", 4, before, announcement.probe_logprobs)

    def outcome(attested: Attestation) -> HandshakeOutcome:
        return check_attestation(announcement, attested, tolerance=1e-3).outcome

    assert outcome(good) is HandshakeOutcome.PASSED
    unchanged = replace(good, probe_before=good.probe_after)
    assert outcome(unchanged) is HandshakeOutcome.INCONCLUSIVE
    assert outcome(replace(good, probe_after=before)) is HandshakeOutcome.MISMATCH
    assert outcome(replace(good, probe_after=before * np.nan)) is HandshakeOutcome.MISMATCH
    assert outcome(replace(good, incarnation="other")) is HandshakeOutcome.MISMATCH
    stale = check_attestation(announcement, replace(good, version=3), tolerance=1e-3)
    assert stale.outcome is HandshakeOutcome.MISMATCH
    assert "serves version 3 of first, the learner published version 4 of first" in stale.detail


def test_engines_of_one_layout_are_compared_with_the_first_that_passed(tmp_path: Path) -> None:
    learner = FakeLearner(tmp_path)
    engines = [FakeEngine(learner, f"rollout-{number}", seed=1 + number) for number in range(3)]
    first, second, third = engines
    first.own_checksums, third.own_checksums = ["aa" * 8], ["aa" * 8]
    second.own_checksums = ["bb" * 8, "aa" * 8]  # right after its reload
    publisher = make_publisher(learner, *engines)
    assert publish(publisher, learner.announce(1)) == [1]
    # The reload brought the weights that the second engine had: inconclusive.
    assert publisher.outcomes == {"mismatch": 1, "passed": 2, "inconclusive": 1}
    assert [engine.quarantined for engine in engines] == [[], [1], []]

    first.own_checksums, third.own_checksums = ["cc" * 8], ["cc" * 8]
    second.own_checksums = ["dd" * 8] * 2
    line = "rollout-1 serves weights dddddddddddd, rollout-0 cccccccccccc, both as version 2"
    twice = f"wrong weights twice: first {line}; after a reload from disk {line}"
    with pytest.raises(HandshakeError, match=twice):
        publish(publisher, learner.announce(2))


def nudge(learner: FakeLearner) -> None:
    """A step so small that every probe stays within the tolerance of 0.5 nats."""
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(1e-4)


def small_steps(
    tmp_path: Path, num_engines: int
) -> tuple[FakeLearner, list[FakeEngine], Publisher]:
    """Engines of a layout of their own, as servers are, that serve version 1."""
    learner = FakeLearner(tmp_path)
    engines = [FakeEngine(learner, f"rollout-{number}") for number in range(num_engines)]
    for engine in engines:
        engine.same_layout = False
    publisher = make_publisher(learner, *engines, tolerance=0.5)
    publish(publisher, learner.announce(1))
    return learner, engines, publisher


@pytest.mark.parametrize("stale", [(1,), (0, 1)])
def test_engines_that_keep_their_weights_are_found_though_their_probes_are_near(
    stale: tuple[int, ...], tmp_path: Path
) -> None:
    learner, engines, publisher = small_steps(tmp_path, 2)
    for number in stale:
        engines[number].keeps_weights = True
    for version in (2, 3):
        nudge(learner)
        assert publish(publisher, learner.announce(version)) == [version]
    nudge(learner)
    line = f"rollout-{stale[0]} answers its probe bit for bit alike before and after version 4"
    with pytest.raises(HandshakeError, match=line):
        publish(publisher, learner.announce(4))


def test_one_stale_update_among_right_ones_ends_no_run(tmp_path: Path) -> None:
    learner, (engine,), publisher = small_steps(tmp_path, 1)
    for version in range(2, 10):
        engine.keeps_weights = version % 3 == 0
        nudge(learner)
        publish(publisher, learner.announce(version))
    assert publisher.outcomes == {"passed": 1, "inconclusive": 8}


def test_skipped_steps_change_no_answer_and_are_no_fault(tmp_path: Path) -> None:
    learner, _, publisher = small_steps(tmp_path, 1)
    for version in range(2, 8):
        publish(publisher, learner.announce(version))
    assert publisher.outcomes["mismatch"] == 0


def test_own_checksum_that_stays_shows_stale_weights_at_once(tmp_path: Path) -> None:
    learner, (engine,), publisher = small_steps(tmp_path, 1)
    nudge(learner)
    engine.own_checksums = ["aa" * 8]
    publish(publisher, learner.announce(2))
    nudge(learner)
    engine.own_checksums = ["aa" * 8, "bb" * 8]  # stale, right after its reload
    publish(publisher, learner.announce(3))
    assert publisher.outcomes["mismatch"] == 1
    nudge(learner)
    engine.own_checksums = ["bb" * 8] * 2
    line = "rollout-0 has the same checksum of its weights before and after version 4"
    with pytest.raises(HandshakeError, match=line):
        publish(publisher, learner.announce(4))


@pytest.mark.parametrize("bucket_bytes", [1, 300, 10**9])
def test_a_real_broadcast_delivers_every_bit_to_every_engine(bucket_bytes: int) -> None:
    weights = dict(make_decoder(0).state_dict()) | {"half": torch.arange(5, dtype=torch.bfloat16)}
    manifest = Manifest.of(weights)
    for bucket in manifest.buckets(bucket_bytes):
        assert len(bucket) == 1 or sum(spec.num_bytes for spec in bucket) <= bucket_bytes
    store = open_store("127.0.0.1", timeout_s=60)
    received: dict[int, dict[str, Tensor]] = {}

    def engine(rank: int) -> None:
        address = ("127.0.0.1", store.port)
        group = WeightGroup.join(
            address, rank=rank, world_size=3, host="127.0.0.1", device="cpu", timeout_s=60
        )
        received[rank] = receive([group], manifest, bucket_bytes=bucket_bytes)

    threads = [threading.Thread(target=engine, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    sender = WeightGroup(store, rank=0, world_size=3, host="127.0.0.1", device="cpu", timeout_s=60)
    sender.send(weights, manifest, bucket_bytes=bucket_bytes)
    for thread in threads:
        thread.join(60)
    sums = {rank: checksum(got) for rank, got in received.items()}
    assert sums == dict.fromkeys((1, 2), checksum(weights))


def test_each_bucket_holds_tensors_of_one_unit_and_has_the_sender_of_that_unit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = {**(buckets.__kwdefaults__ or {}), "limit": 500}
    monkeypatch.setattr(buckets, "__kwdefaults__", limit)
    copy = take_snapshot(make_decoder(0), version=1, probe_tokens=4).copy
    manifest = Manifest.of_copy(copy, num_senders=2)
    cut = [*manifest.buckets(10**9)]
    assert [{spec.unit for spec in bucket} for bucket in cut] == [{0}, {1}, {2}]
    assert [manifest.sender(bucket) for bucket in cut] == [0, 1, 0]
    assert [manifest.of_unit(number).tensors for number in range(3)] == cut
    names = [spec.name for bucket in cut for spec in bucket]
    assert names == [*copy.whole()]
    assert names[0] == "model.embed_tokens.weight"


def test_an_engine_that_never_joins_fails_the_broadcast_within_the_deadline() -> None:
    store = open_store("127.0.0.1", timeout_s=2)
    with pytest.raises(RuntimeError):
        WeightGroup(store, rank=0, world_size=2, host="127.0.0.1", device="cpu", timeout_s=2)


def test_a_late_engine_is_named_by_the_deadline(tmp_path: Path) -> None:
    learner = FakeLearner(tmp_path)
    engine = FakeEngine(learner)
    engine.before_receive = lambda: asyncio.sleep(60)
    publisher = make_publisher(learner, engine, deadline_s=0.2)
    line = r"publish of version 7: the learner waited 0.2 s for rollout-0"
    with pytest.raises(TimeoutError, match=line):
        publish(publisher, learner.announce(7))


def test_a_failed_publish_that_the_end_of_a_run_leaves_prints_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def die() -> None:
        raise RuntimeError("rollout-0 died")

    async def snapshot(learner: FakeLearner) -> Announcement:
        return learner.announce(1)

    async def served(_: int) -> None:
        return None

    async def scene() -> None:
        learner = FakeLearner(tmp_path)
        engine = FakeEngine(learner)
        engine.before_receive = die
        publisher = make_publisher(learner, engine)
        await publisher.start(snapshot(learner), on_served=served)
        assert publisher.in_flight is not None
        await asyncio.wait([publisher.in_flight])

    asyncio.run(scene())
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_only_the_newest_versions_stay_on_disk(tmp_path: Path) -> None:
    for version in range(4):
        write_version({"w": torch.tensor([float(version)])}, tmp_path, version=version)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_000002", "version_000003"]
    assert read_version(tmp_path, version=3)["w"].item() == 3.0


def test_a_snapshot_is_taken_only_when_the_publish_before_it_is_done(tmp_path: Path) -> None:
    learner = FakeLearner(tmp_path)
    engine = FakeEngine(learner)
    publisher = make_publisher(learner, engine)
    events: list[str] = []

    async def be_slow() -> None:
        await asyncio.sleep(0.05)
        assert publisher.newest is not None
        events.append(f"received {publisher.newest.version}")

    async def snapshot(version: int) -> Announcement:
        events.append(f"snapshot {version}")
        return learner.announce(version)

    async def on_served(version: int) -> None:
        events.append(f"served {version}")

    async def two_steps() -> None:
        await publisher.start(snapshot(1), on_served=on_served)
        events.append("step")
        await publisher.start(snapshot(2), on_served=on_served)
        await publisher.finish()

    engine.before_receive = be_slow
    asyncio.run(two_steps())
    first, second = ["snapshot 1", "step", "received 1", "served 1"], ["received 2", "served 2"]
    assert events == [*first, "snapshot 2", *second]


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_lost_engine_is_left_out_until_it_has_proved_the_newest_version(
    transport: Transport, tmp_path: Path
) -> None:
    learner, groups = FakeLearner(tmp_path), Groups()
    first, second = FakeEngine(learner, "rollout-0"), FakeEngine(learner, "rollout-1")
    publisher = make_publisher(learner, first, second, transport=transport, groups=groups)
    served: list[int] = []

    async def on_served(version: int) -> None:
        served.append(version)

    async def publish_beside_a_step(version: int) -> None:
        announcement = learner.announce(version)

        async def snapshot() -> Announcement:
            return announcement

        await publisher.start(snapshot(), on_served=on_served)
        await publisher.finish()

    async def scenario() -> None:
        await publish_beside_a_step(1)
        second.lost = True
        await publish_beside_a_step(2)  # the second engine is lost in this publish
        await publish_beside_a_step(3)  # and left out of this one
        assert (first.version, second.version, served) == (3, 1, [1, 2, 3])
        assert not await publisher.restore(second)  # lost again
        second.lost = False
        assert await publisher.restore(second)
        assert second.version == 3
        await publish_beside_a_step(4)
        assert (first.version, second.version, served) == (4, 4, [1, 2, 3, 4])

    asyncio.run(scenario())
    both = ("rollout-0", "rollout-1")
    assert groups.formed == ([both, ("rollout-0",), both] if transport == "broadcast" else [])
    assert publisher.outcomes["mismatch"] == 0


def test_engine_lost_and_restored_between_two_publishes_joins_the_group_again(
    tmp_path: Path,
) -> None:
    learner, groups = FakeLearner(tmp_path), Groups()
    engine = FakeEngine(learner)
    publisher = make_publisher(learner, engine, groups=groups)
    publish(publisher, learner.announce(1))
    publish(publisher, learner.announce(2))
    publisher.lose(engine)
    engine.version = -1
    assert asyncio.run(publisher.restore(engine))
    assert engine.version == 2
    publish(publisher, learner.announce(3))
    assert groups.formed == [("rollout-0",), ("rollout-0",)]


def test_versions_are_served_while_every_engine_is_lost(tmp_path: Path) -> None:
    learner = FakeLearner(tmp_path)
    engine = FakeEngine(learner)
    publisher = make_publisher(learner, engine)
    engine.lost = True
    assert publish(publisher, learner.announce(1)) == [1]
    assert publish(publisher, learner.announce(2)) == [2]
    assert publisher.last_pause_s == 0.0


def test_engine_restored_before_the_publish_that_lost_it_ends_is_not_lost(tmp_path: Path) -> None:
    learner = FakeLearner(tmp_path)
    first, second = FakeEngine(learner, "rollout-0"), FakeEngine(learner, "rollout-1")
    publisher = make_publisher(learner, first, second)

    async def scenario() -> None:
        gate = asyncio.Event()

        async def wait_at_gate() -> None:
            await gate.wait()

        first.lost, second.before_receive = True, wait_at_gate
        publishing = asyncio.create_task(publisher.publish(learner.announce(1), on_served=ignore))
        await asyncio.sleep(0.01)
        publisher.lose(first)
        first.lost = False
        restoring = asyncio.create_task(publisher.restore(first))
        await asyncio.sleep(0.01)
        gate.set()
        await publishing
        assert await restoring

    asyncio.run(scenario())
    assert publisher.serving == (first, second)


def test_engines_read_from_disk_when_another_is_lost_while_the_group_forms(
    tmp_path: Path,
) -> None:
    learner, groups = FakeLearner(tmp_path), Groups()
    first, second = FakeEngine(learner, "rollout-0"), FakeEngine(learner, "rollout-1")
    publisher = make_publisher(learner, first, second, groups=groups)
    groups.absent = frozenset({"rollout-1"})
    assert publish(publisher, learner.announce(1)) == [1]
    assert (first.version, second.version) == (1, -1)
    assert publisher.serving == (first,)
    assert not learner.received
    groups.absent = None
    assert asyncio.run(publisher.restore(second))
    assert publish(publisher, learner.announce(2)) == [2]
    assert (first.version, second.version) == (2, 2)
    both = ("rollout-0", "rollout-1")
    assert groups.formed == [both, both]
    assert publisher.outcomes["mismatch"] == 0


def test_broken_broadcast_is_tolerated_only_if_an_engine_was_lost_in_it(tmp_path: Path) -> None:
    learner, groups = FakeLearner(tmp_path), Groups()
    engine = FakeEngine(learner)
    publisher = make_publisher(learner, engine, groups=groups)
    learner.failure, engine.lost = "connection closed by peer", True
    assert publish(publisher, learner.announce(1)) == [1]
    learner.failure, engine.lost = None, False
    publisher.newest = learner.announce(1)
    assert asyncio.run(publisher.restore(engine))
    assert publish(publisher, learner.announce(2)) == [2]
    assert groups.formed == [("rollout-0",), ("rollout-0",)]
    learner.failure = "connection closed by peer"
    line = "version 3 broke off, though neither an engine nor the learner was lost: connection cl"
    with pytest.raises(RuntimeError, match=line):
        publish(publisher, learner.announce(3))


def test_lost_learner_completes_its_publish_by_disk_and_forms_the_group_again(
    tmp_path: Path,
) -> None:
    learner, groups = FakeLearner(tmp_path), Groups()
    engine = FakeEngine(learner)
    publisher = make_publisher(learner, engine, groups=groups)
    assert publish(publisher, learner.announce(1)) == [1]
    broadcast = learner.broadcast

    async def lost(announcement: Announcement) -> str | None:
        publisher.lose_source()
        await broadcast(announcement)
        return "learner died while the driver waited for broadcast"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "broadcast", lost)
        patch.setattr(engine, "receive", _breaks_off)
        assert publish(publisher, learner.announce(2)) == [2]
    assert publish(publisher, learner.announce(3)) == [3]
    assert groups.formed == [("rollout-0",)] * 2
    assert publisher.serving == (engine,)


def test_deadline_of_a_publish_waits_for_a_learner_that_is_restarted(tmp_path: Path) -> None:
    learner = FakeLearner(tmp_path)
    engine = FakeEngine(learner)
    publisher = make_publisher(learner, engine, deadline_s=0.5)
    write, is_back = learner.write, asyncio.Event()

    async def waits(announcement: Announcement) -> str:
        await is_back.wait()
        return await write(announcement)

    async def scene() -> list[int]:
        served: list[int] = []

        async def on_served(version: int) -> None:
            served.append(version)

        publishing = asyncio.create_task(
            publisher.publish(learner.announce(1), on_served=on_served)
        )
        await asyncio.sleep(0)
        publisher.lose_source()
        await asyncio.sleep(0.7)
        publisher.source_is_back()
        is_back.set()
        await publishing
        return served

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "write", waits)
        patch.setattr(engine, "receive", _breaks_off)
        assert asyncio.run(scene()) == [1]


async def _breaks_off(announcement: Announcement) -> None:
    return None


def test_engines_that_a_broken_broadcast_did_not_reach_read_from_disk(tmp_path: Path) -> None:
    """One of three is lost in the broadcast, and the group breaks before the third has it."""
    learner, groups = FakeLearner(tmp_path), Groups()
    engines = [FakeEngine(learner, f"rollout-{number}") for number in range(3)]
    publisher = make_publisher(learner, *engines, groups=groups)
    learner.failure, engines[1].lost, engines[2].unreached = "connection closed", True, True
    assert publish(publisher, learner.announce(1)) == [1]
    assert [engine.version for engine in engines] == [1, -1, 1]
    assert publisher.serving == (engines[0], engines[2])
    learner.failure = None
    for engine in engines:
        engine.lost = engine.unreached = False
    assert publish(publisher, learner.announce(2)) == [2]
    assert groups.formed == [
        ("rollout-0", "rollout-1", "rollout-2"),
        ("rollout-0", "rollout-2"),
    ]
    assert publisher.outcomes["mismatch"] == 0


def test_engine_that_runs_again_before_its_broadcast_ends_counts_as_lost(tmp_path: Path) -> None:
    """Its process died in the broadcast, and the next one is ready when the others read."""
    learner = FakeLearner(tmp_path)
    first, second = FakeEngine(learner, "rollout-0"), FakeEngine(learner, "rollout-1")
    publisher = make_publisher(learner, first, second)

    async def die_and_come_back() -> None:
        publisher.lose(second)
        second.unreached = True

    second.before_receive, learner.failure = die_and_come_back, "connection closed"
    assert publish(publisher, learner.announce(1)) == [1]
    assert (first.version, second.version) == (1, -1)
    second.before_receive, second.unreached, learner.failure = None, False, None
    assert asyncio.run(publisher.restore(second))
    assert publish(publisher, learner.announce(2)) == [2]
    assert (first.version, second.version) == (2, 2)
