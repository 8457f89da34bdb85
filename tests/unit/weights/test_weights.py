"""Publishing without Ray: real gloo groups on threads, real folders, real decoders; the handshake sees what is wrong."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dapo_async.model import Decoder, ModelConfig, checksum, open_store, score_tokens, take_snapshot
from dapo_async.weights import Announcement, Attestation, Manifest, Publisher, WeightGroup
from dapo_async.weights.disk import read_version, write_version
from dapo_async.weights.handshake import HandshakeOutcome, check_attestation
from dapo_async.weights.publisher import HandshakeError

TINY = ModelConfig.from_dict(
    {
        "model_type": "qwen3", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    }
)  # fmt: skip


def decoder(seed):
    torch.manual_seed(seed)
    return Decoder(TINY)


def announce(model, version):
    snapshot = take_snapshot(model, version=version, probe_tokens=8)
    announcement = Announcement(
        "first",
        version,
        Manifest.of(snapshot.weights),
        checksum(snapshot.weights),
        snapshot.probe_ids,
        snapshot.probe_logprobs,
    )
    return snapshot, announcement


class Learner:
    """Holds the snapshot and sends it; `sends` lets a test send something else than was announced."""

    def __init__(self, model, folder) -> None:
        self.model, self.folder, self.sends = model, folder, None

    def announce(self, version):
        self.snapshot, announcement = announce(self.model, version)
        return announcement

    async def broadcast(self, announcement) -> None:
        self.wire = self.sends or {
            name: tensor.clone() for name, tensor in self.snapshot.weights.items()
        }

    async def write(self, announcement):
        write_version(self.snapshot.weights, self.folder, version=announcement.version)
        return str(self.folder)


class Engine:
    def __init__(self, learner, seed=99) -> None:
        self.name, self.learner, self.model, self.version, self.quarantined = (
            "rollout-0",
            learner,
            decoder(seed),
            -1,
            [],
        )
        self.confirmed = []

    def _load(self, announcement, weights):
        before, sum_before = (
            score_tokens(self.model, announcement.probe_ids),
            checksum(self.model.state_dict()),
        )
        self.model.load_state_dict(weights)
        self.version = announcement.version
        after = score_tokens(self.model, announcement.probe_ids)
        return Attestation(
            self.name,
            "first",
            self.version,
            before,
            after,
            sum_before,
            checksum(self.model.state_dict()),
        )

    async def receive(self, announcement):
        await asyncio.sleep(0)
        return self._load(announcement, self.learner.wire)

    async def read(self, announcement, folder):
        return self._load(announcement, read_version(folder, version=announcement.version))

    async def quarantine(self, on) -> None:
        self.quarantined.append(on)

    async def confirm(self) -> None:
        self.confirmed.append(self.version)


def publish(publisher, announcement):
    served = []

    async def on_served(version) -> None:
        served.append(version)

    asyncio.run(publisher.publish(announcement, on_served=on_served))
    return served


def publisher_of(learner, engine, transport="broadcast"):
    return Publisher(learner, [engine], transport=transport, tolerance=1e-3, deadline_s=5)


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_published_weights_are_served_and_pass_the_handshake(transport, tmp_path: Path) -> None:
    learner = Learner(decoder(0), tmp_path)
    engine = Engine(learner)
    publisher = publisher_of(learner, engine, transport)
    assert publish(publisher, learner.announce(1)) == [1]
    assert publisher.outcomes == {"passed": 1}
    assert checksum(engine.model.state_dict()) == checksum(learner.model.state_dict())


def test_publishing_the_same_weights_again_is_inconclusive_never_passed(tmp_path: Path) -> None:
    learner = Learner(decoder(0), tmp_path)
    publisher = publisher_of(learner, Engine(learner, seed=0))
    publish(publisher, learner.announce(1))
    assert publisher.outcomes == {"inconclusive": 1}


def test_an_engine_that_skipped_the_update_is_quarantined_and_reloaded_from_disk(
    tmp_path: Path,
) -> None:
    learner = Learner(decoder(0), tmp_path)
    engine = Engine(learner)
    learner.sends = dict(
        engine.model.state_dict()
    )  # the broken line: the engine gets its own old weights
    publisher = publisher_of(learner, engine)
    assert publish(publisher, learner.announce(1)) == [1]
    assert publisher.outcomes == {"mismatch": 1, "passed": 1}
    assert engine.quarantined == [True, False]
    assert engine.confirmed == [1]
    assert checksum(engine.model.state_dict()) == checksum(learner.model.state_dict())


def test_a_second_mismatch_stops_the_run_with_both_values_and_serves_nothing(
    tmp_path: Path,
) -> None:
    learner = Learner(decoder(0), tmp_path)
    engine = Engine(learner)
    wrong = {name: tensor + 1 for name, tensor in engine.model.state_dict().items()}
    engine._load_right = engine._load
    engine._load = lambda announcement, weights: engine._load_right(announcement, wrong)
    publisher = publisher_of(learner, engine)
    announcement = learner.announce(3)
    with pytest.raises(
        HandshakeError,
        match=f"wrong weights twice.*{checksum(wrong)[:12]}.*{announcement.checksum[:12]}",
    ):
        publish(publisher, announcement)
    assert engine.quarantined == [True]
    assert engine.confirmed == []


def test_the_judge_compares_versions_incarnations_and_probes_where_no_checksum_can() -> None:
    learner = Learner(decoder(0), None)
    announcement = learner.announce(4)
    before = announcement.probe_logprobs + np.float32(0.5)
    good = Attestation("rollout-0", "first", 4, before, announcement.probe_logprobs)
    assert check_attestation(announcement, good, tolerance=1e-3).outcome is HandshakeOutcome.PASSED
    assert (
        check_attestation(
            announcement, replace(good, probe_before=good.probe_after), tolerance=1e-3
        ).outcome
        is HandshakeOutcome.INCONCLUSIVE
    )
    assert (
        check_attestation(announcement, replace(good, probe_after=before), tolerance=1e-3).outcome
        is HandshakeOutcome.MISMATCH
    )
    assert (
        check_attestation(
            announcement, replace(good, probe_after=before * np.nan), tolerance=1e-3
        ).outcome
        is HandshakeOutcome.MISMATCH
    )
    stale = check_attestation(announcement, replace(good, version=3), tolerance=1e-3)
    assert stale.outcome is HandshakeOutcome.MISMATCH
    assert "serves version 3 of first, the learner published version 4 of first" in stale.detail
    assert (
        check_attestation(announcement, replace(good, incarnation="other"), tolerance=1e-3).outcome
        is HandshakeOutcome.MISMATCH
    )


def test_engines_of_one_layout_are_held_against_the_first_that_proved_the_version(
    tmp_path: Path,
) -> None:
    learner = Learner(decoder(0), tmp_path)
    engines = [Engine(learner, seed) for seed in (1, 2, 3)]
    sums = {
        "rollout-0": ["aa" * 8],
        "rollout-1": ["bb" * 8, "aa" * 8],
        "rollout-2": ["aa" * 8],
    }  # the second's are right after its reload only
    for number, engine in enumerate(engines):
        engine.name = f"rollout-{number}"
        engine._load = lambda announcement, weights, engine=engine, load=engine._load: replace(
            load(announcement, weights), own_checksum=sums[engine.name].pop(0)
        )
    publisher = Publisher(learner, engines, transport="broadcast", tolerance=1e-3, deadline_s=5)
    assert publish(publisher, learner.announce(1)) == [1]
    assert publisher.outcomes == {
        "mismatch": 1,
        "passed": 2,
        "inconclusive": 1,
    }  # the reload brought what was there
    assert [engine.quarantined for engine in engines] == [[], [True, False], []]

    sums |= {"rollout-0": ["cc" * 8], "rollout-1": ["dd" * 8] * 2, "rollout-2": ["cc" * 8]}
    line = "rollout-1 serves weights dddddddddddd, rollout-0 cccccccccccc, both as version 2"
    with pytest.raises(
        HandshakeError, match=f"wrong weights twice: first {line}; after a reload from disk {line}"
    ):
        publish(publisher, learner.announce(2))


@pytest.mark.parametrize("bucket_bytes", [1, 300, 10**9])
def test_a_real_broadcast_delivers_every_bit_to_every_engine(bucket_bytes) -> None:
    weights = dict(decoder(0).state_dict()) | {"half": torch.arange(5, dtype=torch.bfloat16)}
    manifest = Manifest.of(weights)
    assert all(
        len(bucket) == 1 or sum(spec.num_bytes for spec in bucket) <= bucket_bytes
        for bucket in manifest.buckets(bucket_bytes)
    )
    store = open_store("127.0.0.1", timeout_s=20)
    received = {}

    def engine(rank) -> None:
        address = ("127.0.0.1", store.port)
        group = WeightGroup.join(
            address, rank=rank, world_size=3, host="127.0.0.1", device="cpu", timeout_s=20
        )
        received[rank] = group.receive(manifest, bucket_bytes=bucket_bytes)

    threads = [threading.Thread(target=engine, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    sender = WeightGroup(store, rank=0, world_size=3, host="127.0.0.1", device="cpu", timeout_s=20)
    sender.send(weights, manifest, bucket_bytes=bucket_bytes)
    for thread in threads:
        thread.join(20)
    assert {rank: checksum(got) for rank, got in received.items()} == dict.fromkeys(
        (1, 2), checksum(weights)
    )


def test_an_engine_that_never_joins_fails_the_broadcast_within_the_deadline() -> None:
    store = open_store("127.0.0.1", timeout_s=2)
    with pytest.raises(RuntimeError):
        WeightGroup(store, rank=0, world_size=2, host="127.0.0.1", device="cpu", timeout_s=2)


def test_a_late_engine_is_named_by_the_deadline(tmp_path: Path) -> None:
    learner = Learner(decoder(0), tmp_path)
    engine = Engine(learner)

    async def never(announcement) -> None:
        await asyncio.sleep(60)

    engine.receive = never
    publisher = Publisher(learner, [engine], transport="broadcast", tolerance=1e-3, deadline_s=0.2)
    with pytest.raises(
        TimeoutError, match=r"publish of version 7: the learner waited 0.2 s for rollout-0"
    ):
        publish(publisher, learner.announce(7))


def test_only_the_newest_versions_stay_on_disk(tmp_path: Path) -> None:
    for version in range(4):
        write_version({"w": torch.tensor([float(version)])}, tmp_path, version=version)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_000002", "version_000003"]
    assert read_version(tmp_path, version=3)["w"].item() == 3.0


def test_a_snapshot_is_taken_only_when_the_publish_before_it_is_done(tmp_path: Path) -> None:
    learner = Learner(decoder(0), tmp_path)
    engine = Engine(learner)
    publisher = publisher_of(learner, engine)
    events = []

    async def slow(announcement):
        await asyncio.sleep(0.05)
        events.append(f"received {announcement.version}")
        return engine._load(announcement, learner.wire)

    async def snapshot(version):
        events.append(f"snapshot {version}")
        return learner.announce(version)

    async def on_served(version) -> None:
        events.append(f"served {version}")

    async def two_steps() -> None:
        await publisher.start(snapshot(1), on_served=on_served)
        events.append("step")
        await publisher.start(snapshot(2), on_served=on_served)
        await publisher.finish()

    engine.receive = slow
    asyncio.run(two_steps())
    assert events == [
        "snapshot 1",
        "step",
        "received 1",
        "served 1",
        "snapshot 2",
        "received 2",
        "served 2",
    ]


class Fragile(Engine):
    """An engine whose server may be gone: it answers None then."""

    def __init__(self, learner, name) -> None:
        super().__init__(learner)
        self.name, self.gone = name, False

    async def receive(self, announcement):
        return None if self.gone else await super().receive(announcement)

    async def read(self, announcement, folder):
        return None if self.gone else await super().read(announcement, folder)

    def _load(self, announcement, weights):
        attestation = super()._load(announcement, weights)
        return replace(attestation, engine=self.name)


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_lost_engine_is_passed_over_until_it_has_proved_the_newest_version(
    transport, tmp_path: Path
) -> None:
    learner, groups = Learner(decoder(0), tmp_path), []
    first, second = Fragile(learner, "rollout-0"), Fragile(learner, "rollout-1")

    async def regroup(names) -> None:
        groups.append(tuple(names))

    publisher = Publisher(
        learner, [first, second], transport=transport, tolerance=1e-3, deadline_s=5, regroup=regroup
    )

    async def play() -> None:
        served = []

        async def on_served(version) -> None:
            served.append(version)

        async def publish(version) -> None:
            announcement = learner.announce(version)

            async def snapshot():
                return announcement

            await publisher.start(snapshot(), on_served=on_served)
            await publisher.finish()

        await publish(1)
        second.gone = True
        await publish(2)  # lost over it
        await publish(3)  # not even asked
        assert (first.version, second.version, served) == (3, 1, [1, 2, 3])
        assert not await publisher.restore(second)  # lost again over its first weights
        second.gone = False
        assert await publisher.restore(second)
        assert second.version == 3
        await publish(4)
        assert (first.version, second.version, served) == (4, 4, [1, 2, 3, 4])

    asyncio.run(play())
    both = ("rollout-0", "rollout-1")
    assert groups == ([both, ("rollout-0",), both] if transport == "broadcast" else [])
    assert publisher.outcomes["mismatch"] == 0


def test_engine_that_was_lost_and_came_back_between_two_publishes_joins_the_group_anew(
    tmp_path: Path,
) -> None:
    learner, groups = Learner(decoder(0), tmp_path), []
    engine = Fragile(learner, "rollout-0")

    async def regroup(names) -> None:
        groups.append(tuple(names))

    publisher = Publisher(
        learner, [engine], transport="broadcast", tolerance=1e-3, deadline_s=5, regroup=regroup
    )
    publish(publisher, learner.announce(1))
    publish(publisher, learner.announce(2))
    publisher.lose(engine)
    engine.version = -1
    assert asyncio.run(publisher.restore(engine))
    assert engine.version == 2
    publish(publisher, learner.announce(3))
    assert groups == [("rollout-0",), ("rollout-0",)]


def test_version_is_served_though_every_engine_is_lost_and_the_returning_one_starts_with_it(
    tmp_path: Path,
) -> None:
    learner = Learner(decoder(0), tmp_path)
    engine = Fragile(learner, "rollout-0")
    publisher = Publisher(learner, [engine], transport="broadcast", tolerance=1e-3, deadline_s=5)
    engine.gone = True
    assert publish(publisher, learner.announce(1)) == [1]
    assert publish(publisher, learner.announce(2)) == [2]
    assert publisher.last_pause_s == 0.0


def test_engine_that_is_back_before_the_publish_that_lost_it_has_ended_stays_back(
    tmp_path: Path,
) -> None:
    learner = Learner(decoder(0), tmp_path)
    first, second, gate = (
        Fragile(learner, "rollout-0"),
        Fragile(learner, "rollout-1"),
        asyncio.Event(),
    )
    receive = second.receive

    async def slow(announcement):
        await gate.wait()
        return await receive(announcement)

    async def nobody(version) -> None:
        pass

    async def play():
        first.receive, second.receive = (
            (lambda announcement: asyncio.sleep(0, None)),
            slow,
        )  # lost over it | late
        publisher = Publisher(
            learner, [first, second], transport="broadcast", tolerance=1e-3, deadline_s=5
        )
        publishing = asyncio.create_task(publisher.publish(learner.announce(1), on_served=nobody))
        await asyncio.sleep(0.01)
        publisher.lose(first)
        restoring = asyncio.create_task(publisher.restore(first))
        await asyncio.sleep(0.01)
        gate.set()
        await publishing
        assert await restoring
        return publisher.serving

    assert asyncio.run(play()) == (first, second)


def test_broadcast_that_broke_off_is_borne_when_an_engine_was_lost_in_it_and_only_then(
    tmp_path: Path,
) -> None:
    learner, groups = Learner(decoder(0), tmp_path), []
    engine = Fragile(learner, "rollout-0")

    async def broken(announcement) -> str:
        await Learner.broadcast(learner, announcement)
        return "connection closed by peer"

    async def regroup(names) -> None:
        groups.append(tuple(names))

    publisher = Publisher(
        learner, [engine], transport="broadcast", tolerance=1e-3, deadline_s=5, regroup=regroup
    )
    learner.broadcast, engine.gone = broken, True
    assert publish(publisher, learner.announce(1)) == [1]
    del learner.broadcast
    engine.gone = False
    publisher.newest = learner.announce(1)
    assert asyncio.run(publisher.restore(engine))
    assert publish(publisher, learner.announce(2)) == [2]
    assert groups == [("rollout-0",), ("rollout-0",)]
    learner.broadcast = broken
    with pytest.raises(
        RuntimeError,
        match="version 3 broke off, though every engine took part: connection closed by peer",
    ):
        publish(publisher, learner.announce(3))
