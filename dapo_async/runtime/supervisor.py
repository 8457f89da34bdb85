"""Keeps the actors of a run alive: replaces what dies, hangs or fails.

In: the handles of the actors, and how to start a new one. Out: the same handles, in front of new
processes. `system` runs one task per actor. The policies (`RestartBudget`, `Pulse`) are pure.

A worker goes through these states:

    joining ──────────────────────────────────────────┐
                                                      ▼
    healthy ──▶ suspect ──▶ dead ──▶ restarting ──▶ stale ──▶ healthy
       │           │ it answers again                 │
       ├───────────┴──── its engine is lost ──────────┘ (without a new process)
       └──▶ draining ──▶ retired    (it leaves the run, see `fleet`)

`stale`: it runs, and gets no groups before it has proved the newest weights (staleness bound,
handshake). Its unfinished groups go to other workers at once; finished groups stay in the replay
buffer. A worker that uses up its budget of restarts ends the run, and so does the learner.

A lost learner rank restarts all ranks, which do the steps since the newest checkpoint again
(`LearnerGroup.restore`). A lost replay actor is replaced by one that goes on from its journal. The
engines generate meanwhile, within the staleness bound.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dapo_async.config import MAX_RESTARTS
from dapo_async.runtime.actors.reports import ProcessInfo, WorkerReport
from dapo_async.runtime.alternation import OwnDevices
from dapo_async.runtime.handles.actors import EvaluatorHandle, ReplayHandle, WorkerHandle
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed, RankStateUnusable
from dapo_async.runtime.handles.learner_group import LearnerGroup
from dapo_async.runtime.standstill import Standstill
from dapo_async.tracking.event_log import Event, ignore_event
from dapo_async.utils.restart_budget import REFILL_S, RestartBudget
from dapo_async.weights import Publisher

PINGS = 3  # that are lost in a row before an actor counts as dead
EVALUATOR_PATIENCE = 4  # times deadlines.ping_s: it runs at the lowest priority


class ProcessState(StrEnum):
    """See the module docstring."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"  # it has not answered the last ping
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"
    JOINING = "joining"  # it has not been in the run before, and waits for room or starts
    DRAINING = "draining"  # it gives its groups back
    RETIRED = "retired"  # it has left the run


@dataclass(slots=True)
class Pulse:
    """Tells an actor that is alive from one that hangs, by its answers to pings."""

    lost_in_a_row: int = 0

    def beat(self, answered: bool) -> ProcessState:
        """The state after one more ping."""
        self.lost_in_a_row = 0 if answered else self.lost_in_a_row + 1
        if self.lost_in_a_row >= PINGS:
            return ProcessState.DEAD
        return ProcessState.SUSPECT if self.lost_in_a_row else ProcessState.HEALTHY


class Pinged(Protocol):
    """An actor's handle."""

    name: str

    def within(self, limit_s: float) -> Pinged: ...

    def ping(self) -> Coroutine[Any, Any, Any]: ...


async def until_silent(
    actor: Pinged,
    silence_s: float,
    seen: Callable[[ProcessState], None] = lambda _: None,
    answer: Callable[[Any], None] = lambda _: None,
) -> str:
    """Returns why, when `actor` has not answered its pings for about `silence_s` seconds.

    A ping that fails counts as answered: whoever watches the actor learns of its death. A stopped
    driver notices nothing wrong when it goes on, because one late answer is not enough. `answer`
    gets what the pings return.
    """
    pulse, limit_s = Pulse(), silence_s / PINGS
    while True:
        answered = True
        try:
            answer(await actor.within(limit_s).ping())
        except TimeoutError:
            answered = False
        except (ActorDied, ActorFailed):
            pass
        state = pulse.beat(answered)
        seen(state)
        if state is ProcessState.DEAD:
            return f"{actor.name} did not answer for {silence_s:g} s (deadlines.ping_s)"
        if answered:
            await asyncio.sleep(limit_s)


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a worker can't go on."""

    why: str
    process: bool  # its process is gone or useless; False: only its engine is


@dataclass(frozen=True, slots=True)
class Retired:
    """What the processes of a worker that are gone leave behind."""

    start: int  # how many they are
    balance: int  # response tokens that the replay actor got from them, less those that it gave
    last: WorkerReport | None = None  # of a worker that was drained


class Supervisor:
    """Replaces workers and the evaluator. `keep_worker` and `keep_evaluator` run for ever."""

    def __init__(
        self,
        *,
        replay: ReplayHandle,
        publisher: Publisher,
        start_replay: Callable[[int], Any],
        start_rank: Callable[[int, Path | None], Any],
        start_worker: Callable[[str, int], Any],
        start_evaluator: Callable[[], Any],
        without_room: Callable[[], Sequence[str]] = tuple,
        silence_s: float,
        start_s: float,
        say: Callable[[str], None],
        devices: OwnDevices | None = None,
        event: Event = ignore_event,
        now_s: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`start_replay(process)`, `start_rank(number, state)`, `start_worker(name, start)` and
        `start_evaluator()` return Ray's handle of a new actor.

        `state`: the `state/` folder of the checkpoint that the rank loads. `start`: 1 for the first
        replacement of a worker, and so on. `start_s`: after that time a worker that is not ready is
        reported. `devices`: says when a process may start that takes device memory; None: always.
        `without_room()`: the actors that no node has room for.
        """
        self._replay, self._publisher = replay, publisher
        self._start_replay, self._start_rank = start_replay, start_rank
        self.microbatch_tokens: int | None = None  # as the learner has chosen; set at the start
        self._start_worker, self._start_evaluator = start_worker, start_evaluator
        self._without_room = without_room
        self._silence_s, self._start_s, self._say = silence_s, start_s, say
        self._devices = devices or OwnDevices()
        self._event = event
        self._now_s, self._pause = now_s, pause
        self.restarts: Counter[str] = Counter()  # of engines and processes, by actor
        self.states: dict[str, ProcessState] = {}  # by worker, for a dump of the run
        self.processes: dict[str, ProcessInfo] = {}  # by actor, the newest that was ready
        self._starts: Counter[str] = Counter()  # of processes, by worker
        self._num_restarts_before = 0  # of workers that have left the run
        self._is_back: dict[str, asyncio.Event] = {}  # by worker, set while its process lives
        self._retired: dict[str, Retired] = {}
        self._standstill = Standstill(now_s)  # of the learner's ranks

    def take_retired(self) -> Mapping[str, Retired]:
        """By name: the workers whose process was lost since the last call."""
        retired, self._retired = self._retired, {}
        return retired

    @property
    def num_restarts(self) -> int:
        """Restarts of workers, of their engines or of their processes."""
        now = sum(count for name, count in self.restarts.items() if name in self._is_back)
        return self._num_restarts_before + now

    def is_gone(self, worker: str) -> bool:
        """Whether the worker's process is being replaced."""
        return worker in self._is_back and not self._is_back[worker].is_set()

    async def is_back(self, worker: str) -> None:
        """Waits until the worker has a process that is ready."""
        if worker in self._is_back:
            await self._is_back[worker].wait()

    @property
    def nodes(self) -> dict[str, str]:
        """Ray's id of the node of each worker that has started."""
        known = self.processes.items()
        return {name: info.node_id for name, info in known if name in self._is_back}

    def num_starts(self, worker: str) -> int:
        """How many processes of this name were lost or have left: the number of the next one."""
        return self._starts[worker]

    def retire(self, worker: str, balance: int, last: WorkerReport | None) -> None:
        """The worker has left. Another one may get its name later."""
        self._starts[worker] += 1
        self._retired[worker] = Retired(self._starts[worker], balance, last)
        self._is_back.pop(worker, None)
        self._num_restarts_before += self.restarts.pop(worker, 0)
        self.processes.pop(worker, None)
        self.states[worker] = ProcessState.RETIRED

    async def keep_worker(self, worker: WorkerHandle, *, joins: bool = False) -> None:
        """Runs the worker; never returns. Raises ActorDied when its budget is used up.

        `joins`: its first process is starting, and has none of the run's weights.
        """
        budget, is_proved = RestartBudget(MAX_RESTARTS), not joins
        self._is_back[worker.name] = asyncio.Event()
        if joins:
            running, is_proved = await self._join(worker)
        else:
            self._is_back[worker.name].set()
            running = asyncio.create_task(worker.watch(), name=worker.name)
        try:
            while True:
                loss = await self._until_lost(worker, running, serves=is_proved)
                self.states[worker.name] = ProcessState.DEAD
                await self._suspend(worker, loss)
                await self._spend(budget, worker.name, loss)
                self.states[worker.name] = ProcessState.RESTARTING
                if loss.process:
                    running.cancel()
                    await asyncio.gather(running, return_exceptions=True)
                async with self._devices.engine_starts(worker.name):
                    start = self._replace if loss.process else self._restart
                    lost_again = await start(worker)
                if lost_again:
                    running, is_proved = _failed(lost_again), False
                    continue
                if loss.process:
                    running = asyncio.create_task(worker.watch(), name=worker.name)
                running, is_proved = await self._prove(worker, running)
                if is_proved:
                    self._say(f"{worker.name} generates again")
                    self._event("engine_replaced", actor=worker.name)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _join(self, worker: WorkerHandle) -> tuple[asyncio.Task[None], bool]:
        """Takes a new worker into the run as soon as it has a node. Returns as `_prove` does."""
        self.states[worker.name] = ProcessState.JOINING
        await self._replay.suspend(worker.name, True)
        if lost := await self._come(worker):
            return _failed(lost), False
        running = asyncio.create_task(worker.watch(), name=worker.name)
        running, is_proved = await self._prove(worker, running)
        if is_proved:
            self._say(f"{worker.name} joins the run")
            self._event("worker_joined", actor=worker.name)
        return running, is_proved

    async def _prove(
        self, worker: WorkerHandle, running: asyncio.Task[None]
    ) -> tuple[asyncio.Task[None], bool]:
        """The worker proves the newest weights; it gets groups then. Returns its work, which has
        failed if the worker hangs, and whether they are proved."""
        self.states[worker.name] = ProcessState.STALE
        try:
            async with self._devices.engine_returns(worker.name):
                is_proved = await self._publisher.restore(worker)
            if is_proved:
                await self._replay.suspend(worker.name, False)
        except TimeoutError as error:  # it hangs
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            return _failed(str(error)), False
        except BaseException:
            running.cancel()
            raise
        return running, is_proved

    async def keep_learner(self, learner: LearnerGroup) -> None:
        """Restarts the ranks when one is lost; never returns. Raises ActorDied when that is not
        possible."""
        budget = RestartBudget(MAX_RESTARTS)
        learner.restarts.keep()
        try:
            rank, why = await self._until_a_rank_is_lost(learner)
            while True:
                if learner.redo.fault is not None:
                    raise ActorDied(rank, f"{why}; {learner.redo.fault}")
                learner.lose()
                self._publisher.lose_source()
                began_s = self._now_s()
                await self._spend(budget, rank, Loss(why, process=True))
                newest = self._publisher.newest
                published = newest.version if newest is not None else None
                try:
                    async with self._devices.learner_restarts():
                        infos = await learner.restore(self._start_rank, published=published)
                    # Not sooner: an engine that sleeps meanwhile can't read what the learner sends.
                    learner.restarts.go_on()
                except (ActorDied, ActorFailed, TimeoutError) as error:
                    if isinstance(error, TimeoutError):
                        self._check_room(learner, rank, why)
                    if isinstance(error, RankStateUnusable):
                        self._step_back(learner, rank, str(error))
                    rank, why = getattr(error, "actor", rank), str(error)
                    continue
                self._publisher.source_is_back()
                for info in infos:
                    self._started(info)
                again = sum(done.batch is not None for done in learner.redo.entries)
                self._say(
                    f"the learner trains again after {self._now_s() - began_s:.1f} s, in which it "
                    f"did {again} minibatches since version {learner.redo.version} again"
                )
                self._event("learner_restarted", actor=rank, minibatches=again)
                rank, why = await self._until_a_rank_is_lost(learner)
        finally:
            learner.restarts.end()

    def _step_back(self, learner: LearnerGroup, rank: str, why: str) -> None:
        """The checkpoint at which the ranks begin is damaged: they begin at the one before. Raises
        ActorDied when that is not possible."""
        redo = learner.redo
        damaged = redo.state.parent if redo.state is not None else None
        if not redo.step_back():
            raise ActorDied(
                rank,
                f"can't go on from {damaged}, which is damaged ({why}), and the steps since an "
                f"older checkpoint are not kept; copy the checkpoint whole or remove {damaged}, "
                "and resume the run",
            )
        self._say(
            f"{damaged} is damaged, so the learner begins at version {redo.version} instead: {why}"
        )
        self._event("checkpoint_damaged", path=str(damaged), version=redo.version)

    def _check_room(self, learner: LearnerGroup, rank: str, why: str) -> None:
        """Raises ActorDied when ranks could not start because their node is lost and no other one
        has room: the run can't go on without them, and a new driver may plan anew."""
        without = {*self._without_room()} & {rank.name for rank in learner.ranks}
        if without:
            raise ActorDied(
                rank,
                f"is lost ({why}), and within {self._start_s:g} s (deadlines.start_s) no node had "
                f"room for {', '.join(sorted(without))}; add a node, and resume the run",
            )

    async def _until_a_rank_is_lost(self, learner: LearnerGroup) -> tuple[str, str]:
        """The rank that died, failed or hangs, and why."""
        ranks = learner.ranks
        watches = {
            asyncio.create_task(watch): rank.name
            for rank in ranks
            for watch in (
                rank.watch(),
                until_silent(
                    rank, self._silence_s, answer=partial(self._rank_answers, learner, rank.name)
                ),
            )
        }
        watches[asyncio.create_task(learner.broken())] = learner.first.name
        return await _first_end(watches)

    def _rank_answers(self, learner: LearnerGroup, rank: str, line: str | None) -> None:
        """Says when the ranks get nowhere. A deadline ends the run later."""
        times = learner.times
        where = self._standstill.seen(rank, line, limit_s=times.standstill_s, work=times.num_ended)
        if where is not None:
            usual = f"{times.median_s:.1f} s" if times.median_s is not None else "not known yet"
            self._tell_standstill("the learner", rank, f"{where} (usual for a minibatch: {usual})")

    def _tell_standstill(self, who: str, actor: str, where: str) -> None:
        self._say(
            f"{who} gets nowhere: {where}; dapo-async dump shows every stack, and the run ends "
            "when a deadline has passed (deadlines.work_s)"
        )
        self._event("standstill", actor=actor, where=where)

    async def keep_replay(self, workers: Sequence[WorkerHandle]) -> None:
        """Restarts the replay actor, which recovers from its journal; never returns. Raises
        ActorDied when its budget is used up."""
        replay, budget = self._replay, RestartBudget(MAX_RESTARTS)
        reconnecting: asyncio.Future[list[None]] = asyncio.gather()  # of the workers
        replay.restarts.keep()
        try:
            why = await self._until_replay_is_lost()
            while True:
                replay.lose()
                began_s = self._now_s()
                await self._spend(budget, replay.name, Loss(why, process=True))
                replay.replace(self._start_replay(replay.restarts.num_losses))
                try:
                    info = await replay.ready()
                except (ActorDied, ActorFailed, TimeoutError) as error:
                    why = str(error)
                    continue
                replay.restarts.go_on()
                if self.microbatch_tokens is not None:
                    with suppress(ActorDied, ActorFailed, TimeoutError):  # lost again: seen below
                        await replay.plan_with(self.microbatch_tokens)
                reconnecting.cancel()
                reconnects = [worker.reconnect(replay.actor) for worker in workers]
                reconnecting = asyncio.gather(*reconnects)
                self._started(info)
                took_s = self._now_s() - began_s
                self._say(f"replay goes on after {took_s:.1f} s, from its journal")
                self._event("replay_restarted", actor=replay.name, seconds=round(took_s, 2))
                why = await self._until_replay_is_lost()
        finally:
            replay.restarts.end()
            reconnecting.cancel()
            await asyncio.gather(reconnecting, return_exceptions=True)

    async def _until_replay_is_lost(self) -> str:
        replay = self._replay
        watches = {
            asyncio.create_task(watch): replay.name
            for watch in (replay.watch(), until_silent(replay, self._silence_s))
        }
        return (await _first_end(watches))[1]

    async def keep_evaluator(self, evaluator: EvaluatorHandle) -> None:
        """Watches the evaluator; never returns. An evaluation that dies with it is left out."""
        budget, is_new = RestartBudget(MAX_RESTARTS), False
        while True:
            try:
                if is_new:
                    self._started(await evaluator.ready())
                watches = {
                    asyncio.create_task(watch): evaluator.name
                    for watch in (
                        evaluator.watch(),
                        until_silent(evaluator, EVALUATOR_PATIENCE * self._silence_s),
                    )
                }
                _, why = await _first_end(watches)
            except (ActorDied, ActorFailed, TimeoutError) as error:
                why = str(error)
            await self._spend(budget, evaluator.name, Loss(why, process=True))
            evaluator.kill()
            evaluator.replace(self._start_evaluator())
            is_new = True

    async def _until_lost(
        self, worker: WorkerHandle, running: asyncio.Task[None], *, serves: bool
    ) -> Loss:
        """Waits until the engine is lost, or the process is dead, silent or has failed.

        A worker that does not serve, because it was lost again before, is not noted as healthy.
        """

        def seen(state: ProcessState) -> None:
            if serves:
                self.states[worker.name] = state

        standstill = Standstill(self._now_s)

        def answer(line: str | None) -> None:
            if (where := standstill.seen(worker.name, line)) is not None:
                self._tell_standstill("an engine", worker.name, where)

        seen(ProcessState.HEALTHY)
        lost = asyncio.create_task(worker.lost())
        silent = asyncio.create_task(until_silent(worker, self._silence_s, seen, answer))
        try:
            await asyncio.wait({running, lost, silent}, return_when=asyncio.FIRST_COMPLETED)
            if lost.done() and lost.exception() is None:
                return Loss(lost.result(), process=False)
            if silent.done() and silent.exception() is None:
                return Loss(silent.result(), process=True)
            return Loss(_end(running if running.done() else lost), process=True)
        finally:
            for task in (lost, silent):
                task.cancel()
            await asyncio.gather(lost, silent, return_exceptions=True)

    async def _suspend(self, worker: WorkerHandle, loss: Loss) -> None:
        """The worker gets no groups, no weights, and nothing waits for it. A dead one's groups go
        to other workers."""
        if loss.process:
            self._is_back[worker.name].clear()
            worker.is_absent = True
            worker.kill()  # it may hang; breaks off the calls that wait for it
        await self._replay.suspend(worker.name, True)
        self._publisher.lose(worker)
        if loss.process:
            start = self._starts[worker.name]
            balance = await self._replay.lose_worker(worker.name, start)
            self._retired[worker.name] = Retired(start + 1, balance)

    async def _spend(self, budget: RestartBudget, name: str, loss: Loss) -> None:
        """Counts a restart, says so, and waits for the pause before it."""
        what = "its process" if loss.process else "its engine"
        pause_s = budget.spend(self._now_s())
        if pause_s is None:
            raise ActorDied(
                name,
                f"lost {what}, after {budget.spent} restarts in {REFILL_S / 60:g} minutes "
                f"({budget.limit} are allowed): {loss.why}",
            )
        self.restarts[name] += 1
        lost = "process_lost" if loss.process else "engine_lost"
        self._event(lost, actor=name, why=loss.why, count=self.restarts[name])
        after = f" in {pause_s:g} s" if pause_s else ""
        known = self.processes.get(name)
        where = f" (pid {known.pid} on {known.node})" if known is not None else ""
        self._say(
            f"{name} lost {what}: {loss.why}{where}; restarting it{after} "
            f"({budget.spent} of {budget.limit})"
        )
        await self._pause(pause_s)

    def _started(self, info: ProcessInfo) -> None:
        """Notes and prints a new process."""
        self.processes[info.name] = info
        self._say(f"{info.name} pid {info.pid} on {info.node}  {info.detail}")

    async def _restart(self, worker: WorkerHandle) -> str:
        """Restarts the engine in its process. Returns why that failed, or nothing."""
        try:
            await worker.restart()
        except (ActorDied, ActorFailed, TimeoutError) as error:
            return str(error)
        return ""

    async def _replace(self, worker: WorkerHandle) -> str:
        """Starts a new process, wherever there is room. Returns why that failed, or nothing.

        While there is no room, training goes on with the other workers.
        """
        self._starts[worker.name] += 1
        worker.replace(self._start_worker(worker.name, self._starts[worker.name]))
        return await self._come(worker)

    async def _come(self, worker: WorkerHandle) -> str:
        """Waits for a process that was started. Returns why it did not come, or nothing."""
        began_s = self._now_s()
        coming = asyncio.create_task(worker.comes())
        try:
            while not (await asyncio.wait([coming], timeout=self._start_s))[0]:
                self._say(
                    f"{worker.name} is not ready after {self._now_s() - began_s:.0f} s: "
                    "it waits for a node with room, or starts slowly"
                )
                if all(self.is_gone(name) for name in self._is_back):
                    return (
                        f"no worker is left, and {worker.name} was not ready within "
                        f"{self._start_s:g} s (deadlines.start_s)"
                    )
            info = coming.result()
        except (ActorDied, ActorFailed, TimeoutError) as error:
            return str(error)
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        self._started(info)
        worker.is_absent = False
        self._is_back[worker.name].set()
        return ""


async def _first_end(watches: Mapping[asyncio.Task[Any], str]) -> tuple[str, str]:
    """The name of the watch that ends first, and why it has ended."""
    try:
        ended, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
        first = next(iter(ended))
        return watches[first], _end(first) if first.exception() else str(first.result())
    finally:
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)


def _end(task: asyncio.Task[Any]) -> str:
    """Why a task that must not end has ended."""
    error = task.exception()
    return "it ended by itself" if error is None else str(error)


def _failed(why: str) -> asyncio.Task[None]:
    """A task that has ended for this reason."""

    async def fail() -> None:
        raise ActorFailed(why)

    return asyncio.create_task(fail())
