"""One rollout worker as a Ray actor: an engine, the worker that keeps it full, weight updates.

This module must not import torch, because the driver imports it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ray.actor import ActorHandle

from dapo_async.config import Config, DeadlinesConfig
from dapo_async.evaluate import Evaluation
from dapo_async.model.peak import Peak, gpu_of_process
from dapo_async.reward import score_group
from dapo_async.rollout import EngineFault, SamplingParams
from dapo_async.rollout.worker import GENERATING, Offer, RolloutWorker
from dapo_async.runtime.actors.offers import Exchange, to_arguments
from dapo_async.runtime.actors.once import answers_once
from dapo_async.runtime.actors.replay import ANSWER_EVERY_S, ReplayActor
from dapo_async.runtime.actors.reports import ProcessInfo, WorkerReport
from dapo_async.runtime.cluster import limits
from dapo_async.runtime.cluster.network import use_network
from dapo_async.runtime.handles.handle import ActorDied, Handle, remote
from dapo_async.types import Admission, Completion, Group
from dapo_async.utils.state_clock import StateClock
from dapo_async.utils.thread_stack import process_dump
from dapo_async.weights import Announcement, Attestation, BrokenOff

if TYPE_CHECKING:
    from dapo_async.runtime.actors.engine_host import EngineHost

T = TypeVar("T")
JOIN_SHARE = 0.6  # of deadlines.answer_s; the learner waits half of it for the weight group
UPDATE_SHARE = 0.8  # of deadlines.answer_s, for one engine's part of an update
CALLS_OF_A_PROCESS = 10**12  # numbers of calls that one process of a worker has for itself
ANSWER_S = 2 * ANSWER_EVERY_S  # a healthy replay actor has answered by then


def _answer(_: DeadlinesConfig) -> float:
    return ANSWER_S


class ReplayClient(Handle[ReplayActor]):
    """The worker's handle of the replay actor, which answers within `ANSWER_EVERY_S`.

    A call that the death of the replay actor breaks off is repeated to the next one, which tells by
    its number whether the one before has made it.
    """

    _evictions = remote(ReplayActor.evictions, _answer)
    _fail = remote(ReplayActor.fail, _answer, repeatable=True)
    _hand_back = remote(ReplayActor.hand_back, _answer, repeatable=True)
    _resume = remote(ReplayActor.resume, _answer, repeatable=True)
    _exchange = remote(ReplayActor.exchange, _answer)

    def __init__(self, *args: Any, start: int = 0, **kwargs: Any) -> None:
        """`start`: how many processes the worker has had before."""
        super().__init__(*args, **kwargs)
        self._start = start
        self._numbers = count(start * CALLS_OF_A_PROCESS)
        self._num_replaced, self._is_replaced = 0, asyncio.Event()

    async def go_on_with(self, actor: Any, open_groups: Sequence[int]) -> None:
        """From now on the calls go to `actor`, which is told the groups in hand first."""
        self.replace(actor)
        await self._resume(self._caller, self._start, open_groups)
        self._num_replaced += 1
        self._is_replaced.set()

    async def evictions(self, worker: str) -> tuple[int, ...]:
        return await self._again(lambda _: self._evictions(worker))

    async def fail(self, group_ids: Sequence[int], why: str, detail: str = "") -> None:
        await self._again(lambda _: self._fail(group_ids, why, detail))

    async def exchange(
        self, worker: str, offers: Sequence[Offer], *, num_free: int, num_open: int
    ) -> tuple[Admission, ...]:
        facts, packed = [each.facts for each in offers], [each.data for each in offers]
        exchange = Exchange(
            worker,
            num_free,
            num_open,
            facts,
            sizes=[len(data) for data in packed],
            start=self._start,
            records=[each.record for each in offers],
            number=next(self._numbers),
        )
        arguments = to_arguments(packed)
        return await self._again(
            lambda again: self._exchange(replace(exchange, again=again), *arguments)
        )

    async def hand_back(
        self, group_id: int, partial_completions: tuple[Completion | None, ...]
    ) -> None:
        number = next(self._numbers)
        await self._again(
            lambda _: self._hand_back(self._caller, group_id, partial_completions, number)
        )

    async def _again(self, call: Callable[[bool], Awaitable[T]]) -> T:
        """The result of `call(again)`. Raises ActorDied when no new replay actor comes in time."""
        again = False
        while True:
            replaced = self._num_replaced
            try:
                return await call(again)
            except (ActorDied, TimeoutError):  # a hanging one is replaced, too
                again = True
                await self._next(replaced)

    async def _next(self, replaced: int) -> None:
        """Waits for the replay actor after the one that has died."""
        limit_s = self._deadlines.start_s
        try:
            async with asyncio.timeout(limit_s):
                while self._num_replaced == replaced:
                    self._is_replaced.clear()
                    await self._is_replaced.wait()
        except TimeoutError as error:
            raise ActorDied(
                self.name,
                f"died or did not answer, and {self._caller} waited {limit_s:g} s "
                "(deadlines.start_s) for a new one",
            ) from error


@answers_once
class RolloutActor:
    """Call `ready` first. Only SGLang servers can be lost: `lost` reports it, then the driver calls
    `restart`, sends weights, and calls `confirm`."""

    def __init__(
        self,
        config: Config,
        *,
        number: int,
        incarnation: str,
        replay: ActorHandle[ReplayActor],
        logs: Path,
        outer_key: str = "",
        start: int = 0,
    ) -> None:
        """`logs`: folder for the output of SGLang servers. `outer_key`: API key of the servers in
        `rollout.servers`. `start`: how many processes this worker has had before."""
        self.name, self._number, self._start = f"rollout-{number}", number, start
        self._config, self._incarnation = config, incarnation
        self._clock = StateClock(self.name)
        self._replay = ReplayClient(
            "replay", replay, config.deadlines, caller=self.name, start=start
        )
        limits.raise_open_files()
        self._peak: Peak | None = None  # of one device
        self._is_ready = False
        self._in_use = asyncio.Lock()  # the engine's memory: held by an update, and while it sleeps
        self._asleep = False
        self._host = self._make_host(logs, outer_key=outer_key)

    def _make_host(self, logs: Path, *, outer_key: str) -> EngineHost:
        """Imports torch, and what only this kind of engine needs."""
        import torch

        config, device = self._config, self._config.model.torch_device
        torch.set_num_threads(max(1, int(config.model.num_cpus)))
        if config.rollout.engine == "sglang":
            from dapo_async.runtime.actors.sglang_host import SGLangHost

            return SGLangHost(
                config,
                name=self.name,
                number=self._number,
                incarnation=self._incarnation,
                device=device,
                clock=self._clock,
                logs=logs,
                outer_key=outer_key,
            )
        from dapo_async.runtime.actors.engine_host import TorchHost

        return TorchHost(
            config,
            name=self.name,
            incarnation=self._incarnation,
            device=device,
            clock=self._clock,
        )

    async def ready(self) -> ProcessInfo:
        """Starts the engine."""
        if (fault := limits.open_files_fault(self._config)) is not None:
            raise ValueError(fault)
        config = self._config
        use_network(config)
        detail = await self._host.start()
        if config.model.torch_device == "cuda":
            self._peak = await asyncio.to_thread(gpu_of_process)
        sampling = SamplingParams(
            max_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            stop_token_ids=self._host.stop_token_ids,
            seed=config.seed,
        )
        self._worker = RolloutWorker(
            self.name,
            self._host.engine,
            replay=self._replay,
            score=self._score,
            sampling=sampling,
            group_size=config.replay.group_size,
        )
        self._is_ready = True
        return ProcessInfo.own(self.name, detail)

    async def run(self) -> None:
        """Generates groups until the run ends; the driver watches it."""
        await self._worker.run()

    async def ping(self) -> str | None:
        """Shows that the process lives and its event loop runs. Returns the current line of an
        engine's thread that has made no turn since the ping before."""
        return self._host.long_turn() if self._is_ready else None

    async def lost(self) -> str:
        """Waits until the engine is lost; returns why."""
        return await self._worker.lost()

    async def reconnect(self, replay: ActorHandle[ReplayActor]) -> None:
        """The replay actor was restarted: its calls go to `replay` from now on."""
        open_groups = self._worker.open_groups if self._is_ready else []
        await self._replay.go_on_with(replay, open_groups)

    async def restart(self) -> None:
        """Starts a lost engine again; it generates nothing before `read` and `confirm`."""
        await self._host.restart()
        self._worker.restarted()

    async def back(self) -> None:
        """Waits until the engine may generate."""
        await self._worker.back()

    async def sleep(self) -> None:
        """The engine stops and releases its device memory, until `wake`. An update ends first. What
        is left of a lost engine is ended."""
        if self._asleep:
            return
        await self._in_use.acquire()
        self._asleep = True
        if not self._worker.is_lost:
            async with self._losing_engine("release its memory", share=UPDATE_SHARE):
                await self._host.sleep()
        if self._worker.is_lost:
            await self._host.end()

    async def wake(self) -> None:
        """The engine takes its device memory again and goes on. A lost one is restarted later."""
        if not self._asleep:
            return
        if not self._worker.is_lost:
            async with self._losing_engine("take its memory again", share=UPDATE_SHARE):
                await self._host.wake()
        self._asleep = False
        self._in_use.release()

    async def join(self, address: tuple[str, int], first_rank: int, world_size: int) -> bool | None:
        """Joins the learner's weight group at `address`; returns when every member has.

        False: the engine works, but the group was not formed. None: the engine was lost meanwhile.
        """
        async with self._losing_engine("join the weight group", share=JOIN_SHARE):
            return await self._host.join(address, first_rank=first_rank, world_size=world_size)
        return None

    async def receive(self, announcement: Announcement) -> Attestation | None:
        """Receives weights by broadcast. Groups that finish from now on are held back until the
        weights are proved. None: the broadcast broke off, or the engine was lost."""
        if not self._host.in_group:  # it was restarted since it joined
            return None
        return await self._update(self._host.receive(announcement))

    async def read(self, announcement: Announcement, folder: str) -> Attestation | None:
        """As `receive`, from disk."""
        if self._worker.is_lost:
            return None
        return await self._update(self._host.read(announcement, folder))

    async def _update(self, update: Awaitable[Attestation]) -> Attestation | None:
        async with self._in_use:
            self._worker.hold()
            began_s = time.monotonic()
            async with self._losing_engine("serve new weights", share=UPDATE_SHARE):
                attestation = await update
                self._worker.updated(attestation.version, began_s=began_s)
                return attestation
        return None

    @asynccontextmanager
    async def _losing_engine(self, what: str, *, share: float) -> AsyncIterator[None]:
        """A fault of the engine, or a server that is late, loses the engine and ends the body. A
        broadcast that breaks off ends the body only.

        A server is late after this share of `deadlines.answer_s`: before the whole publish is.
        """
        limit_s = share * self._config.deadlines.answer_s if self._host.restartable else None
        try:
            async with asyncio.timeout(limit_s) as limit:
                yield
        except BrokenOff:
            pass
        except EngineFault as fault:
            self._worker.lose(str(fault))
        except TimeoutError:
            if not limit.expired():
                raise
            self._worker.lose(f"{self.name}'s server did not {what} within {limit_s:g} s")

    async def quarantine(self) -> None:
        """The weights are wrong: gives up all groups and starts none before `confirm`."""
        await self._worker.quarantine()

    async def confirm(self) -> None:
        """The weights are proved: groups that finished since the swap may be offered."""
        self._worker.confirm()

    async def drain(self) -> None:
        """Gives every group back to the replay actor, finished or not, and starts none any more."""
        await self._worker.drain()

    async def evaluate(self, part: int, num_parts: int) -> Evaluation | None:
        """Accuracy on one part of the held-out prompts. None: the engine can't generate."""
        if self._worker.state not in GENERATING:
            return None
        try:
            return await self._host.evaluate(part=part, num_parts=num_parts)
        except EngineFault as fault:
            self._worker.lose(str(fault))
            return None

    async def dump(self) -> str:
        """What this process does now."""
        state = self._worker.state.value if self._is_ready else "starting"
        return process_dump(self._clock, state)

    async def report(self) -> WorkerReport:
        return WorkerReport(
            tuple(self._clock.take_spans()),
            self._host.engine.slot_use(),
            self._host.engine.version,
            self._host.engine.tokens.counts,
            self._host.engine.time_use(),
            self._host.engine.work(),
            self._host.engine.kv_use(),
            self._peak,
            self._start,
        )

    async def _score(self, admission: Admission, completions: Sequence[Completion]) -> Group:
        return await asyncio.to_thread(  # a verdict may take seconds
            score_group,
            admission,
            completions,
            texts=[self._host.decode(completion) for completion in completions],
            verify=self._host.verifiers.of(admission.prompt.source),
            max_response_tokens=self._config.rollout.max_response_tokens,
            overlong_cache_tokens=self._config.reward.overlong_cache_tokens,
            incarnation=self._incarnation,
            temperature=self._config.rollout.temperature,
        )
