"""A learner and engines for tests of the publisher: real decoders, no Ray, no processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.model import Decoder, ModelConfig, checksum, score_tokens, take_snapshot
from dapo_async.weights import Announcement, Attestation, Manifest, Publisher
from dapo_async.weights.disk import read_version, write_version

Weights = Mapping[str, Tensor]
Transport = Literal["broadcast", "disk"]
TINY = ModelConfig.from_dict(
    {
        "model_type": "qwen3",
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
)


def make_decoder(seed: int) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(TINY)


class FakeLearner:
    """Holds a snapshot and sends it.

    `sends`: weights that it broadcasts instead of the announced ones. `failure`: why its broadcasts
    break off.
    """

    def __init__(self, folder: Path, *, seed: int = 0) -> None:
        self.model, self.folder = make_decoder(seed), folder
        self.sends: Weights | None = None
        self.failure: str | None = None
        self.weights: Weights = {}
        self.answer = np.zeros(0, np.float32)  # to the probe
        self.expected: tuple[Mapping[str, str], ...] = ()  # hashes of servers
        self.received: Weights = {}  # what engines receive from the broadcast in flight

    def announce(self, version: int) -> Announcement:
        snapshot = take_snapshot(self.model, version=version, probe_tokens=8)
        self.weights = snapshot.copy.whole()
        self.answer = score_tokens(self.model, snapshot.probe_ids)
        return Announcement(
            "first",
            version,
            Manifest.of(self.weights),
            checksum(self.weights),
            snapshot.probe_ids,
            self.answer,
        )

    async def checksum(self, announcement: Announcement) -> str:
        return checksum(self.weights)

    async def probe(self, announcement: Announcement) -> NDArray[np.float32]:
        return self.answer

    async def server_hashes(self, announcement: Announcement) -> tuple[Mapping[str, str], ...]:
        return self.expected

    async def broadcast(self, announcement: Announcement) -> str | None:
        copies = {name: tensor.clone() for name, tensor in self.weights.items()}
        self.received = self.sends or copies
        return self.failure

    async def write(self, announcement: Announcement) -> str:
        write_version(self.weights, self.folder, version=announcement.version)
        return str(self.folder)


class FakeEngine:
    """Loads what it gets and attests it.

    While `lost`, it answers None; while `unreached`, no broadcast reaches it. `loads`: weights that
    it loads instead of what it gets.
    `keeps_weights`: it loads nothing. `same_layout`: its checksums compare with the learner's.
    `own_checksums`: its next checksums for engines of the same layout. `before_receive`: awaited
    before it takes part in a broadcast.
    """

    def __init__(self, learner: FakeLearner, name: str = "rollout-0", *, seed: int = 99) -> None:
        self.name, self.learner, self.model = name, learner, make_decoder(seed)
        self.version = -1
        self.lost = self.unreached = False
        self.loads: Weights | None = None
        self.keeps_weights, self.same_layout = False, True
        self.own_checksums: list[str] = []
        self.hashes: list[tuple[Mapping[str, str], ...]] = []  # of a server, the next ones
        self.before_receive: Callable[[], Awaitable[None]] | None = None
        self.quarantined: list[int] = []  # the versions that were wrong
        self.confirmed: list[int] = []

    async def receive(self, announcement: Announcement) -> Attestation | None:
        await asyncio.sleep(0)
        if self.before_receive is not None:
            await self.before_receive()
        if self.lost or self.unreached:
            return None
        return self._load(announcement, self.learner.received)

    async def read(self, announcement: Announcement, folder: str) -> Attestation | None:
        if self.lost:
            return None
        return self._load(announcement, read_version(Path(folder), version=announcement.version))

    async def quarantine(self) -> None:
        self.quarantined.append(self.version)

    async def confirm(self) -> None:
        self.confirmed.append(self.version)

    def _load(self, announcement: Announcement, weights: Weights) -> Attestation:
        probe_before = score_tokens(self.model, announcement.probe_ids)
        checksum_before = checksum(self.model.state_dict())
        if not self.keeps_weights:
            self.model.load_state_dict(dict(self.loads or weights))
        self.version = announcement.version
        attestation = Attestation(
            self.name,
            "first",
            self.version,
            probe_before,
            score_tokens(self.model, announcement.probe_ids),
            checksum_before if self.same_layout else None,
            checksum(self.model.state_dict()) if self.same_layout else None,
        )
        if self.hashes:
            hashes = self.hashes.pop(0)
            own = str(sorted(hashes[0].items()) + sorted(hashes[-1].items()))
            return replace(attestation, hashes=hashes, own_checksum=own)
        if self.own_checksums:
            return replace(attestation, own_checksum=self.own_checksums.pop(0))
        return attestation


class Groups:
    """Records the process groups that the publisher forms."""

    def __init__(self) -> None:
        self.formed: list[tuple[str, ...]] = []
        self.absent: frozenset[str] | None = None  # receivers that are lost while a group forms

    async def form(self, names: Sequence[str]) -> frozenset[str] | None:
        self.formed.append(tuple(names))
        return self.absent


def make_publisher(
    learner: FakeLearner,
    *engines: FakeEngine,
    transport: Transport = "broadcast",
    groups: Groups | None = None,
    deadline_s: float = 5.0,
    tolerance: float = 1e-3,
) -> Publisher:
    return Publisher(
        learner,
        engines,
        transport=transport,
        tolerance=tolerance,
        deadline_s=deadline_s,
        regroup=groups.form if groups else None,
    )


def publish(publisher: Publisher, announcement: Announcement) -> list[int]:
    """One publish; returns the versions that were served."""
    served: list[int] = []

    async def on_served(version: int) -> None:
        served.append(version)

    asyncio.run(publisher.publish(announcement, on_served=on_served))
    return served
