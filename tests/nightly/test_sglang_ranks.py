"""Real SGLang servers and several ranks: two senders; a stale tensor on a server of two ranks."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from run_support import (
    TINY,
    check_checkpoint,
    check_conservation,
    check_token_flow,
    running,
)
from sglang_run_support import CONFIG, SERVERS, check_restarts, kill, replaced
from sglang_world import MAX_LEN, World, start_world
from torch import Tensor

from dapo_async import config as knobs
from dapo_async.model import ModelConfig, read_weights
from dapo_async.rollout.sglang.client import SGLangClient
from dapo_async.runtime.actors.sglang_host import SGLangHost
from dapo_async.utils.state_clock import StateClock
from dapo_async.weights import Announcement, Attestation, Manifest, Publisher
from dapo_async.weights.collective import group_name
from dapo_async.weights.disk import write_version
from dapo_async.weights.publisher import HandshakeError
from dapo_async.weights.server_hashes import server_hashes

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
STALE = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.ray
@pytest.mark.parametrize(("ranks", "dies"), [(1, True), (2, False)])
def test_a_server_takes_the_weights_of_two_senders(ranks: int, dies: bool, tmp_path: Path) -> None:
    """A learner of two tensor-parallel ranks; a server of one that dies and joins again, or of two,
    which takes minutes to start on two cores."""
    more = ("learner.tensor_parallel=2", f"rollout.tensor_parallel={ranks}", "learner.lr=1e-3")
    steps = ("train.num_steps=5000", "train.checkpoint_every_steps=1000", "deadlines.start_s=300")
    with running(tmp_path / "run", *TINY, *SERVERS, *more, *steps) as live:
        live.wait_for(r"^step +6/", timeout_s=300.0)
        if dies:
            replaced(live, "rollout-0", kill)
        os.kill(live.driver, signal.SIGTERM)
        run = live.finish(timeout_s=90.0)
    summary = run.summary
    assert (run.exit_code, summary["status"]) == (143, "interrupted"), run.output
    check_conservation(summary["groups"])
    check_token_flow(summary["token_flow"])
    check_restarts(run, **({"rollout-0": 1} if dies else {}))
    assert "mismatch" not in summary["handshake"], run.output
    # Small updates leave some probes as they were; servers on CPUs have no hashes in a run.
    assert summary["handshake"]["passed"] >= summary["steps"] // 2
    # A wrong or missing half of the weights would show here.
    fresh = [row["mismatch_k3"] for row in run.metrics if row["staleness_max"] == 0]
    assert fresh
    assert max(fresh) < 1e-4
    log = (run.root / "engines" / "rollout-0.log").read_text()
    joined = set(re.findall(rf"group_name='?({group_name(0)}(?: \d+)?)[',]", log))
    assert joined == {group_name(0), group_name(1)}
    check_checkpoint(run.checkpoint)


class Folders:
    """A learner whose versions are folders; `wrong` ones are what it writes instead."""

    def __init__(self, root: Path, config: ModelConfig) -> None:
        self.root, self.config = root, config
        self.weights: dict[str, Tensor] = {}
        self.wrong: dict[str, Tensor] = {}

    def announce(self, version: int, folder: Path) -> Announcement:
        self.weights, self.wrong = read_weights(folder), {}
        probe = np.random.default_rng(version).integers(1, 90, 16).astype(np.int32)
        logprobs = np.zeros(15, np.float32)  # the tolerance is so large that hashes decide
        return Announcement(
            "first", version, Manifest.of(self.weights), str(version), probe, logprobs
        )

    async def checksum(self, announcement: Announcement) -> str:
        return str(announcement.version)

    async def probe(self, announcement: Announcement) -> NDArray[np.float32]:
        return announcement.probe_logprobs

    async def server_hashes(self, announcement: Announcement) -> tuple[Mapping[str, str], ...]:
        return server_hashes(self.weights, self.config, tensor_parallel=2, cuda=False)

    async def broadcast(self, announcement: Announcement) -> str | None:
        raise AssertionError("the transport is disk")

    async def write(self, announcement: Announcement) -> str:
        write_version({**self.weights, **self.wrong}, self.root, version=announcement.version)
        return str(self.root)


class Host(SGLangHost):
    """The engine's side of a run, on a server of the test, which has hashes as on a GPU."""

    def __init__(self, world: World, root: Path) -> None:
        config = knobs.load(CONFIG, ["rollout.num_slots=16", "model.dtype=float32"])
        super().__init__(
            config,
            name="rollout-0",
            number=0,
            incarnation="first",
            device="cuda",
            clock=StateClock("rollout-0"),
            logs=root,
            outer_key="",
        )
        self._world, self.name, self.max_len = world, "rollout-0", MAX_LEN
        self.num_quarantined = 0

    async def _connect(self) -> SGLangClient:
        return self._world.client()

    async def receive(self, announcement: Announcement) -> Attestation:
        raise AssertionError("the transport is disk")

    async def quarantine(self) -> None:
        self.num_quarantined += 1

    async def confirm(self) -> None:
        pass


def test_a_stale_tensor_of_a_real_server_ends_a_run_with_its_name(tmp_path: Path) -> None:
    world = start_world("qwen3", tmp_path / "world", tensor_parallel=2)
    learner = Folders(tmp_path / "versions", ModelConfig.from_folder(world.folder))

    async def published() -> tuple[Publisher, Host]:
        host = Host(world, tmp_path)
        await host.start()
        publisher = Publisher(learner, [host], transport="disk", tolerance=1000.0, deadline_s=120.0)

        async def on_served(version: int) -> None:
            pass

        try:
            await publisher.publish(learner.announce(1, world.folder), on_served=on_served)
            await publisher.publish(learner.announce(2, world.other_folder), on_served=on_served)
            stale = learner.announce(3, world.folder)
            learner.wrong = {STALE: learner.weights[STALE] + 1e-3}
            line = f"wrong weights twice: first rollout-0 serves another {STALE} on its rank 0 "
            with pytest.raises(HandshakeError, match=line):
                await publisher.publish(stale, on_served=on_served)
        finally:
            await host.engine.close()
        return publisher, host

    try:
        publisher, host = asyncio.run(published())
    finally:
        asyncio.run(world.server.close())
    assert publisher.outcomes == {"passed": 1, "inconclusive": 1, "mismatch": 2}
    assert host.num_quarantined == 1
