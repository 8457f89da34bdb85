"""The rollout workers of a run, whose number changes while it goes on.

In: the number asked for (`dapo-async scale`, see `scale_desk`) and Ray's news of nodes that are
about to go. Out: workers that join and leave, one task each. `scale_plan` says which; `supervisor`
keeps those that are in the run.

A worker that leaves is admitted nothing, gets no weights any more, and gives all its groups back,
finished or not. Its process ends then. If it dies or hangs meanwhile, its groups go to other
workers as after any death.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dapo_async.config import Config
from dapo_async.runtime.actors.reports import WorkerReport
from dapo_async.runtime.handles.actors import ReplayHandle, WorkerHandle
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed
from dapo_async.runtime.launch import Actors
from dapo_async.runtime.scale_desk import ScaleDesk, with_workers
from dapo_async.runtime.scale_plan import Change, Member, next_change, number_of
from dapo_async.runtime.supervisor import ProcessState, Supervisor, until_silent
from dapo_async.tracking.event_log import Event, ignore_event
from dapo_async.weights import Publisher

SERVES = (ProcessState.HEALTHY, ProcessState.SUSPECT)
LOOK_S = 1.0  # between two looks for a request and for nodes that are about to go
NODE_MARGIN_S = 5.0  # before a node goes: a worker that is not drained by then is lost


class Room(Protocol):
    """What the cluster says."""

    def fault(self, config: Config) -> str | None:
        """Why it has no room for the engines of `config`."""
        ...

    def going_nodes(self) -> Mapping[str, float]:
        """Nodes that are about to go, and when, in seconds since the epoch; 0: not known."""
        ...


class Fleet:
    """`keep` runs for ever. `workers`: also those that join; the list is shared with the actors."""

    def __init__(
        self,
        config: Config,
        actors: Actors,
        *,
        supervisor: Supervisor,
        publisher: Publisher,
        replay: ReplayHandle,
        say: Callable[[str], None],
        event: Event = ignore_event,
        desk: ScaleDesk | None = None,
        room: Room | None = None,
    ) -> None:
        """Without `desk` nobody asks for another number; without `room` no node goes."""
        self.workers, self.wanted = actors.workers, config.rollout.num_workers
        self._config, self._actors = config, actors
        self._supervisor, self._publisher, self._replay = supervisor, publisher, replay
        self._say, self._event, self._desk, self._room = say, event, desk, room
        # An engine on a learner's device and a server that runs already can't move.
        self._can_move = not (config.model.is_shared or config.rollout.server_urls)
        self._keeps: dict[str, asyncio.Task[None]] = {}  # by worker that is not leaving
        self._drains: dict[str, asyncio.Task[None]] = {}  # by worker that is
        self._new: set[str] = set()  # workers that have not served yet
        self._num_joined = self._num_left = 0  # since the start; those that never served included
        self._going: Mapping[str, float] = {}  # nodes
        self._quiet = asyncio.Event()  # no evaluation runs on the workers
        self._quiet.set()

    @property
    def members(self) -> list[WorkerHandle]:
        """The workers that have joined and are not leaving."""
        states = self._supervisor.states
        self._new = {name for name in self._new if states.get(name) is not ProcessState.HEALTHY}
        return [
            each
            for each in self.workers
            if each.name not in self._new and each.name not in self._drains
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """For `dapo-async status`: the number asked for, and each worker that does not serve."""
        states = self._supervisor.states
        known = {each.name: states.get(each.name, ProcessState.HEALTHY) for each in self.workers}
        others = {name: state.value for name, state in known.items() if state not in SERVES}
        return {"wanted": self.wanted, "here": len(self.members), "states": others}

    @property
    def counts(self) -> dict[str, int]:
        """For the summary."""
        return {
            "asked_for": self.wanted,
            "here": len(self.members),
            "joined": self._num_joined,
            "left": self._num_left,
        }

    async def begin_evaluation(self) -> list[WorkerHandle]:
        """Returns the workers that may share it: none of them leaves before `end_evaluation`."""
        while self._drains or not self.members:
            await asyncio.sleep(LOOK_S / 10)
        self._quiet.clear()
        return self.members

    def stand_in(self, worker: WorkerHandle, part: int) -> WorkerHandle:
        """Who does this part of an evaluation: `worker`, or another one if it will not be back."""
        name, members = worker.name, self.members
        has_left = self._supervisor.states.get(name) is ProcessState.RETIRED
        is_lost = name in self._drains and self._supervisor.is_gone(name)
        return members[part % len(members)] if members and (has_left or is_lost) else worker

    def end_evaluation(self) -> None:
        """Workers may leave again."""
        self._quiet.set()

    async def keep(self) -> None:
        """Keeps the workers. Raises ActorDied when one can't be replaced."""
        for worker in self.workers:
            self._keep(worker, joins=False)
        try:
            while True:
                tasks = {*self._keeps.values(), *self._drains.values()}
                timeout_s = LOOK_S if self._desk is not None or self._room is not None else None
                if tasks:
                    await asyncio.wait(
                        tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
                    )
                else:
                    await asyncio.sleep(LOOK_S)
                self._check()
                self._look()
        finally:
            tasks = {*self._keeps.values(), *self._drains.values()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _keep(self, worker: WorkerHandle, *, joins: bool) -> None:
        keep = self._supervisor.keep_worker(worker, joins=joins)
        self._keeps[worker.name] = asyncio.create_task(keep, name=worker.name)

    def _check(self) -> None:
        """Raises what ends the run. A worker that never served ends only itself."""
        for name, task in [*self._drains.items()]:
            if task.done():
                del self._drains[name]
                task.result()
        for name, task in [*self._keeps.items()]:
            if not task.done():
                continue
            error = task.exception()
            if not isinstance(error, ActorDied):
                raise error or ActorDied(name, "ended by itself while the run went on")
            others = [each for each in self.members if each.name != name]
            if name not in self._new or not others:
                raise error
            self.wanted = max(1, self.wanted - 1)
            self._actors.resize(self.wanted)
            self._say(
                f"{name} could not join: {error}; the run goes on with {self.wanted} rollout "
                f"worker{'s' * (self.wanted > 1)}"
            )
            self._drain(name)

    def _look(self) -> None:
        """Takes requests and news of nodes, and starts what follows from them."""
        if self._room is not None:
            going = self._room.going_nodes()
            for node_id in going.keys() - self._going.keys():
                names = [name for name, at in self._supervisor.nodes.items() if at == node_id]
                told = ", ".join(names) or "no rollout worker"
                self._say(f"node {node_id[:12]} is being drained; on it: {told}")
                self._event("node_drained", node=node_id, workers=names)
            self._going = going
        if self._desk is not None and (request := self._desk.take()) is not None:
            before = self.wanted, self._config
            try:
                line = self._resize(request.rollout)
                self._desk.accept(request, line)
                self._say(line)
                self._event("scale", rollout=self.wanted, before=before[0])
            except (ValueError, OSError) as error:
                self.wanted, self._config = before
                self._actors.resize(self.wanted)
                cause = isinstance(error, OSError)
                why = f"{self._desk.folder} can't be written: " if cause else ""
                self._desk.refuse(request, f"{why}{error}")
        self._apply()

    def _resize(self, count: int) -> str:
        """Returns a line about what happens. Raises ValueError where it can't."""
        config = with_workers(self._config, count)
        room = self._room if count > self.wanted else None
        if room is not None and (fault := room.fault(config)) is not None:
            raise ValueError(fault)
        before, self.wanted, self._config = self.wanted, count, config
        self._actors.resize(count)
        change = self._change()
        told = [f"{name} starts" for name in change.start]
        told += [f"{name} leaves" for name in change.drain]
        return f"rollout.num_workers {before} -> {count}: {', '.join(told) or 'nothing to do'}"

    def _change(self) -> Change:
        states, nodes = self._supervisor.states, self._supervisor.nodes
        members = [
            Member(
                each.name,
                serves=states.get(each.name) in SERVES,
                node_id=nodes.get(each.name),
            )
            for each in self.workers
            if each.name in self._keeps
        ]
        return next_change(
            self.wanted,
            members,
            leaving=self._drains.keys(),
            going_nodes=self._going.keys() if self._can_move else (),
        )

    def _apply(self) -> None:
        change = self._change()
        for name in change.start:
            self._join(name)
        for name in change.drain:
            self._drain(name)

    def _join(self, name: str) -> None:
        assert self._actors.join_worker is not None, "these actors can't be more"
        worker = self._actors.join_worker(name, self._supervisor.num_starts(name))
        worker.is_absent = True
        self._new.add(name)
        self._num_joined += 1
        self.workers.append(worker)
        self.workers.sort(key=lambda each: number_of(each.name))
        self._publisher.add(worker)
        self._keep(worker, joins=True)

    def _drain(self, name: str) -> None:
        worker = next(each for each in self.workers if each.name == name)
        keep = self._keeps.pop(name)
        leaving = self._leave(worker, keep)
        self._drains[name] = asyncio.create_task(leaving, name=f"{name} leaves")

    async def _leave(self, worker: WorkerHandle, keep: asyncio.Task[None]) -> None:
        """From the decision to the end of the process."""
        name, supervisor, began_s = worker.name, self._supervisor, time.monotonic()
        await self._until_quiet(name, keep)
        keep.cancel()  # from now on nobody replaces it
        await asyncio.gather(keep, return_exceptions=True)
        supervisor.states[name] = ProcessState.DRAINING
        last: WorkerReport | None = None
        await self._replay.suspend(name, True)
        if not worker.is_absent:
            try:
                async with asyncio.timeout(self._within_s(name)):
                    last = await self._drained(worker)
            except (ActorDied, ActorFailed, TimeoutError) as error:
                why = str(error) or "it was late"
                self._say(f"{name} was not drained: {why}; its groups go to other workers")
        self._publisher.drop(worker)
        worker.is_absent = True
        worker.kill()
        balance = await self._replay.lose_worker(name, supervisor.num_starts(name))
        supervisor.retire(name, balance, last)
        self._new.discard(name)
        self._num_left += 1
        self.workers.remove(worker)
        self._actors.leave_worker(name)
        took_s = time.monotonic() - began_s
        self._say(f"{name} has left the run after {took_s:.1f} s")
        self._event("worker_left", actor=name, drained=last is not None, seconds=round(took_s, 2))

    async def _until_quiet(self, name: str, keep: asyncio.Task[None]) -> None:
        """No evaluation needs the worker any more, or it can't do its part."""
        quiet = asyncio.create_task(self._quiet.wait())
        try:
            while not (quiet.done() or keep.done() or self._supervisor.is_gone(name)):
                await asyncio.wait(
                    {quiet, keep}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED
                )
        finally:
            quiet.cancel()

    async def _drained(self, worker: WorkerHandle) -> WorkerReport:
        """The worker's last report, when it has nothing in hand any more."""

        async def leave() -> None:
            await self._publisher.leave(worker)  # after the publish in flight
            await worker.drain()

        silence_s = self._config.deadlines.ping_s
        drain = asyncio.create_task(leave())
        silent = asyncio.create_task(until_silent(worker, silence_s))
        try:
            await asyncio.wait({drain, silent}, return_when=asyncio.FIRST_COMPLETED)
            if not drain.done():
                raise TimeoutError(silent.result())
            drain.result()
        finally:
            drain.cancel()
            silent.cancel()
            await asyncio.gather(drain, silent, return_exceptions=True)
        return await worker.report()

    def _within_s(self, name: str) -> float:
        """How long a worker may take to leave."""
        limit_s = self._config.deadlines.work_s
        goes_s = self._going.get(self._supervisor.nodes.get(name, ""), 0.0)
        return min(limit_s, max(0.0, goes_s - time.time() - NODE_MARGIN_S)) if goes_s else limit_s
