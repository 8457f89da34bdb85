"""One learner rank as a Ray actor.

Minibatches come in by reference, one at a time. The first rank's weight snapshots go out to the
engines while the next step runs.

This module must not import torch, because the driver imports it: `model.Mesh` imports it at its
first use.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from dapo_async import learner, model, weights
from dapo_async.config import Config
from dapo_async.model.peak import Peak, device_peak
from dapo_async.replay.group_io import unpack_group
from dapo_async.runtime.actors.once import answers_once
from dapo_async.runtime.actors.reports import LearnerReport, ProcessInfo
from dapo_async.runtime.cluster import limits
from dapo_async.runtime.cluster.network import own_host, use_network
from dapo_async.runtime.cluster.ports import ports_of_run
from dapo_async.tracking.run_dir import RunDir
from dapo_async.types import Group, StateUnusable, StepMetrics, TrainBatch
from dapo_async.utils.checkpoint_dir import LEARNER_FOLDER, STATE
from dapo_async.utils.machine import machine_bytes
from dapo_async.utils.manifest import MANIFEST, FileCheck
from dapo_async.utils.state_clock import StateClock
from dapo_async.utils.thread_stack import process_dump, stack_location
from dapo_async.weights import BUCKET_BYTES, Announcement, Manifest

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import Tensor

    from dapo_async.learner import RankState
    from dapo_async.learner.batch_plan import RankShare
    from dapo_async.model import Layout, Mesh, Snapshot
    from dapo_async.weights import WeightGroup

P = ParamSpec("P")
T = TypeVar("T")
PROBE_TOKENS = 16  # length of the handshake's probe prompt
PROFILED_STEPS = (3, 4, 5)  # after the first ones, which allocate and warm up


@answers_once
class LearnerActor:
    """The rank steps in a thread of its own, so that the actor answers and sends meanwhile."""

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
        """`number`: position in the mesh; rank 0 publishes and writes. `resume`: the `state/`
        folder of the checkpoint to resume from."""
        self.name, self._number, self._incarnation = name, number, incarnation
        self._config, self._run_dir, self._resume = config, run_dir, resume
        self._clock = StateClock(name)
        limits.raise_open_files()
        import torch

        torch.set_num_threads(max(1, int(config.model.num_cpus)))
        torch.manual_seed(config.seed)
        # Ray shows an actor its own GPU only.
        self._device = "cuda:0" if config.model.torch_device == "cuda" else "cpu"
        self._dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._peak: Peak | None = None  # of the device, after the first report
        self._stepping: int | None = None  # the thread of the step that runs
        # Held during a step, and while something is read that a step changes.
        self._between_steps = asyncio.Lock()
        self._frozen_state: RankState | None = None
        self._layout: Layout | None = None
        self._snapshot: Snapshot | None = None
        self._num_readers = 0  # of the snapshot's copy
        self._checksum: asyncio.Task[str] | None = None  # of the snapshot
        self._answer: asyncio.Task[NDArray[np.float32]] | None = None  # to its probe
        self._whole: dict[Path, Mapping[str, Tensor]] = {}  # what `write` is to write, by folder
        self._store: dist.TCPStore | None = None
        self._mesh_store: dist.Store | None = None
        self._group: WeightGroup | None = None

    async def open_mesh(self) -> tuple[str, int]:
        """On the first of several ranks: opens their rendezvous on this node's interface."""
        host, ports = own_host(self._config), ports_of_run(self._config)
        store = model.open_store(host, timeout_s=self._config.deadlines.start_s, ports=ports)
        self._mesh_store = store
        return host, store.port

    async def ready(self, mesh_address: tuple[str, int] | None) -> ProcessInfo:
        """Meets the other ranks, where there are any, and loads this rank's shard."""
        if (fault := limits.open_files_fault(self._config)) is not None:
            raise ValueError(fault)
        await asyncio.to_thread(self._load, mesh_address)
        parameters = sum(parameter.numel() for parameter in self._rank.decoder.parameters())
        self._clock.enter("wait")
        detail = f"{parameters / 1e6:.2f} M parameters on {self._device}; {self._choice}"
        if self._rank.attention_kernel is not None:
            detail += f"; attention by {self._rank.attention_kernel}"
        return ProcessInfo.own(self.name, detail)

    async def microbatch_tokens(self) -> int:
        """What a microbatch holds at most: given, or chosen by memory."""
        return self._microbatch_tokens

    def _load(self, mesh_address: tuple[str, int] | None) -> None:
        import torch

        from dapo_async.learner.memory_choice import choose_by_memory

        config, mesh = self._config, model.Mesh()
        use_network(config)
        if mesh_address is not None:
            store = self._mesh_store or model.join_store(
                mesh_address, timeout_s=config.deadlines.start_s
            )
            self._mesh_store = store
            mesh = model.build_mesh(
                store,
                rank=self._number,
                dp=config.learner.data_parallel,
                cp=config.learner.context_parallel,
                tp=config.learner.tensor_parallel,
                host=own_host(config),
                device=torch.device(self._device),
                timeout_s=config.deadlines.work_s,
            )
        choice = choose_by_memory(
            config,
            model.ModelConfig.from_folder(Path(config.model.path)),
            device_bytes=self._device_bytes(mesh),
        )
        self._choice, self._microbatch_tokens = (
            choice.line,
            choice.learner.fixed_microbatch_tokens,
        )
        summed = config.learner.reduce_dtype if choice.learner.zero_stage != 1 else "float32"
        decoder = model.load_decoder(
            Path(config.model.path),
            activations=self._dtype,
            reduce_dtype=getattr(torch, summed),
            device=self._device,
            mesh=mesh,
        )
        self._mesh, self._layout = mesh, model.Layout.of(decoder, mesh)
        self._rank = learner.LearnerRank(
            decoder,
            algorithm=config.algorithm,
            learner=choice.learner,
            mesh=mesh,
            guards=config.train.guards,
        )
        if self._resume is not None:
            self._choice += f"; {self._load_state(self._resume)}"

    def _load_state(self, state: Path) -> str:
        """Loads the files of a checkpoint that this rank needs, each compared with its checksum;
        returns a line about that."""
        try:
            check = FileCheck(state.parent, state / MANIFEST)
            self._rank.load(state / LEARNER_FOLDER, check=check)
        except (ValueError, OSError) as error:
            raise StateUnusable(str(error)) from error
        return check.line

    def _device_bytes(self, mesh: Mesh) -> int:
        """Memory of the smallest device of all ranks: they choose alike."""
        import torch

        own = machine_bytes()
        if self._device != "cpu":
            own = torch.cuda.get_device_properties(self._device).total_memory
        every = mesh.every.stack(torch.tensor(own, device=self._device))
        return int(every.min())

    async def alive(self) -> None:
        """Never returns: the driver watches it to learn of the actor's end."""
        await asyncio.Event().wait()

    async def ping(self) -> str | None:
        """Shows that the process lives and its event loop runs. Returns the current line of the
        step's thread, or None between steps."""
        return stack_location(self._stepping) if self._stepping is not None else None

    async def minibatch(self, batch: TrainBatch) -> StepMetrics:
        """Fetches this rank's share of the batch and trains on it.

        The minibatch that closes a step ends it.
        """
        # Locked before the fetch: a copy asked for now is taken after the step on every rank, even
        # on one that still fetches.
        async with self._between_steps:
            with self._clock.during("fetch", f"step {batch.learner_version}"):
                (reference,) = batch.references
                share, packed = await reference
                groups = [unpack_group(data) for data in packed]
            version = self._rank.version
            assert version == batch.learner_version, (
                f"a batch for version {batch.learner_version} met the learner at {version}"
            )
            with self._clock.during("train", f"step {batch.learner_version}"):
                return await asyncio.to_thread(self._minibatch, groups, share, batch)

    def _minibatch(
        self, groups: Sequence[Group], share: RankShare, batch: TrainBatch
    ) -> StepMetrics:
        version, self._stepping = self._rank.version, threading.get_ident()
        wanted = self._config.learner.profile and version in PROFILED_STEPS
        trace = f"{self.name}_step_{version:06d}"
        if self._config.learner.num_minibatches > 1:
            trace += f"_update_{self._rank.num_updates}"
        try:
            with (
                learner.profiled(self._run_dir.profile / f"{trace}.json.gz")
                if wanted
                else nullcontext()
            ):
                metrics = self._rank.minibatch(
                    groups,
                    share=share,
                    more=not batch.closes_step,
                    num_halvings=batch.num_halvings,
                )
            if batch.closes_step:
                self._rank.end_step()
            return metrics
        finally:
            self._stepping = None

    async def end_step(self) -> None:
        """Ends a step early: the run ends, or a loss was not finite."""
        async with self._between_steps:
            self._rank.end_step()

    async def snapshot(self) -> Announcement | None:
        """Copies the current weights for the next publish; replaces the snapshot before.
        Returns None on all ranks but the first."""
        async with self._between_steps:
            with self._clock.during("snapshot", f"version {self._rank.version}"):
                before, self._snapshot = self._snapshot, None
                snapshot = await asyncio.to_thread(
                    model.take_snapshot,
                    self._rank.decoder,
                    version=self._rank.version,
                    probe_tokens=PROBE_TOKENS,
                    nonce=self._incarnation,
                    dtype=self._dtype,
                    mesh=self._mesh,
                    layout=self._layout,
                    over=before.copy if before is not None and not self._num_readers else None,
                )
        self._snapshot = snapshot
        self._checksum = asyncio.create_task(self._reading(snapshot.copy.checksum))
        # Before the next call that changes the weights: it waits for the same lock, behind this.
        self._answer = asyncio.create_task(self._answer_probe(snapshot))
        if not self._mesh.is_first:
            return None
        return Announcement(
            incarnation=self._incarnation,
            version=snapshot.version,
            manifest=Manifest.of_copy(
                snapshot.copy, num_senders=self._config.learner.tensor_parallel
            ),
            checksum=None,
            probe_ids=snapshot.probe_ids,
            probe_logprobs=np.zeros(0, np.float32),
        )

    async def _answer_probe(self, snapshot: Snapshot) -> NDArray[np.float32]:
        async with self._between_steps:
            with self._clock.during("snapshot", f"probe of version {snapshot.version}"):
                return await asyncio.to_thread(
                    model.score_tokens, self._rank.decoder, snapshot.probe_ids
                )

    async def probe(self, announcement: Announcement) -> NDArray[np.float32]:
        """The answer to the probe by the weights of the snapshot."""
        self._frozen(announcement.version)
        assert self._answer is not None, "a snapshot has an answer"
        return await asyncio.shield(self._answer)

    async def sleep(self) -> None:
        """Gives its device to the engines: everything on it moves to host memory. Calls about the
        snapshot and about the state of a checkpoint are answered from there."""
        async with self._between_steps:
            with self._clock.during("switch", "to the host"):
                if self._snapshot is not None:
                    if self._checksum is not None:
                        await self._checksum  # it reads the tensors that are moved
                    on_host = await asyncio.to_thread(self._snapshot.copy.on_host)
                    self._snapshot = replace(self._snapshot, copy=on_host)
                await asyncio.to_thread(self._rank.sleep)
            self._clock.enter("asleep")

    async def wake(self) -> None:
        """Takes its device back from the engines."""
        async with self._between_steps:
            with self._clock.during("switch", "to the device"):
                await asyncio.to_thread(self._rank.wake)
            self._clock.enter("wait")

    async def checksum(self, announcement: Announcement) -> str:
        """This rank's share in that of the snapshot, computed beside the next step."""
        self._frozen(announcement.version)
        assert self._checksum is not None, "a snapshot has a checksum"
        return await self._checksum

    async def server_hashes(self, announcement: Announcement) -> tuple[Mapping[str, str], ...]:
        """All ranks together: this rank's share of the hashes of some weights of the snapshot, as
        SGLang servers compute them, beside the next step."""
        snapshot = self._frozen(announcement.version)
        if self._config.rollout.engine != "sglang" or self._device == "cpu":
            return ()  # servers on a CPU are not asked for hashes
        return await self._reading(
            weights.hashes_of_copy,
            snapshot.copy,
            self._mesh.publishing,
            tensor_parallel=self._config.rollout.tensor_parallel,
            expert_parallel=weights.expert_parallel_of(self._config.rollout.server_flags),
            cuda=True,
            version=announcement.version,
        )

    async def open_group(self) -> tuple[str, int]:
        """Opens the rendezvous of the weight groups on this node's interface; returns the address
        at which the other senders and the workers join."""
        host, ports = own_host(self._config), ports_of_run(self._config)
        self._group = None  # the one before, whose members have changed
        self._store = model.open_store(host, timeout_s=self._config.deadlines.answer_s, ports=ports)
        return host, self._store.port

    async def join(self, address: tuple[str, int], world_size: int) -> None:
        """Joins this rank's weight group as its sender; returns when every worker has joined."""
        self._group = None
        # Half the deadline: the publish can still do without a member that hangs.
        host, timeout_s = own_host(self._config), self._config.deadlines.answer_s / 2
        # As a client: closing the rendezvous (`leave_group`) ends this wait, too.
        self._group = await asyncio.to_thread(
            weights.WeightGroup.join,
            address,
            rank=weights.SENDER,
            world_size=world_size,
            host=host,
            device=self._device,
            timeout_s=timeout_s,
            sender=self._number,
        )

    async def leave_group(self) -> None:
        """Closes the weight group and its rendezvous, so that its members stop waiting."""
        self._group = self._store = None

    async def broadcast(self, announcement: Announcement) -> None:
        """All ranks together: brings the weights to the senders, which send them to the engines."""
        await self._reading(
            weights.send_copy,
            self._frozen(announcement.version).copy,
            self._mesh.publishing,
            self._group,
            announcement.manifest,
            bucket_bytes=BUCKET_BYTES,
        )

    async def collect(self, announcement: Announcement, folder: Path | None = None) -> None:
        """All ranks together: brings the weights to the host of the first rank, for `write`."""
        copy, folder = self._frozen(announcement.version).copy, folder or self._run_dir.weights
        whole = await self._reading(copy.whole, self._mesh.publishing)
        if self._mesh.is_first:
            self._whole[folder] = whole

    async def write(self, announcement: Announcement, folder: Path | None = None) -> str:
        """On the first rank: writes what it has collected, for engines that read from disk; returns
        the folder, by default the run's folder of versions."""
        folder = folder or self._run_dir.weights
        whole = self._whole.pop(folder)
        await asyncio.to_thread(weights.write_version, whole, folder, version=announcement.version)
        return str(folder)

    async def version(self) -> int:
        """The version of the weights; waits for a step in progress."""
        async with self._between_steps:
            return self._rank.version

    async def capture_state(self) -> int:
        """Copies this rank's weights and optimizer state for `save`, between two steps; returns
        their version."""
        async with self._between_steps:
            with self._clock.during("checkpoint", f"version {self._rank.version}"):
                self._frozen_state = None  # never two copies
                self._frozen_state = await asyncio.to_thread(self._rank.capture_state)
            return self._rank.version

    async def save(self, folder: Path) -> None:
        """Writes this rank's part of the captured state into the checkpoint `folder`, while the
        rank goes on; the first rank also exports the model."""
        state, self._frozen_state = self._frozen_state, None
        assert state is not None, "save before capture_state"
        await asyncio.to_thread(self._write_checkpoint, state, folder)

    def _write_checkpoint(self, state: RankState, folder: Path) -> None:
        parts = folder / STATE / LEARNER_FOLDER
        learner.save_state(state, parts, self._mesh)
        if self._mesh.is_first:
            shapes = {
                name: tuple(parameter.shape)
                for name, parameter in self._rank.decoder.named_parameters()
            }
            model.export_folder(
                shapes,
                lambda names: learner.read_whole_weights(
                    parts, {name: shapes[name] for name in names}
                ),
                dtype=self._dtype,
                base=Path(self._config.model.path),
                out=folder,
            )

    async def dump(self) -> str:
        """What this process does now."""
        return process_dump(self._clock)

    async def report(self) -> LearnerReport:
        if self._peak is None and (self._number == 0 or self._device != "cpu"):
            # The first report comes before the steps. On a CPU one rank measures, undisturbed.
            self._peak = await asyncio.to_thread(device_peak, self._device)
        return LearnerReport(tuple(self._clock.take_spans()), self._peak)

    async def _reading(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work` in a thread beside the step. The next snapshot leaves the copy that it reads."""
        self._num_readers += 1
        try:
            return await asyncio.to_thread(work, *args, **kwargs)
        finally:
            self._num_readers -= 1

    def _frozen(self, version: int) -> Snapshot:
        assert self._snapshot is not None, f"version {version} was requested before any snapshot"
        assert self._snapshot.version == version, (
            f"version {version} was requested, the snapshot has {self._snapshot.version}"
        )
        return self._snapshot
