"""One learner rank as a Ray actor: batches in by reference, one step at a time; the first rank's snapshots out, sent while the next step runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from dapo_async.config import Config
from dapo_async.learner import LearnerRank, RankState, profiled, read_whole_weights, save_state
from dapo_async.model import (
    Mesh,
    Snapshot,
    build_mesh,
    checksum,
    export_folder,
    join_store,
    load_decoder,
    open_store,
    take_snapshot,
)
from dapo_async.runtime.actors.reports import LearnerReport, ProcessInfo
from dapo_async.runtime.cluster.connect import own_host
from dapo_async.tracking.run_dir import RunDir
from dapo_async.types import Group, StepMetrics, TrainBatch
from dapo_async.utils.checkpoint_dir import STATE
from dapo_async.utils.state_clock import StateClock
from dapo_async.utils.thread_stack import whereabouts
from dapo_async.weights import BUCKET_BYTES, Announcement, Manifest, WeightGroup
from dapo_async.weights.collective import SENDER
from dapo_async.weights.disk import write_version

PROBE_TOKENS = 16  # length of the handshake's probe prompt
PROFILED_STEPS = (3, 4, 5)  # past the first ones, which allocate and warm up
STATE_FOLDER = "learner"  # in the checkpoint's state/


class LearnerActor:
    """The rank steps in a thread of its own, so that the actor answers while it trains and sends while it trains on."""

    def __init__(
        self,
        config: Config,
        *,
        number: int,
        name: str,
        incarnation: str,
        run_dir: RunDir,
        resume: Path | None = None,
    ) -> None:
        """`number` in the mesh: the first rank, 0, publishes and writes. `resume`: the `state/` folder of the checkpoint to go on from."""
        self._config, self._number, self.name, self._incarnation, self._run_dir, self._resume = (
            config,
            number,
            name,
            incarnation,
            run_dir,
            resume,
        )
        torch.set_num_threads(max(1, int(config.learner.num_cpus)))
        torch.manual_seed(config.seed)
        self._clock = StateClock(name)
        self._device = (
            "cuda:0" if config.model.torch_device == "cuda" else "cpu"
        )  # Ray shows an actor its own GPU alone
        self._dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._stepping: int | None = None  # the thread of the step that runs
        self._between_steps = (
            asyncio.Lock()
        )  # held by a step, and by whoever reads what a step changes
        self._frozen_state: RankState | None = None
        self._snapshot: Snapshot | None = None
        self._store: dist.TCPStore | None = None
        self._mesh_store: dist.Store | None = None
        self._group: WeightGroup | None = None

    async def open_mesh(self) -> tuple[str, int]:
        """As the first of several ranks: opens their rendezvous on this node's interface."""
        host = own_host(self._config)
        store = open_store(host, timeout_s=self._config.deadlines.start_s)
        self._mesh_store = store
        return host, store.port

    async def ready(self, mesh_address: tuple[str, int] | None) -> ProcessInfo:
        """Meets the other ranks, where there are any, and loads this rank's shard."""
        await asyncio.to_thread(self._load, mesh_address)
        parameters = sum(parameter.numel() for parameter in self._rank.decoder.parameters())
        self._clock.enter("wait")
        return ProcessInfo.own(self.name, f"{parameters / 1e6:.2f} M parameters on {self._device}")

    def _load(self, mesh_address: tuple[str, int] | None) -> None:
        config, mesh = self._config, Mesh()
        if mesh_address is not None:
            store = self._mesh_store or join_store(mesh_address, timeout_s=config.deadlines.start_s)
            self._mesh_store = store
            mesh = build_mesh(
                store,
                rank=self._number,
                dp=config.learner.data_parallel,
                tp=config.learner.tensor_parallel,
                host=own_host(config),
                device=torch.device(self._device),
                timeout_s=config.deadlines.work_s,
            )
        decoder = load_decoder(
            Path(config.model.path), activations=self._dtype, device=self._device, mesh=mesh
        )
        self._mesh = mesh
        self._rank = LearnerRank(
            decoder, algorithm=config.algorithm, learner=config.learner, seed=config.seed, mesh=mesh
        )
        if self._resume is not None:
            self._rank.load(self._resume / STATE_FOLDER)

    async def alive(self) -> None:
        """Never returns: the driver watches it, for it ends with the actor's life."""
        await asyncio.Event().wait()

    async def ping(self) -> str | None:
        """Answers at once: the process lives and its event loop runs. Returns where the thread of the step is, or None between steps."""
        return whereabouts(self._stepping) if self._stepping is not None else None

    async def step(self, batch: TrainBatch, positions: Sequence[int]) -> StepMetrics:
        """Fetches this rank's share of the batch, the groups at `positions` of it, and trains on them."""
        # From the first on: whoever asks for a copy now gets it after the step, on every rank alike, though one may still be fetching.
        async with self._between_steps:
            with self._clock.during("fetch", f"step {batch.learner_version}"):
                groups: list[Group] = list(await asyncio.gather(*batch.references))
            version = self._rank.version
            assert version == batch.learner_version, (
                f"a batch for version {batch.learner_version} met the learner at {version}"
            )
            with self._clock.during("train", f"step {batch.learner_version}"):
                return await asyncio.to_thread(self._step, groups, positions, len(batch.group_ids))

    def _step(
        self, groups: Sequence[Group], positions: Sequence[int], num_groups: int
    ) -> StepMetrics:
        version, self._stepping = self._rank.version, threading.get_ident()
        wanted = self._config.learner.profile and version in PROFILED_STEPS
        try:
            with (
                profiled(self._run_dir.profile / f"{self.name}_step_{version:06d}.json.gz")
                if wanted
                else nullcontext()
            ):
                return self._rank.step(groups, positions=positions, num_groups=num_groups)
        finally:
            self._stepping = None

    async def snapshot(self) -> Announcement | None:
        """Freezes the current weights for the next publish and disk write; they replace the snapshot before. None but on the first rank."""
        async with self._between_steps:
            with self._clock.during("snapshot", f"version {self._rank.version}"):
                snapshot = await asyncio.to_thread(
                    take_snapshot,
                    self._rank.decoder,
                    version=self._rank.version,
                    probe_tokens=PROBE_TOKENS,
                    dtype=self._dtype,
                    mesh=self._mesh,
                )
        if not self._mesh.is_first:
            return None
        self._snapshot = snapshot
        return Announcement(
            incarnation=self._incarnation,
            version=snapshot.version,
            manifest=Manifest.of(snapshot.weights),
            checksum=await asyncio.to_thread(checksum, snapshot.weights),
            probe_ids=snapshot.probe_ids,
            probe_logprobs=snapshot.probe_logprobs,
        )

    async def open_group(self) -> tuple[str, int]:
        """Opens the rendezvous of the weight group on this node's interface; the workers join at the returned address."""
        host = own_host(self._config)
        self._group = None  # the one before, whose members have changed
        self._store = open_store(host, timeout_s=self._config.deadlines.answer_s)
        return host, self._store.port

    async def join(self, world_size: int) -> None:
        """Joins the weight group as its sender; returns when every worker has joined."""
        assert self._store is not None, "join before open_group"
        # A member that hangs is noticed while the publish can still do without it.
        host, timeout_s = own_host(self._config), self._config.deadlines.answer_s / 2
        self._group = await asyncio.to_thread(
            WeightGroup,
            self._store,
            rank=SENDER,
            world_size=world_size,
            host=host,
            device=self._device,
            timeout_s=timeout_s,
        )

    async def leave_group(self) -> None:
        """Its connections end, and with them the waiting of whoever was in it."""
        self._group = None

    async def broadcast(self, announcement: Announcement) -> None:
        assert self._group is not None, "broadcast before join"
        weights = self._frozen(announcement.version).weights
        await asyncio.to_thread(
            self._group.send,
            weights,
            announcement.manifest,
            bucket_bytes=BUCKET_BYTES,
        )

    async def write(self, announcement: Announcement, folder: Path | None = None) -> str:
        """Writes the snapshot for engines that load from disk, into the run's folder of versions if not told otherwise; returns the folder."""
        snapshot, folder = self._frozen(announcement.version), folder or self._run_dir.weights
        await asyncio.to_thread(write_version, snapshot.weights, folder, version=snapshot.version)
        return str(folder)

    async def version(self) -> int:
        """That of the weights between two steps: the step that runs is waited for."""
        async with self._between_steps:
            return self._rank.version

    async def capture_state(self) -> int:
        """Copies this rank's weights and optimizer state for `save`, between two steps: the one that runs is waited for. Returns their version."""
        async with self._between_steps:
            with self._clock.during("checkpoint", f"version {self._rank.version}"):
                self._frozen_state = None  # never two copies
                self._frozen_state = await asyncio.to_thread(self._rank.capture_state)
            return self._rank.version

    async def save(self, folder: Path) -> None:
        """Writes the captured state into the checkpoint `folder`, beside whatever the rank is doing; every rank its part, the first the export."""
        state, self._frozen_state = self._frozen_state, None
        assert state is not None, "save before capture_state"
        await asyncio.to_thread(self._write_checkpoint, state, folder)

    def _write_checkpoint(self, state: RankState, folder: Path) -> None:
        parts = folder / STATE / STATE_FOLDER
        save_state(state, parts, self._mesh)
        if self._mesh.is_first:
            shapes = {
                name: tuple(parameter.shape)
                for name, parameter in self._rank.decoder.named_parameters()
            }
            export_folder(
                shapes,
                lambda names: read_whole_weights(parts, {name: shapes[name] for name in names}),
                dtype=self._dtype,
                base=Path(self._config.model.path),
                out=folder,
            )

    async def report(self) -> LearnerReport:
        return LearnerReport(tuple(self._clock.take_spans()))

    def _frozen(self, version: int) -> Snapshot:
        assert self._snapshot is not None, f"version {version} asked for before any snapshot"
        assert self._snapshot.version == version, (
            f"version {version} asked for, the snapshot is of {self._snapshot.version}"
        )
        return self._snapshot
