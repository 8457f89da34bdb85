"""The driver's handles: which methods of each actor it calls, and the deadline of each call.

`watch` lasts as long as the actor: the driver watches it to learn of the actor's end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dapo_async.config import DeadlinesConfig
from dapo_async.runtime.actors.evaluator import EvaluatorActor
from dapo_async.runtime.actors.learner import LearnerActor
from dapo_async.runtime.actors.replay import ReplayActor
from dapo_async.runtime.actors.rollout import RolloutActor
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed, Handle, remote
from dapo_async.runtime.handles.restarts import Restarts
from dapo_async.types import TrainBatch
from dapo_async.weights import Announcement, Attestation

SHORT_S = 60.0  # for calls that a healthy actor answers at once
# An actor that gives up waiting by itself can say why, so it gets to do so first.
START_MARGIN_S = 30.0
TAKE_MARGIN_S = 10.0


def _short(_: DeadlinesConfig) -> float:
    return SHORT_S


def _unlimited(_: DeadlinesConfig) -> None:
    return None


def _start(deadlines: DeadlinesConfig) -> float:
    return deadlines.start_s


def _start_with_margin(deadlines: DeadlinesConfig) -> float:
    return deadlines.start_s + START_MARGIN_S


def _answer(deadlines: DeadlinesConfig) -> float:
    return deadlines.answer_s


def _work(deadlines: DeadlinesConfig) -> float:
    return deadlines.work_s


def _take(deadlines: DeadlinesConfig) -> float:
    return deadlines.work_s + TAKE_MARGIN_S


def _return(deadlines: DeadlinesConfig) -> float:
    """A lost engine starts again and reads the newest weights."""
    return _start_with_margin(deadlines) + deadlines.answer_s


# Calls of the replay actor that are for one process.
UNREPEATED = frozenset(("ready", "alive", "ping", "dump", "save"))


class ReplayHandle(Handle[ReplayActor]):
    """The replay actor. Calls that its death breaks off are repeated to the next process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.restarts = Restarts("replay")
        self._captured_after = 0  # losses before the newest capture

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        call = partial(super()._call, method, *args, **kwargs)
        if method in UNREPEATED:
            return await call()
        return await self.restarts.again(call)

    def lose(self) -> None:
        """Its process is dead or useless."""
        self.restarts.lose()
        self.kill()

    async def batch_again(self, batch: TrainBatch) -> TrainBatch:
        """`batch`, with new objects if its own are gone with the process that made them."""
        if batch.process == self.restarts.num_losses:
            return batch
        return await self._again(replace(batch, references=()))

    async def capture_state(self, version: int) -> None:
        await self._capture_state(version)
        self._captured_after = self.restarts.num_losses

    async def save(self, state: Path) -> None:
        """Raises ActorDied after a loss, with which the captured state is gone."""
        if self._captured_after != self.restarts.num_losses:
            raise ActorDied(self.name, "was restarted after its state was captured")
        await self._save(state)

    ready = remote(ReplayActor.ready, _start_with_margin)
    watch = remote(ReplayActor.alive, _unlimited, repeatable=True)
    ping = remote(ReplayActor.ping, _short, repeatable=True)
    plan_with = remote(ReplayActor.plan_with, _short)
    take = remote(ReplayActor.take, _take)
    trained = remote(ReplayActor.trained, _short)
    cut = remote(ReplayActor.cut, _short)
    serve = remote(ReplayActor.serve, _short)
    suspend = remote(ReplayActor.suspend, _short, repeatable=True)
    lose_worker = remote(ReplayActor.lose_worker, _short, repeatable=True)
    checkpointed = remote(ReplayActor.checkpointed, _short)
    _again = remote(ReplayActor.again, _work)
    _capture_state = remote(ReplayActor.capture_state, _short)
    _save = remote(ReplayActor.save, _work)
    close = remote(ReplayActor.close, _short)
    report = remote(ReplayActor.report, _short, repeatable=True)
    dump = remote(ReplayActor.dump, _short)


class LearnerHandle(Handle[LearnerActor]):
    """One learner rank. `LearnerGroup` calls all of them together."""

    open_mesh = remote(LearnerActor.open_mesh, _start)
    ready = remote(LearnerActor.ready, _start)
    microbatch_tokens = remote(LearnerActor.microbatch_tokens, _short)
    watch = remote(LearnerActor.alive, _unlimited, repeatable=True)
    ping = remote(LearnerActor.ping, _short, repeatable=True)
    minibatch = remote(LearnerActor.minibatch, _work)
    end_step = remote(LearnerActor.end_step, _answer)
    snapshot = remote(LearnerActor.snapshot, _answer)
    sleep = remote(LearnerActor.sleep, _answer)
    wake = remote(LearnerActor.wake, _answer)
    checksum = remote(LearnerActor.checksum, _answer)
    probe = remote(LearnerActor.probe, _answer)
    server_hashes = remote(LearnerActor.server_hashes, _answer)
    open_group = remote(LearnerActor.open_group, _answer)
    join = remote(LearnerActor.join, _answer)
    leave_group = remote(LearnerActor.leave_group, _answer)
    broadcast = remote(LearnerActor.broadcast, _answer)
    collect = remote(LearnerActor.collect, _answer)
    write = remote(LearnerActor.write, _answer)
    version = remote(LearnerActor.version, _work, repeatable=True)
    capture_state = remote(LearnerActor.capture_state, _work)
    save = remote(LearnerActor.save, _work)
    report = remote(LearnerActor.report, _short, repeatable=True)
    dump = remote(LearnerActor.dump, _short)


class WorkerHandle(Handle[RolloutActor]):
    """One rollout worker; the publisher's `WeightReceiver`.

    For the publisher a worker whose process is gone is a lost engine: the supervisor replaces it.
    `is_absent`: from then on until the new process is ready.
    """

    is_absent = False
    ready = remote(RolloutActor.ready, _start_with_margin)
    comes = remote(RolloutActor.ready, _unlimited)
    ping = remote(RolloutActor.ping, _short, repeatable=True)
    watch = remote(RolloutActor.run, _unlimited)
    lost = remote(RolloutActor.lost, _unlimited, repeatable=True)
    drain = remote(RolloutActor.drain, _work)
    restart = remote(RolloutActor.restart, _start_with_margin)
    back = remote(RolloutActor.back, _return, repeatable=True)
    evaluate = remote(RolloutActor.evaluate, _work)
    report = remote(RolloutActor.report, _short, repeatable=True)
    dump = remote(RolloutActor.dump, _short)
    _join = remote(RolloutActor.join, _answer)
    _receive = remote(RolloutActor.receive, _answer)
    _read = remote(RolloutActor.read, _answer)
    _reconnect = remote(RolloutActor.reconnect, _short)
    _quarantine = remote(RolloutActor.quarantine, _short)
    _confirm = remote(RolloutActor.confirm, _short)
    _sleep = remote(RolloutActor.sleep, _answer)
    _wake = remote(RolloutActor.wake, _answer)

    async def join(self, address: tuple[str, int], first_rank: int, size: int) -> bool | None:
        if not self.is_absent:
            with suppress(ActorDied):
                return await self._join(address, first_rank, size)
        return None

    async def receive(self, announcement: Announcement) -> Attestation | None:
        if not self.is_absent:
            with suppress(ActorDied):
                return await self._receive(announcement)
        return None

    async def read(self, announcement: Announcement, folder: str) -> Attestation | None:
        if not self.is_absent:
            with suppress(ActorDied):
                return await self._read(announcement, folder)
        return None

    async def reconnect(self, replay: Any) -> None:
        """Its calls go to the new replay actor, of which this is Ray's handle. A process that is
        starting or late gets this call later; the next replay actor calls again."""
        with suppress(ActorDied, ActorFailed, TimeoutError):
            await self._reconnect(replay)

    async def quarantine(self) -> None:
        if not self.is_absent:
            with suppress(ActorDied):
                await self._quarantine()

    async def confirm(self) -> None:
        if not self.is_absent:
            with suppress(ActorDied):
                await self._confirm()

    async def sleep(self) -> None:
        """Its engine releases its device memory; that of a dead process is free. An engine that
        fails to would keep it: its process is killed, and the supervisor replaces it."""
        await self._or_kill(self._sleep)

    async def wake(self) -> None:
        """Its engine takes its device memory again, or its process is killed."""
        await self._or_kill(self._wake)

    async def _or_kill(self, call: Callable[[], Awaitable[None]]) -> None:
        if self.is_absent:
            return
        try:
            await call()
        except ActorDied:
            pass
        except ActorFailed:
            self.kill()


class EvaluatorHandle(Handle[EvaluatorActor]):
    """The evaluator, in runs that evaluate during training."""

    ready = remote(EvaluatorActor.ready, _start_with_margin)
    watch = remote(EvaluatorActor.alive, _unlimited, repeatable=True)
    ping = remote(EvaluatorActor.ping, _short, repeatable=True)
    read = remote(EvaluatorActor.read, _work)
    evaluate = remote(EvaluatorActor.evaluate, _work)
    take_spans = remote(EvaluatorActor.take_spans, _short)
    dump = remote(EvaluatorActor.dump, _short)
