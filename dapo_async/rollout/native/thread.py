"""The native engine behind the `Engine` protocol: one daemon thread decodes, callers await.

Commands wait in a queue and are executed between two decode steps. With nothing to decode the
thread blocks on the queue. All calls made in one turn of an event loop (`asyncio.gather`) reach the
engine before the same step, so that a lockstep run repeats its tokens bit for bit.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dapo_async.replay import TokenBook, TokenOutcome, num_tokens
from dapo_async.rollout.engine import (
    Aborted,
    EngineWork,
    GroupRequest,
    KVUse,
    SiblingsEnded,
    SlotUse,
    TimeUse,
    UpdateReport,
    ignore_ends,
)
from dapo_async.rollout.kv_meter import KVMeter
from dapo_async.rollout.native.engine import TorchEngine
from dapo_async.rollout.slot_meter import SlotMeter
from dapo_async.types import Completion
from dapo_async.utils.state_clock import StateClock
from dapo_async.utils.thread_stack import stack_location

IDLE = ("wait", "asleep")  # states of the clock
_CLOSE_TIMEOUT_S = 60.0  # at most one decode step or one weight update has to end first


@dataclass(frozen=True, slots=True)
class _Generate:
    request: GroupRequest
    siblings_ended: SiblingsEnded


@dataclass(frozen=True, slots=True)
class _Abort:
    group_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Update:
    weights: Mapping[str, Tensor]
    version: int
    probe_ids: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Sleep:
    pass


@dataclass(frozen=True, slots=True)
class _Wake:
    pass


@dataclass(frozen=True, slots=True)
class _Close:
    pass


_Command = _Generate | _Abort | _Update | _Sleep | _Wake | _Close


class _Waiter:
    """The future of a command: set from the thread, resolved on the caller's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self.future = loop, loop.create_future()

    def answer(self, result: Any) -> None:
        self._settle(result, None)

    def fail(self, error: BaseException) -> None:
        self._settle(None, error)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        def settle() -> None:
            if self.future.done():  # the caller was cancelled
                return
            if error is None:
                self.future.set_result(result)
            else:
                self.future.set_exception(error)

        self.call(settle)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls `function` on the caller's event loop."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


class ThreadedEngine:
    """The engine of `rollout.engine=torch` in a run: an `Engine` on a `TorchEngine`.

    The clock is in state `generate`, `wait` (nothing to decode), `sync` (a weight update) or
    `asleep`, in which groups and weight updates wait. When
    the thread dies, every pending and every later call raises its original error (no silent death).
    """

    def __init__(self, core: TorchEngine, clock: StateClock) -> None:
        """From now on only the thread may use `core`."""
        self._core, self._clock = core, clock
        self._meter, self._kv = SlotMeter(clock, slots=core.num_slots), KVMeter(clock)
        self.tokens = TokenBook()
        self._read = self._reread = self._started = 0  # prompt tokens that are booked already
        self._continued = 0  # of `core.continued_tokens`
        self._inbox: queue.SimpleQueue[list[tuple[_Command, _Waiter]]] = queue.SimpleQueue()
        self._turns: dict[asyncio.AbstractEventLoop, list[tuple[_Command, _Waiter]]] = {}
        self._lock = threading.Lock()  # guards `_error`: whether the inbox is still read
        self._error: BaseException | None = None
        # A command is in one of these three until it is answered: `_die` finds every waiter there.
        self._taken: deque[tuple[_Command, _Waiter]] = deque()  # from the inbox, to be executed
        self._generating: dict[int, tuple[_Waiter, GroupRequest, SiblingsEnded]] = {}
        self._updates: deque[tuple[_Update, _Waiter]] = deque()
        self._num_turns = self._turn_seen = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_slots(self) -> int:
        return self._core.num_slots

    @property
    def version(self) -> int:
        return self._core.version

    async def generate(
        self, request: GroupRequest, siblings_ended: SiblingsEnded = ignore_ends
    ) -> tuple[Completion, ...]:
        """See `Engine`. A cancelled call takes its group off the engine."""
        call = self._send(_Generate(request, siblings_ended))
        try:
            completions: tuple[Completion, ...] = await call
        except asyncio.CancelledError:
            self._send(_Abort((request.group_id,)))
            raise
        return completions

    async def abort(self, group_ids: Iterable[int]) -> None:
        await self._send(_Abort(tuple(group_ids)))

    async def update_weights(
        self, weights: Mapping[str, Tensor], *, version: int, probe_ids: NDArray[np.int32]
    ) -> UpdateReport:
        """See `Engine`. The tensors must not change until this returns."""
        report: UpdateReport = await self._send(_Update(weights, version, probe_ids))
        return report

    async def sleep(self) -> None:
        """Stops between two steps and frees the engine's device memory, until `wake`.

        Groups stay on the engine: their calls wait, and so do new ones and weight updates.
        """
        await self._send(_Sleep())

    async def wake(self) -> None:
        """Takes the memory again, and goes on with the weights that the engine had."""
        await self._send(_Wake())

    def weights(self) -> Mapping[str, Tensor]:
        return self._core.weights()

    def long_turn(self) -> str | None:
        """The current line of a decode step or update that was under way at the call before, too;
        None: the thread goes on, or has nothing to do."""
        before, self._turn_seen = self._turn_seen, self._num_turns
        if before != self._turn_seen or self._clock.state in IDLE or self._thread.ident is None:
            return None
        return stack_location(self._thread.ident)

    def starving(self, on: bool) -> None:
        self._meter.starving(on)

    def dead(self, on: bool) -> None:
        self._meter.dead(on)

    def slot_use(self) -> SlotUse:
        return self._meter.slots()

    def time_use(self) -> TimeUse:
        return self._meter.time()

    def work(self) -> EngineWork:
        core = self._core
        return EngineWork(
            core.num_decodes, core.decoded_tokens, core.decode_pairs, core.prefill_pairs
        )

    def kv_use(self) -> KVUse:
        """Each slot has memory for the longest sequence, so nothing is ever retracted."""
        return self._kv.use()

    async def close(self) -> None:
        """Stops the thread. Raises TimeoutError when its last step does not end."""
        if self._thread.is_alive():
            self._send(_Close())
            await asyncio.to_thread(self._thread.join, _CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                raise TimeoutError(
                    f"close waited {_CLOSE_TIMEOUT_S:.0f} s for the engine's decode step to end"
                )

    def _send(self, command: _Command) -> asyncio.Future[Any]:
        """Queues the command with the other commands of this turn of the loop."""
        loop = asyncio.get_running_loop()
        waiter, turn = _Waiter(loop), self._turns.setdefault(loop, [])
        if not turn:
            loop.call_soon(self._end_turn, loop)
        turn.append((command, waiter))
        return waiter.future

    def _end_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        turn = self._turns.pop(loop)
        with self._lock:
            if self._error is None:
                self._inbox.put(turn)
                return
        for _, waiter in turn:
            waiter.fail(self._error)

    def _run(self) -> None:
        try:
            while self._serve():
                pass
        except BaseException as error:  # noqa: BLE001 (every waiter raises it)
            self._die(error)
        else:
            self._die(RuntimeError("the engine is closed"))

    def _serve(self) -> bool:
        """One turn of the thread: commands, an update if one waits, a decode step.

        Returns False when the thread has to end.
        """
        core = self._core
        self._num_turns += 1
        idle = not core.has_work and (core.asleep or not self._updates)
        if idle:
            self._clock.enter("asleep" if core.asleep else "wait")
            self._meter.spent(running=0)
            self._kv.holds(0, capacity_tokens=core.kv_capacity)
        if idle or not self._inbox.empty():  # only this thread takes from the inbox
            self._taken.extend(self._inbox.get())
        if idle:
            self._meter.spent(running=0)
        while self._taken:
            command, waiter = self._taken[0]
            if isinstance(command, _Close):
                waiter.answer(None)
                return False
            self._execute(command, waiter)
            self._taken.popleft()
        if self._updates and not core.asleep:
            core.draining = core.weight_update == "drain"
            if not (core.draining and core.num_running):
                self._update(*self._updates[0])
                self._updates.popleft()
        if core.has_work:
            self._clock.enter("generate")
            finished = core.step()
            self._book_step()
            for group_id, completions in finished:
                self._book_heldout(group_id, num_tokens(completions))
                self._generating.pop(group_id)[0].answer(completions)
            for group_id, count in core.num_ended.items():
                if group_id in self._generating:  # else its answer tells the end
                    waiter, _, siblings_ended = self._generating[group_id]
                    waiter.call(siblings_ended, count)
            self._meter.spent(running=core.num_drawn, heldout=core.num_heldout)
        return True

    def _book_step(self) -> None:
        """Books the tokens of a step, before anybody can book how they end."""
        core = self._core
        read, reread = core.prefilled_tokens - self._read, core.reread_tokens - self._reread
        started = core.started_tokens - self._started
        self._read, self._reread = core.prefilled_tokens, core.reread_tokens
        self._started = core.started_tokens
        self._kv.read_prompt(started, cached=started - read)
        self._kv.holds(core.kv_tokens, capacity_tokens=core.kv_capacity)
        self.tokens.generate(core.num_drawn)
        self.tokens.prefill(read - reread)
        self.tokens.recompute(reread + core.continued_tokens - self._continued)
        self._continued = core.continued_tokens

    def _book_heldout(self, group_id: int, count: int) -> None:
        if group_id < 0:
            self.tokens.end(TokenOutcome.EVALUATION, count)

    def _execute(
        self, command: _Generate | _Abort | _Update | _Sleep | _Wake, waiter: _Waiter
    ) -> None:
        match command:
            case _Generate(request, siblings_ended):
                try:
                    self._core.submit(request)
                except ValueError as error:  # the caller's error: the engine goes on
                    waiter.fail(error)
                else:
                    self._generating[request.group_id] = waiter, request, siblings_ended
                    known = [each for each in request.partial_completions if each is not None]
                    if known:
                        waiter.call(siblings_ended, sum(each.is_complete for each in known))
            case _Abort(group_ids):
                received = self._core.received(group_ids)
                for group_id in self._core.abort(group_ids):
                    self._take_off(group_id, received[group_id])
                waiter.answer(None)
            case _Update():
                self._updates.append((command, waiter))
            case _Sleep():
                self._core.sleep()
                self._meter.asleep(True)
                waiter.answer(None)
            case _Wake():
                self.tokens.recompute(self._core.wake())
                self._meter.asleep(False)
                waiter.answer(None)

    def _take_off(self, group_id: int, received: tuple[Completion | None, ...]) -> None:
        waiter, request, _ = self._generating.pop(group_id)
        count = num_tokens(received) - num_tokens(request.partial_completions)
        self._book_heldout(group_id, count)
        waiter.fail(Aborted(f"group {group_id} was taken off the engine", count, received))

    def _update(self, update: _Update, waiter: _Waiter) -> None:
        self._meter.spent(running=0, syncing=True)
        with self._clock.during("sync", f"version {update.version}"):
            try:
                report = self._core.update_weights(
                    update.weights, version=update.version, probe_ids=update.probe_ids
                )
            except ValueError as error:  # the caller's error: the engine keeps its weights
                self._core.draining = False
                waiter.fail(error)
            else:
                self.tokens.recompute(report.recomputed_tokens)
                waiter.answer(report)
        self._meter.spent(running=0, syncing=True)

    def _die(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
        self._clock.enter("wait")
        self._meter.spent(running=0)
        waiters = [waiter for waiter, *_ in self._generating.values()]
        waiters += [waiter for _, waiter in (*self._updates, *self._taken)]
        while not self._inbox.empty():
            waiters += [waiter for _, waiter in self._inbox.get()]
        for waiter in waiters:
            waiter.fail(error)
