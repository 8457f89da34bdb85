"""An SGLang engine in a Ray actor: a server that fetches new weights while generation pauses."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path

from dapo_async.config import Config
from dapo_async.model import folder_for_sglang
from dapo_async.rollout.sglang.client import BroadcastLost, CallRefused, SGLangClient
from dapo_async.rollout.sglang.engine import SGLangEngine
from dapo_async.rollout.sglang.server import FP32_HEAD, SPARE_SLOTS, ServerOptions, SGLangServer
from dapo_async.rollout.slot_control import SlotControl, slots_at_start
from dapo_async.runtime.actors.engine_host import EngineHost
from dapo_async.runtime.cluster.network import own_host
from dapo_async.runtime.cluster.ports import ports_of_run
from dapo_async.utils.state_clock import StateClock
from dapo_async.weights import BUCKET_BYTES, Announcement, Attestation, BrokenOff
from dapo_async.weights.collective import group_name
from dapo_async.weights.disk import version_folder

MOST_SLOTS = 1024  # of one engine with `rollout.num_slots=auto`


def most_slots(config: Config) -> int:
    """Of one engine; with `rollout.num_slots=auto` what the credits allow."""
    rollout, replay = config.rollout, config.replay
    if not rollout.adapts_slots:
        return rollout.fixed_slots
    credits = (replay.max_staleness + 1) * replay.groups_per_step
    groups = -(-credits // rollout.num_workers)
    return max(replay.group_size, min(MOST_SLOTS, groups * replay.group_size))


class SGLangHost(EngineHost):
    """Starts a server, or uses the one of `rollout.servers` at this worker's number."""

    engine: SGLangEngine
    restartable = True

    def __init__(
        self,
        config: Config,
        *,
        name: str,
        number: int,
        incarnation: str,
        device: str,
        clock: StateClock,
        logs: Path,
        outer_key: str,
    ) -> None:
        """`outer_key`: API key of the servers in `rollout.servers`."""
        super().__init__(config, name=name, incarnation=incarnation, clock=clock)
        self._device, self._number, self._logs, self._outer_key = device, number, logs, outer_key
        self._server: SGLangServer | None = None
        self._connecting = asyncio.Lock()  # a restart and a join never overlap

    async def start(self) -> str:
        """See `EngineHost`. With `rollout.num_slots=auto` the server's memory sets the slots."""
        rollout = self._config.rollout
        self._client = await self._connect()
        control = await self._slot_control() if rollout.adapts_slots else None
        slots = rollout.fixed_slots if control is None else control.slots
        self.engine = SGLangEngine(
            self._client,
            self._clock,
            num_slots=slots,
            weight_update=rollout.weight_update,
            incarnation=self._incarnation,
            control=control,
            replayed=self.model if self._config.learner.routing_replay else None,
        )
        at_start = " at the start" if control is not None else ""
        line = f"SGLang at {self._client.url}, {slots} slots{at_start}"
        return line + await self._note_about_head()

    async def _note_about_head(self) -> str:
        """Of a server that the user started: it has to sum its logits as the learner does."""
        if not self._config.rollout.server_urls or self._config.model.dtype == "float32":
            return ""
        if (await self._client.limits()).float32_logits:
            return ""
        return (
            f"; its logprobs differ from the learner's, which sums its logits in float32: start "
            f"the server with {FP32_HEAD}"
        )

    async def _slot_control(self) -> SlotControl:
        """For `rollout.num_slots=auto`: from what the server has memory for."""
        limits = await self._client.limits()
        least = self._config.replay.group_size
        most = min(most_slots(self._config), limits.running_requests - SPARE_SLOTS)
        if most < least:
            raise ValueError(
                f"{self._client.url} runs at most {limits.running_requests} requests, and "
                f"rollout.num_slots=auto needs replay.group_size + {SPARE_SLOTS} "
                f"({least + SPARE_SLOTS}); start the server with a larger --max-running-requests"
            )
        start = slots_at_start(limits.kv_tokens, self.max_len)
        return SlotControl(start=start, least=least, most=most)

    async def sleep(self) -> None:
        await self.engine.sleep()

    async def wake(self) -> None:
        await self.engine.wake()

    async def end(self) -> None:
        if self._server is not None:
            await self._server.close()

    async def restart(self) -> None:
        await self.end()  # also ends a join that waits for this server
        async with self._connecting:
            self.in_group = False
            self._client = await self._connect()
            await self.engine.reconnect(self._client)

    async def _connect(self) -> SGLangClient:
        """Returns a client of a server that answers, started here or running already."""
        urls, deadlines = self._config.rollout.server_urls, self._config.deadlines
        url, key = (urls[self._number], self._outer_key) if urls else await self._start_server()
        client = SGLangClient(
            url,
            api_key=key,
            silence_s=deadlines.answer_s,
            why_ended=None if self._server is None else self._server.why_ended,
        )
        if urls:
            await client.wait_until_healthy(timeout_s=deadlines.start_s)
            await client.clear(self._groups)
        return client

    async def _start_server(self) -> tuple[str, str]:
        config = self._config
        folder = await asyncio.to_thread(
            folder_for_sglang,
            Path(config.model.path),
            self.model,
            scratch=self._logs / f"{self._name}-model",
        )
        options = ServerOptions(
            model=folder,
            dtype=config.model.dtype,
            device="cuda" if self._device == "cuda" else "cpu",
            tensor_parallel=config.rollout.tensor_parallel,
            num_slots=most_slots(config),
            kv_sequences=config.rollout.fixed_slots,
            max_len=self.max_len,
            host=own_host(config),
            ports=ports_of_run(config),
            seed=config.seed + self._number,  # engines with one seed would draw the same noise
            log=self._logs / f"{self._name}.log",
            # With overlap, a pause in place would count the token of the current decode step, which
            # the old weights sampled, under the new version.
            overlap=config.rollout.weight_update != "keep_kv",
            sleeps=config.model.is_shared,
            returns_experts=config.learner.routing_replay,
            extra=tuple(shlex.split(config.rollout.server_flags)),
        )
        self._server = SGLangServer(options)
        await self._server.start(timeout_s=config.deadlines.start_s)
        return self._server.url, self._server.api_key

    async def join(self, address: tuple[str, int], *, first_rank: int, world_size: int) -> bool:
        """See `EngineHost`."""
        backend = (
            "nccl" if self._config.model.torch_device == "cuda" else "gloo"
        )  # the learner's: it opened the group
        async with self._connecting:
            self.in_group = False
            for name in self._groups:
                await self._client.leave_group(name)
            with contextlib.suppress(CallRefused):
                for name in self._groups:
                    await self._client.join_group(
                        address,
                        name=name,
                        first_rank=first_rank,
                        world_size=world_size,
                        backend=backend,
                    )
                self.in_group = True
            return self.in_group

    @property
    def _groups(self) -> tuple[str, ...]:
        """The weight groups of the learner's ranks that send."""
        return tuple(map(group_name, range(self._config.learner.tensor_parallel)))

    async def receive(self, announcement: Announcement) -> Attestation:
        """See `EngineHost`. The server loads each bucket on arrival: it has no memory for a second
        copy of the weights. After a broadcast that broke off it stays paused until `read`."""

        manifest = announcement.manifest
        lines = [
            (self._groups[manifest.sender(bucket)], [spec.header for spec in bucket])
            for bucket in manifest.buckets(BUCKET_BYTES)
        ]

        async def load(weight_version: str, flush: bool) -> None:
            await self._client.receive(lines, weight_version=weight_version, flush=flush)

        try:
            return await self._update(announcement, load)
        except BroadcastLost as lost:
            self.in_group = False
            raise BrokenOff(str(lost)) from lost

    async def read(self, announcement: Announcement, folder: str) -> Attestation:
        async def load(weight_version: str, flush: bool) -> None:
            path = version_folder(Path(folder), announcement.version)
            await self._client.update_from_disk(
                str(path), weight_version=weight_version, flush=flush
            )

        return await self._update(announcement, load)

    async def _update(
        self, announcement: Announcement, load: Callable[[str, bool], Awaitable[None]]
    ) -> Attestation:
        incarnation, report = await self.engine.update(
            load, version=announcement.version, probe_ids=announcement.probe_ids
        )
        # On a CPU SGLang waits for a GPU before it hashes, and torch raises an error then.
        hashes = await self._client.hashes() if self._device == "cuda" else None
        return Attestation(
            engine=self._name,
            incarnation=incarnation,
            version=report.version,
            probe_before=report.probe_before,
            probe_after=report.probe_after,
            own_checksum=hashes.checksum if hashes is not None else None,
            hashes=hashes.tensors if hashes is not None else (),
            pause_s=report.pause_s,
            recomputed_tokens=report.recomputed_tokens,
        )
