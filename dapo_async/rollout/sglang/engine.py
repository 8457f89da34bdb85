"""The SGLang engine: the protocol of `engine.py` over HTTP (L2). Group requests in, completions out; weights swapped by the server itself.

Each sibling is one streamed request, and never more than `num_slots` are at the server: what waits, waits here, where it is seen. Siblings share
their prompt's KV in the server's prefix cache, whose entries are named by the update before them, so that none is used under other weights.

    update:  probe ─▶ stand still (by `weight_update`) ─▶ `load` ─▶ go on ─▶ probe

- `recompute`: running responses go back to the server's queue, the cache is emptied, their KV is computed anew under the new weights.
- `keep_kv`: running responses stop where they are and go on with the KV they have: cheap, and their logprobs are those of no single version.
- `drain`: nothing new is sent until what runs has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dapo_async.rollout.engine import (
    Aborted,
    EngineFault,
    GroupRequest,
    SlotUse,
    UpdateReport,
    WeightUpdate,
)
from dapo_async.rollout.sglang.client import SGLangClient
from dapo_async.rollout.sglang.stream import (
    Response,
    WrongVersion,
    joined,
    read_version,
    sampling_body,
)
from dapo_async.rollout.slot_meter import SlotMeter
from dapo_async.types import Completion, FinishReason
from dapo_async.utils.state_clock import StateClock


@dataclass(slots=True)
class _Running:
    """One group at the engine."""

    siblings: list[asyncio.Task[Completion]]
    responses: dict[int, Response] = field(default_factory=dict)  # by sibling: those at the server
    partial_completions: dict[int, Completion] = field(
        default_factory=dict
    )  # by sibling: what there is of those that did not end there
    aborted: bool = False


class SGLangEngine:
    """One SGLang server as an engine. All calls are made from the one event loop that it was made in."""

    def __init__(
        self,
        client: SGLangClient,
        clock: StateClock,
        *,
        num_slots: int,
        weight_update: WeightUpdate,
        incarnation: str,
    ) -> None:
        """`clock` follows it: generate, wait, sync. Versions are named `incarnation:number` at the server."""
        self.num_slots, self.version = num_slots, 0
        self._client, self._clock, self._mode, self._incarnation = (
            client,
            clock,
            weight_update,
            incarnation,
        )
        self._meter = SlotMeter(clock, slots=num_slots)
        self._slots = asyncio.Semaphore(num_slots)
        self._running: dict[int, _Running] = {}
        self._num_running = 0
        self._newest_version = 0  # of the weights whose load has begun: what is sent from then on meets them, or KV of those before
        self._num_updates = 0  # names the prefix cache's entries: a version may be served twice, after wrong weights of that name
        self._syncing = False
        self._gone = False  # while another server takes its place
        self._trusted = True  # until the server names weights that it was not given
        self._may_send = asyncio.Event()  # cleared while running responses drain
        self._may_send.set()
        self._ended = asyncio.Event()  # set whenever a response ends
        self._nonce, self._serial = (
            secrets.token_hex(4),
            itertools.count(),
        )  # names of requests that no other client of this server uses
        clock.enter("wait")

    async def generate(self, request: GroupRequest) -> tuple[Completion, ...]:
        """See `Engine`. A cancelled call takes its group off the engine. Raises EngineFault when the server can't be used."""
        assert request.group_id not in self._running, (
            f"group {request.group_id} is on the engine already"
        )
        group = _Running([])
        self._running[request.group_id] = group
        try:
            async with asyncio.TaskGroup() as siblings:
                group.siblings = [
                    siblings.create_task(self._respond(group, request, sibling))
                    for sibling in range(request.num_siblings)
                ]
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            if isinstance(first, EngineFault) and not group.aborted:
                raise EngineFault(str(first), self._heads(group, request)) from None
            if not group.aborted:
                raise first from None
        finally:
            del self._running[request.group_id]
        if group.aborted:
            raise Aborted(f"group {request.group_id} was taken off the engine")
        return tuple(sibling.result() for sibling in group.siblings)

    async def abort(self, group_ids: Iterable[int]) -> None:
        """See `Engine`."""
        groups = [self._running[each] for each in group_ids if each in self._running]
        for group in groups:
            group.aborted = True
        with contextlib.suppress(EngineFault):  # a lost server: each stream tells of it by itself
            await self._client.abort(
                [response.request_id for group in groups for response in group.responses.values()]
            )
        for group in groups:
            for task in group.siblings:
                task.cancel()  # one that the abort came too early for ends with its connection

    async def update(
        self,
        load: Callable[[str, bool], Awaitable[None]],
        *,
        version: int,
        probe_ids: NDArray[np.int32],
    ) -> tuple[str, UpdateReport]:
        """Has the server `load(name of the version, whether its cache must be emptied)` while nothing is generated.

        Returns the incarnation that the server attests, and the report. After a failed load the server stays paused: its weights are not to be used.
        """
        before = await self._client.prompt_logprobs(probe_ids)
        async with self._standstill() as start_s:
            recomputed = sum(self._known_tokens()) if self._mode == "recompute" else 0
            self._num_updates += 1
            self._newest_version = version
            await load(f"{self._incarnation}:{version}", self._mode != "keep_kv")
        pause_s = time.monotonic() - start_s
        incarnation, self.version = read_version(await self._client.weight_version())
        after = await self._client.prompt_logprobs(probe_ids)
        return incarnation, UpdateReport(
            self.version, before, after, pause_s=pause_s, recomputed_tokens=recomputed
        )

    async def reconnect(self, client: SGLangClient) -> None:
        """Goes on with another server, which serves none of the run's weights yet. What ran on the one before fails, if it has not failed already."""
        self._gone = True
        self._may_send.set()  # whatever waits to be sent fails as well
        await self._client.close()
        while self._running:
            await asyncio.gather(
                *(sibling for group in self._running.values() for sibling in group.siblings),
                return_exceptions=True,
            )
            await asyncio.sleep(0)
        self._client, self.version, self._trusted, self._gone = client, -1, True, False

    def starving(self, on: bool) -> None:
        self._meter.starving(on)

    def slot_use(self) -> SlotUse:
        return self._meter.read()

    async def close(self) -> None:
        """Closes the connections; pending calls fail."""
        await self._client.close()

    def _heads(self, group: _Running, request: GroupRequest) -> tuple[Completion | None, ...]:
        """What there is of each sibling, those that had ended included; of a server with wrong weights only what came from elsewhere."""
        if not self._trusted:
            return request.partial_completions
        ended = {
            place: task.result()
            for place, task in enumerate(group.siblings)
            if not (task.cancelled() or task.exception())
        }
        before = dict(enumerate(request.partial_completions))
        return tuple(
            ended.get(place) or group.partial_completions.get(place) or before.get(place)
            for place in range(request.num_siblings)
        )

    async def _respond(self, group: _Running, request: GroupRequest, sibling: int) -> Completion:
        partial = request.partial_completions[sibling] if request.partial_completions else None
        if partial is not None and partial.finish_reason is not FinishReason.ABORT:
            return partial
        async with self._slots:
            while (
                not self._may_send.is_set()
            ):  # it may have been cleared again before this task had its turn
                await self._may_send.wait()
            if self._gone:
                raise EngineFault(
                    f"{self._client.url} was lost before a response could be sent there"
                )
            # Never the same twice, for an abort may come late; the last dot keeps one from being the beginning of another: the server
            # aborts by beginnings.
            name = f"{self._nonce}.{next(self._serial)}.{request.group_id}.{sibling}."
            response = Response(name, len(request.prompt_ids), self._newest_version)
            group.responses[sibling] = response
            self._count(+1)
            try:
                return await self._stream(request, response, partial)
            finally:
                del group.responses[sibling]
                if response.token_ids:
                    group.partial_completions[sibling] = joined(
                        partial, response.whole or response.partial()
                    )
                self._count(-1)
                self._ended.set()

    async def _stream(
        self, request: GroupRequest, response: Response, partial: Completion | None
    ) -> Completion:
        """One response, from the end of its `partial` on."""
        so_far = partial.token_ids.tolist() if partial is not None else []
        sampling = replace(request.sampling, max_tokens=request.sampling.max_tokens - len(so_far))
        body = {
            "input_ids": request.prompt_ids.tolist() + so_far,
            "sampling_params": sampling_body(sampling),
            "rid": response.request_id,
            "extra_key": f"{self._nonce}.{self._num_updates}",
        }
        # To the very end of the stream: the server takes an earlier goodbye for a wish to abort.
        async for chunk in self._client.stream(body):
            try:
                response.add(
                    chunk,
                    newest_version=max(self.version, response.sent_version),
                    incarnation=self._incarnation,
                )
                if chunk.finish is not None:
                    response.end(
                        chunk.finish,
                        chunk.versions,
                        incarnation=self._incarnation,
                        keeps_kv=self._mode == "keep_kv",
                    )
            except EngineFault as fault:
                self._trusted = self._trusted and not isinstance(fault, WrongVersion)
                raise EngineFault(f"{self._client.url} {fault}") from None
        completion = response.whole
        if completion is None:
            raise EngineFault(
                f"{self._client.url} ended response {response.request_id} without a reason"
            )
        if (
            completion.finish_reason is FinishReason.LENGTH
            and len(completion.token_ids) < sampling.max_tokens
        ):
            raise ValueError(
                f"{self._client.url} cut a response at {len(completion.token_ids)} of {sampling.max_tokens} tokens: the memory for its keys "
                "and values, or the model's context, is too small; lower rollout.max_response_tokens or give the server more"
            )
        return joined(partial, completion)

    @asynccontextmanager
    async def _standstill(self) -> AsyncIterator[float]:
        """Nothing is generated inside; yields since when. Left by an exception, nothing is generated afterwards either."""
        start_s = time.monotonic()
        if self._mode == "drain":
            self._may_send.clear()
            while self._num_running:
                self._ended.clear()
                await self._ended.wait()
            start_s = time.monotonic()
        else:
            await self._client.pause("retract" if self._mode == "recompute" else "in_place")
        self._sync(True)
        try:
            yield start_s
        finally:
            self._sync(False)
        if self._mode == "drain":
            self._may_send.set()
        else:
            await self._client.resume()

    def _known_tokens(self) -> Iterable[int]:
        """Tokens of each response at the server, as far as it has told."""
        for group in self._running.values():
            for response in group.responses.values():
                yield response.prompt_tokens + len(response.token_ids)

    def _count(self, change: int) -> None:
        self._book()
        self._num_running += change
        self._book()

    def _sync(self, on: bool) -> None:
        self._book()
        self._syncing = on
        self._book()

    def _book(self) -> None:
        """Books the time until now, and says what is being done from now on."""
        self._meter.spent(running=self._num_running, syncing=self._syncing)
        self._clock.enter("sync" if self._syncing else "generate" if self._num_running else "wait")
