"""The `Engine` protocol over HTTP: group requests in, completions out; the server loads weights.

Each sibling is one streamed request. At most `num_slots` requests are at the server; the others
wait here, where slot use is measured. Each second the server says how many requests it has queued,
and how much KV memory it uses. Queued requests occupy no slot. Each chunk of a response says how
often its request was retracted. With a `SlotControl` these numbers set the number of slots.
Siblings share the KV of their prompt in the server's prefix cache. Cache entries carry the number
of the update before them, so no other weights use them.

    update:  probe ─▶ pause (see `weight_update`) ─▶ `load` ─▶ resume ─▶ probe

- `recompute`: running responses go back to the server's queue, the cache is emptied, and their KV
  is computed again under the new weights.
- `keep_kv`: running responses pause and continue with their KV. This is cheap, but the logprobs of
  their later tokens are those of no single version.
- `drain`: nothing new is sent until all running responses have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dapo_async.model.config import ModelConfig
from dapo_async.model.cost import causal_pairs
from dapo_async.replay import TokenBook, TokenOutcome, num_tokens
from dapo_async.rollout.engine import (
    Aborted,
    EngineFault,
    EngineWork,
    GroupRequest,
    KVUse,
    SiblingsEnded,
    SlotUse,
    TimeUse,
    UpdateReport,
    WeightUpdate,
    ignore_ends,
)
from dapo_async.rollout.kv_meter import KVMeter
from dapo_async.rollout.sglang.client import Chunk, ServerLoad, SGLangClient
from dapo_async.rollout.sglang.slot_gate import SlotGate
from dapo_async.rollout.sglang.stream import (
    ResponseStream,
    WrongVersion,
    joined,
    read_version,
    sampling_body,
)
from dapo_async.rollout.slot_control import Observation, SlotControl
from dapo_async.rollout.slot_meter import SlotMeter
from dapo_async.types import Completion, FinishReason
from dapo_async.utils.state_clock import StateClock

LOAD_EVERY_S = 1.0  # the server is asked so often what it does


@dataclass(slots=True)
class _Running:
    """One group at the engine."""

    siblings: list[asyncio.Task[Completion]]
    # By sibling: the requests at the server, and what was received of those that left it.
    responses: dict[int, ResponseStream] = field(default_factory=dict)
    partial_completions: dict[int, Completion] = field(default_factory=dict)
    aborted: bool = False
    num_generated: int = 0  # tokens received from this engine


@dataclass(frozen=True, slots=True)
class _Pause:
    """Generation is paused for an update."""

    probe: NDArray[np.float32]  # the answer to the probe under the weights before, `[P - 1]`
    start_s: float


class SGLangEngine:
    """One SGLang server as an `Engine`. Make and use it in one event loop."""

    def __init__(
        self,
        client: SGLangClient,
        clock: StateClock,
        *,
        num_slots: int,
        weight_update: WeightUpdate,
        incarnation: str,
        control: SlotControl | None = None,
        replayed: ModelConfig | None = None,
    ) -> None:
        """`clock` gets the states generate, wait and sync.

        The server knows versions as `incarnation:number`. `num_slots`: at the start, if `control`
        changes it. `replayed`: the model, if completions are to have the experts of their tokens.
        """
        self._replayed = replayed
        self.version, self._control = 0, control
        self._client, self._clock = client, clock
        self._mode, self._incarnation = weight_update, incarnation
        self._meter, self._kv = SlotMeter(clock, slots=num_slots), KVMeter(clock)
        self.tokens = TokenBook()
        self._steps = 0.0  # these four: see EngineWork
        self._decoded = self._decode_pairs = self._prefill_pairs = 0
        self._slots = SlotGate(num_slots)
        self._running: dict[int, _Running] = {}
        self._num_running = 0  # requests at the server, those in its queue included
        self._num_queued = 0  # of them, in its queue
        self._num_heldout = 0  # of them, for held-out prompts
        self._num_ended = 0  # requests that left the server
        # Of the weights whose load has begun: a request sent after that meets them or older KV.
        self._newest_version = 0
        # Names the entries of the prefix cache. A version can't: after wrong weights it is loaded
        # a second time.
        self._num_updates = 0
        self._syncing = self._asleep = False
        self._pause: _Pause | None = None  # for an update, of which a load may have failed
        self._recomputed = 0  # tokens that a wake computes again
        self._disconnected = False  # while another server takes this one's place
        self._trusted = True  # until the server names weights that it was not given
        self._may_send = asyncio.Event()  # cleared while running responses drain
        self._may_send.set()
        self._ended = asyncio.Event()  # set whenever a response ends
        # Make request ids that no other client of this server uses.
        self._nonce, self._serial = secrets.token_hex(4), itertools.count()
        clock.enter("wait")
        self._load_watch = asyncio.create_task(self._watch_load())

    @property
    def num_slots(self) -> int:
        """See `Engine`."""
        return self._slots.num_slots

    async def generate(
        self, request: GroupRequest, siblings_ended: SiblingsEnded = ignore_ends
    ) -> tuple[Completion, ...]:
        """See `Engine`. A cancelled call takes its group off the engine.

        Raises EngineFault, with the partial completions, when the server can't be used.
        """
        known = request.group_id in self._running
        assert not known, f"group {request.group_id} is on the engine already"
        group = _Running([])
        self._running[request.group_id] = group

        async def respond(sibling: int) -> Completion:
            completion = await self._respond(group, request, sibling)
            siblings_ended(1)
            return completion

        try:
            async with asyncio.TaskGroup() as siblings:
                group.siblings = [
                    siblings.create_task(respond(sibling))
                    for sibling in range(request.num_siblings)
                ]
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            if isinstance(first, EngineFault) and not group.aborted:
                raise EngineFault(str(first), self._give_up(group, request)) from None
            if not group.aborted:
                raise first from None
        finally:
            del self._running[request.group_id]
            if request.group_id < 0:
                self.tokens.end(TokenOutcome.EVALUATION, group.num_generated)
        if group.aborted:
            message = f"group {request.group_id} was taken off the engine"
            raise Aborted(message, group.num_generated, self._received(group, request))
        return tuple(sibling.result() for sibling in group.siblings)

    async def abort(self, group_ids: Iterable[int]) -> None:
        """See `Engine`."""
        groups = [self._running[each] for each in group_ids if each in self._running]
        for group in groups:
            group.aborted = True
        responses = [response for group in groups for response in group.responses.values()]
        with contextlib.suppress(EngineFault):  # a lost server: each stream raises it itself
            await self._client.abort([response.request_id for response in responses])
        for group in groups:
            for task in group.siblings:
                task.cancel()  # a request that the server did not know yet ends here

    async def update(
        self,
        load: Callable[[str, bool], Awaitable[None]],
        *,
        version: int,
        probe_ids: NDArray[np.int32],
    ) -> tuple[str, UpdateReport]:
        """Calls `load(name of the version, whether to empty the cache)` while generation is paused.

        Returns the incarnation that the server attests, and the report. After a failed load the
        server stays paused: its weights must not be used. The next update goes on in that pause.
        """
        if self._pause is None:
            before = await self._client.prompt_logprobs(probe_ids)
            self._pause = _Pause(before, await self._start_pause())
        pause = self._pause
        recomputed = sum(self._known_tokens()) if self._mode == "recompute" else 0
        self._num_updates += 1
        self._newest_version = version
        await load(f"{self._incarnation}:{version}", self._mode != "keep_kv")
        await self._end_pause()
        before, pause_s = pause.probe, time.monotonic() - pause.start_s
        incarnation, self.version = read_version(await self._client.weight_version())
        after = await self._client.prompt_logprobs(probe_ids)
        self.tokens.recompute(recomputed)
        return incarnation, UpdateReport(
            self.version, before, after, pause_s=pause_s, recomputed_tokens=recomputed
        )

    async def sleep(self) -> None:
        """Pauses the server and frees its device memory, until `wake`. Raises EngineFault.

        Running requests go back to the server's queue and lose their KV; new ones wait here.
        """
        self._may_send.clear()
        await self._client.pause("retract")
        self._count_pause()
        self._recomputed += sum(self._known_tokens())
        await self._client.release_memory()
        self._sleep(True)

    async def wake(self) -> None:
        """The server takes its memory again, and goes on with the weights that it had. It computes
        the KV of the requests in its queue again."""
        await self._client.resume_memory()
        self.tokens.recompute(self._recomputed)
        self._recomputed = 0
        self._sleep(False)
        if self._pause is None:  # else the next update ends the pause
            await self._client.resume()
            self._may_send.set()

    def _sleep(self, on: bool) -> None:
        self._record_time()
        self._asleep = on
        self._meter.asleep(on)
        self._record_time()

    async def reconnect(self, client: SGLangClient) -> None:
        """Continues with another server, which serves none of the run's weights yet.

        Groups that ran on the old server fail, if they have not failed already.
        """
        self._disconnected = True
        self._may_send.set()  # requests that wait to be sent fail as well
        await self._client.close()
        while self._running:
            siblings = [task for group in self._running.values() for task in group.siblings]
            await asyncio.gather(*siblings, return_exceptions=True)
            await asyncio.sleep(0)
        self._client, self.version = client, -1
        if self._pause is not None:
            self._pause = None
            self._sync(False)
        self._trusted, self._disconnected = True, False
        self._recomputed = 0
        self._sleep(False)  # a server that starts is awake

    def starving(self, on: bool) -> None:
        self._meter.starving(on)

    def dead(self, on: bool) -> None:
        self._meter.dead(on)

    def slot_use(self) -> SlotUse:
        return self._meter.slots()

    def time_use(self) -> TimeUse:
        return self._meter.time()

    def work(self) -> EngineWork:
        """The number of steps is estimated: a token is one step, shared by all that run then."""
        return EngineWork(self._steps, self._decoded, self._decode_pairs, self._prefill_pairs)

    def kv_use(self) -> KVUse:
        return self._kv.use()

    async def kv_capacity(self) -> int:
        """How many tokens the server has memory for, as keys and values."""
        return (await self._client.limits()).kv_tokens

    async def close(self) -> None:
        """Closes the connections; pending calls fail."""
        self._load_watch.cancel()
        await self._client.close()

    def _give_up(self, group: _Running, request: GroupRequest) -> tuple[Completion | None, ...]:
        """Books the tokens of a lost group that nobody continues; returns the others."""
        received = self._received(group, request)
        if request.group_id < 0:
            return received
        kept = num_tokens(received) - num_tokens(request.partial_completions)
        self.tokens.end(TokenOutcome.REPEATED, group.num_generated - kept)
        return received

    def _received(self, group: _Running, request: GroupRequest) -> tuple[Completion | None, ...]:
        """Per sibling the tokens received so far, complete responses included; None: no token.

        Tokens of a server with wrong weights are left out.
        """
        if not self._trusted:
            return request.partial_completions
        received = dict(enumerate(request.partial_completions)) | group.partial_completions
        for sibling, task in enumerate(group.siblings):
            if not (task.cancelled() or task.exception()):
                received[sibling] = task.result()
        return tuple(received.get(sibling) for sibling in range(request.num_siblings))

    async def _respond(self, group: _Running, request: GroupRequest, sibling: int) -> Completion:
        partial = request.partial_completions[sibling] if request.partial_completions else None
        if partial is not None and partial.is_complete:
            return partial
        async with self._slots:
            while not self._may_send.is_set():  # it may be cleared again before this task runs
                await self._may_send.wait()
            if self._disconnected:
                raise EngineFault(f"{self._client.url} was lost before a request was sent to it")
            # Unique, because an abort may come late. With a dot at the end, because the server
            # aborts all requests whose id begins with the given id.
            name = f"{self._nonce}.{next(self._serial)}.{request.group_id}.{sibling}."
            length = len(request.prompt_ids) + num_tokens((partial,))
            response = ResponseStream(name, length, self._newest_version)
            group.responses[sibling] = response
            self._count(+1, heldout=request.group_id < 0)
            if request.times is not None:
                request.times.started[sibling] = time.monotonic()
            try:
                return await self._stream(group, request, response, partial)
            finally:
                if request.times is not None:
                    request.times.first_token[sibling] = response.first_token_s
                    request.times.ended[sibling] = time.monotonic()
                del group.responses[sibling]
                if response.token_ids:
                    received = response.completion or response.partial()
                    group.partial_completions[sibling] = joined(partial, received)
                self._count(-1, heldout=request.group_id < 0)
                self._num_ended += 1
                self._ended.set()

    async def _stream(
        self,
        group: _Running,
        request: GroupRequest,
        response: ResponseStream,
        partial: Completion | None,
    ) -> Completion:
        """One response, continued from the end of `partial`."""
        so_far = partial.token_ids.tolist() if partial is not None else []
        sampling = replace(request.sampling, max_tokens=request.sampling.max_tokens - len(so_far))
        body = {
            "input_ids": request.prompt_ids.tolist() + so_far,
            "sampling_params": sampling_body(sampling),
            "rid": response.request_id,
            "extra_key": f"{self._nonce}.{self._num_updates}",
        }
        if self._replayed is not None:
            body["return_routed_experts"] = True
        # Read to the very end of the stream: the server aborts a request whose client leaves early.
        first = True
        async for chunk in self._client.stream(body):
            if first:
                self._book_input(len(request.prompt_ids), len(so_far), chunk.cached_tokens)
                response.first_token_s, first = time.monotonic(), False
            try:
                self._receive(chunk, response, group)
            except EngineFault as fault:
                self._trusted = self._trusted and not isinstance(fault, WrongVersion)
                raise EngineFault(f"{self._client.url} {fault}") from None
        completion = response.completion
        if completion is None:
            raise EngineFault(
                f"{self._client.url} ended response {response.request_id} without a reason"
            )
        count, was_cut = len(completion.token_ids), completion.finish_reason is FinishReason.LENGTH
        if was_cut and count < sampling.max_tokens:
            raise ValueError(
                f"{self._client.url} cut a response at {count} of {sampling.max_tokens} tokens: "
                "its memory for keys and values, or the model's context, is too small; "
                "lower rollout.max_response_tokens or give the server more memory"
            )
        return joined(partial, completion)

    def _book_input(self, prompt_tokens: int, continued: int, cached: int) -> None:
        """Books the tokens that the server read before a response: all but the cached ones.

        A lost engine had read the input of a response that is continued.
        """
        length = prompt_tokens + continued
        cached = min(cached, length)
        if not continued:
            self._kv.read_prompt(prompt_tokens, cached=cached)
        (self.tokens.recompute if continued else self.tokens.prefill)(length - cached)
        self._prefill_pairs += 0 if continued else causal_pairs(length, before=cached)

    def _book_output(self, count: int, *, before: int, received: int) -> None:
        """Books `count` tokens of a response that had `before` tokens with its prompt.

        The first token of a response needs no decode step: it follows from the prefill.
        """
        decoded = count - (received == 0 and count > 0)
        self._decoded += decoded
        self._decode_pairs += causal_pairs(before + count - 1, before=before + count - 1 - decoded)
        self._steps += decoded / max(1, self._num_running - self._num_queued)

    def _receive(self, chunk: Chunk, response: ResponseStream, group: _Running) -> None:
        newest_version = max(self.version, response.sent_version)
        received = len(response.token_ids)
        response.add(chunk, newest_version=newest_version, incarnation=self._incarnation)
        self._kv.retract(response.retracted(chunk.retractions))
        group.num_generated += len(chunk.token_ids)
        self.tokens.generate(len(chunk.token_ids))
        self._book_output(
            len(chunk.token_ids), before=response.prompt_tokens + received, received=received
        )
        if chunk.finish is not None:
            if self._replayed is not None and chunk.finish["type"] != FinishReason.ABORT:
                response.take_experts(chunk.experts, self._replayed)
            response.end(
                chunk.finish,
                chunk.versions,
                incarnation=self._incarnation,
                keeps_kv=self._mode == "keep_kv",
            )

    async def _start_pause(self) -> float:
        """Pauses generation; returns when the pause began."""
        start_s = time.monotonic()
        if self._mode == "drain":
            self._may_send.clear()
            while self._num_running:
                self._ended.clear()
                await self._ended.wait()
            start_s = time.monotonic()
        else:
            await self._client.pause("retract" if self._mode == "recompute" else "in_place")
            if self._mode == "recompute":
                self._count_pause()
        self._sync(True)
        return start_s

    async def _end_pause(self) -> None:
        self._pause = None
        self._sync(False)
        await self._client.resume()
        self._may_send.set()

    def _count_pause(self) -> None:
        for group in self._running.values():
            for response in group.responses.values():
                response.pauses += 1

    def _known_tokens(self) -> Iterable[int]:
        """Tokens of each response at the server that were received, its prompt included."""
        for group in self._running.values():
            for response in group.responses.values():
                yield response.prompt_tokens + len(response.token_ids)

    async def _watch_load(self) -> None:
        """Follows what the server does; one that does not answer has lost its requests."""
        while True:
            await asyncio.sleep(LOAD_EVERY_S)
            client = self._client
            try:
                load = await client.load()
            except EngineFault:
                load = ServerLoad()
            if client is not self._client:
                continue  # another server has taken its place
            self._record_time()
            self._num_queued = min(load.queued, self._num_running)
            self._record_time()
            self._kv.holds(load.used_tokens, capacity_tokens=load.capacity_tokens)
            self._adapt(load)

    def _adapt(self, load: ServerLoad) -> None:
        """Sets the number of slots by what was seen; not while an update stops the requests."""
        stopped = self._syncing or self._asleep
        if self._control is None or stopped or not load.capacity_tokens:
            return
        time, running = self._meter.time(), self._num_running - self._num_queued
        slots = self._control.observe(
            Observation(
                running=running,
                queued=self._num_queued,
                kv_use=load.used_tokens / load.capacity_tokens,
                retractions=self._kv.use().retractions,
                ended=self._num_ended,
                generated=self.tokens.counts.generated,
                running_s=time.running + time.evaluation,
            )
        )
        if slots != self.num_slots:
            self._meter.resize(slots)
            self._slots.resize(slots)

    def _count(self, change: int, *, heldout: bool) -> None:
        self._record_time()
        self._num_running += change
        self._num_heldout += change * heldout
        self._num_queued = min(self._num_queued, self._num_running)
        self._record_time()

    def _sync(self, on: bool) -> None:
        self._record_time()
        self._syncing = on
        self._record_time()

    def _record_time(self) -> None:
        """Adds the time until now to the slot meter and sets the state of the clock."""
        running = self._num_running - self._num_queued
        self._meter.spent(
            running=running,
            queued=self._num_queued,
            heldout=min(running, self._num_heldout),
            syncing=self._syncing,
        )
        busy = "generate" if self._num_running else "wait"
        self._clock.enter("asleep" if self._asleep else "sync" if self._syncing else busy)
