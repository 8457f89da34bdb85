"""All actors of one run as the loop uses them, the background work, and the watch over both."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from dapo_async.config import Config
from dapo_async.evaluate import Evaluation
from dapo_async.runtime.actors.reports import LearnerReport, ProcessInfo, ReplayReport, WorkerReport
from dapo_async.runtime.alternation import OwnDevices, SharedDevices
from dapo_async.runtime.cluster.environment import LOCAL
from dapo_async.runtime.cluster.head_watch import ray_listens, watch_head
from dapo_async.runtime.fleet import Fleet, Room
from dapo_async.runtime.handles.actors import (
    EvaluatorHandle,
    LearnerHandle,
    ReplayHandle,
    WorkerHandle,
)
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed
from dapo_async.runtime.handles.learner_group import LearnerGroup
from dapo_async.runtime.handles.redo_log import RedoLog
from dapo_async.runtime.handles.restarts import DEATH_NEWS_S
from dapo_async.runtime.launch import Actors, AnyHandle
from dapo_async.runtime.scale_desk import ScaleDesk
from dapo_async.runtime.supervisor import ProcessState, Supervisor
from dapo_async.tracking.event_log import Event, ignore_event
from dapo_async.weights import Announcement, Publisher

T = TypeVar("T")
Report = ReplayReport | LearnerReport | WorkerReport
SLOW_START_S = 20.0  # a start that takes longer is reported, again and again


class System:
    """Uses the actors of one run, which `launch.start_actors` has started; `kill` ends them."""

    def __init__(
        self,
        config: Config,
        actors: Actors,
        *,
        say: Callable[[str], None],
        event: Event = ignore_event,
        redo: RedoLog | None = None,
        desk: ScaleDesk | None = None,
        room: Room | None = None,
    ) -> None:
        """`say` prints a line for the user; `event` adds one to the log of events. `redo`: of the
        checkpoint that the learner resumes from. `desk`, `room`: see `Fleet`."""
        self._config, self._actors, self._say, self.event = config, actors, say, event
        self.started = False
        self.replay, self.workers, self.evaluator = actors.replay, actors.workers, actors.evaluator
        self.learner = LearnerGroup(actors.ranks, config, redo=redo)
        self.learner.again = self.replay.batch_again
        self.devices = (
            SharedDevices(
                config,
                learner=self.learner,
                workers=self.workers,
                ranks=[rank.name for rank in actors.ranks],
            )
            if config.model.is_shared
            else OwnDevices()
        )
        self._first_snapshot: Announcement | None = None
        self.background: set[asyncio.Task[Any]] = set()  # checkpoints, reports, evaluations
        self.publisher = Publisher(
            self.learner,
            self.workers,
            transport=config.weights.transport,
            tolerance=config.model.probe_tolerance,
            deadline_s=config.deadlines.answer_s,
            regroup=self._regroup,
        )
        self.supervisor = Supervisor(
            replay=self.replay,
            publisher=self.publisher,
            start_replay=actors.start_replay,
            start_rank=actors.start_rank,
            start_worker=actors.start_worker,
            start_evaluator=actors.start_evaluator,
            without_room=actors.without_room,
            silence_s=config.deadlines.ping_s,
            start_s=config.deadlines.start_s,
            say=say,
            devices=self.devices,
            event=event,
        )
        self.fleet = Fleet(
            config,
            actors,
            supervisor=self.supervisor,
            publisher=self.publisher,
            replay=self.replay,
            say=say,
            event=event,
            desk=desk,
            room=room,
        )

    async def start(self) -> list[ProcessInfo]:
        """Waits until every actor is ready. Says which ones are not when that takes long."""
        start_s, began_s = self._config.deadlines.start_s, time.monotonic()
        others: list[ReplayHandle | WorkerHandle | EvaluatorHandle] = [self.replay, *self.workers]
        others += [self.evaluator] if self.evaluator is not None else []
        learner = asyncio.create_task(self._learner_ready())

        async def ready(actor: ReplayHandle | WorkerHandle | EvaluatorHandle) -> ProcessInfo:
            if self._config.model.is_shared and actor in self.workers:
                await asyncio.wait([learner])  # an engine takes what the learner leaves
            return await actor.ready()

        tasks = {actor.name: asyncio.create_task(ready(actor)) for actor in others}
        everything = asyncio.gather(learner, *tasks.values())
        # An interrupt cancels it unawaited: without this asyncio prints that.
        everything.add_done_callback(lambda all_: all_.cancelled() or all_.exception())
        try:
            while not (await asyncio.wait([everything], timeout=SLOW_START_S))[0]:
                slow = [
                    name for name, task in {"learner": learner, **tasks}.items() if not task.done()
                ]
                self._say(
                    f"{', '.join(slow)} not ready after {time.monotonic() - began_s:.0f} s "
                    f"(deadlines.start_s is {start_s:g})"
                )
            await everything
            tokens = await self.learner.first.microbatch_tokens()
            self.supervisor.microbatch_tokens = tokens
            await self.replay.plan_with(tokens)
        finally:
            for task in (learner, *tasks.values()):
                task.cancel()
            await asyncio.gather(learner, *tasks.values(), return_exceptions=True)
        self.started = True
        replay, *infos = (task.result() for task in tasks.values())
        every = [replay, *learner.result(), *infos]
        self.supervisor.processes = {info.name: info for info in every}
        return every

    async def _learner_ready(self) -> list[ProcessInfo]:
        """On shared devices the engines have the first turn, with the learner's weights."""
        infos = await self.learner.ready()
        if self._config.model.is_shared:
            self._first_snapshot = await self.learner.snapshot()
            await self.learner.sleep()
        return infos

    async def first_snapshot(self) -> Announcement:
        """Of the weights with which training begins, for the first publish."""
        return self._first_snapshot or await self.learner.snapshot()

    async def to_learner(self) -> None:
        """Returns when the learner may train on shared devices: every engine has the newest weights
        and sleeps."""
        await self.publisher.finish()
        await self.devices.to_learner()

    def served(self, version: int) -> None:
        """Notes that every engine serves `version`, with the newest publish."""
        results = self.publisher.last_results
        self.event(
            "publish",
            version=version,
            engines=len(results),
            pause_s=round(self.publisher.last_pause_s, 4),
            probe_gap=max((result.probe_gap for result in results), default=0.0),
        )
        if kinds := self.publisher.uncompared():
            self._say(
                f"handshake: no hash of {', '.join(kinds)} was the one that the learner expects; "
                "the servers hold them in a form of their own, so only the probe checks them"
            )

    async def _regroup(self, names: Sequence[str]) -> frozenset[str] | None:
        """Forms the weight group: the learner's first rank and the ranks of the named engines.

        Returns None, or the engines that were lost meanwhile, if the group was not formed.
        """
        learner, losses = self.learner, self.learner.restarts.num_losses
        tp = self._config.rollout.tensor_parallel
        members = [worker for worker in self.workers if worker.name in names]
        size = 1 + len(members) * tp
        address = await learner.open_group()

        async def join(place: int, worker: WorkerHandle) -> bool | None:
            joined = await worker.join(address, 1 + place * tp, size)
            if joined is None:  # lost: nobody has to wait for it
                await learner.leave_group()
            return joined

        joins = [join(place, worker) for place, worker in enumerate(members)]
        failure, *joined = await asyncio.gather(learner.join(size), *joins)
        if failure is None and all(joined):
            return None
        lost = [worker.name for worker, each in zip(members, joined, strict=True) if each is None]
        if not lost and learner.restarts.num_losses == losses:
            raise RuntimeError(
                "the weight group was not formed, though neither an engine nor the learner was "
                f"lost: {failure or 'an engine could not join'}"
            )
        return frozenset(lost)

    def in_background(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Runs `work` beside the steps; a failure ends the run."""
        task = asyncio.create_task(work, name=name)
        self.background.add(task)
        return task

    async def settle(self) -> None:
        """Waits for the publish in flight and for all background work."""
        await self.publisher.finish()
        await asyncio.gather(*self.background)

    async def watched(self, main: Coroutine[Any, Any, T]) -> T:
        """Runs `main`. Actors that are lost are replaced. An actor that can't be replaced, or a
        failure in the background, ends it (no silent death)."""
        task = asyncio.create_task(main, name="main")
        supervisor = self.supervisor
        watches = [
            asyncio.create_task(supervisor.keep_replay(self.workers), name=self.replay.name),
            asyncio.create_task(supervisor.keep_learner(self.learner), name="learner"),
            asyncio.create_task(self.fleet.keep(), name="the rollout workers"),
        ]
        head = watch_head(own_ray=self._config.ray.address == LOCAL)
        watches.append(asyncio.create_task(head, name="Ray's head"))
        if self.evaluator is not None:
            keep = supervisor.keep_evaluator(self.evaluator)
            watches.append(asyncio.create_task(keep, name=self.evaluator.name))
        try:
            while not task.done():
                running = self._running()
                # The set changes with every step: look again at least once a second.
                await asyncio.wait(
                    {task, *watches, *running}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED
                )
                for watch in watches:
                    if watch.done() and not _is_success(task):
                        watch.result()
                        raise ActorDied(watch.get_name(), "ended by itself while the run went on")
            return task.result()
        except ActorFailed:
            # A broken connection shows at its other end before Ray reports the death behind it.
            ended, _ = await asyncio.wait(watches, timeout=DEATH_NEWS_S)
            for watch in ended:
                if isinstance(death := watch.exception(), ActorDied):
                    raise death from None
            raise
        finally:
            others = [task, *watches, *self.background]
            for each in others:
                each.cancel()
            # What they raise now follows from the first failure, which is the one to report.
            await asyncio.gather(*others, return_exceptions=True)

    def unserved(self) -> str:
        """Which engines the publish in flight waits for, for the message of a passed deadline: a
        hanging engine delays a batch through the credits of that publish."""
        publish = self.publisher.in_flight
        if publish is None or publish.done():
            return ""
        names = ", ".join(worker.name for worker in self.publisher.serving)
        return f"; {publish.get_name()} still waited for {names}"

    @property
    def num_workers(self) -> int:
        """Rollout workers that have joined and are not leaving."""
        return len(self.fleet.members)

    def has_left(self, worker: str) -> bool:
        """Whether the worker was in the run once and is not any more."""
        return self.supervisor.states.get(worker) is ProcessState.RETIRED

    def _running(self) -> set[asyncio.Task[Any]]:
        """Background work and publish in flight; what has ended raises its failure here."""
        publish = self.publisher.in_flight
        running = {*self.background, *([publish] if publish is not None else [])}
        for done in [each for each in running if each.done()]:
            done.result()
            self.background.discard(done)
            running.discard(done)
        return running

    async def evaluate(self) -> Evaluation:
        """Accuracy on the held-out prompts, shared among the workers. A worker that loses
        its engine or its process evaluates its share when it is back."""

        workers = await self.fleet.begin_evaluation()

        turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by worker

        async def evaluate(worker: WorkerHandle, part: int) -> Evaluation:
            """One part, again and again until it is evaluated."""
            while True:
                worker = self.fleet.stand_in(worker, part)
                if self.supervisor.is_gone(worker.name):
                    await asyncio.sleep(DEATH_NEWS_S)
                    continue
                try:
                    async with turns[worker.name]:  # it may stand in for another one
                        evaluation = await worker.evaluate(part, len(workers))
                    if evaluation is not None:
                        return evaluation
                    await worker.back()
                except ActorDied:
                    await asyncio.sleep(DEATH_NEWS_S)  # the supervisor hears of it, too

        try:
            first, *others = await asyncio.gather(
                *(evaluate(worker, part) for part, worker in enumerate(workers))
            )
        finally:
            self.fleet.end_evaluation()
        return sum(others, start=first)

    async def reports(self, *, deadline_s: float) -> dict[str, Report | BaseException]:
        """Each actor's report, or the error that came instead. The evaluator is left out: with the
        lowest priority it may answer late. So are processes that are lost and being replaced."""
        actors: list[ReplayHandle | LearnerHandle | WorkerHandle] = [
            self.replay,
            *(self.learner.ranks if self.learner.restarts.is_whole else ()),
            *(worker for worker in self.workers if not self.supervisor.is_gone(worker.name)),
        ]
        calls: list[Coroutine[Any, Any, Report]] = [
            actor.within(deadline_s).report() for actor in actors
        ]
        replaced = {worker.name for worker in self.workers}
        answers = await asyncio.gather(*calls, return_exceptions=True)
        if self.learner.restarts.is_kept:
            replaced |= {rank.name for rank in self.learner.ranks}
        return {
            actor.name: answer
            for actor, answer in zip(actors, answers, strict=True)
            if not (actor.name in replaced and isinstance(answer, ActorDied))
        }

    @property
    def every_actor(self) -> list[AnyHandle]:
        return self._actors.all

    def kill(self) -> None:
        """Ends all actors. Where Ray can't, they end with the driver instead."""
        if ray_listens():
            for actor in self._actors.all:
                actor.kill()


def _is_success(task: asyncio.Task[Any]) -> bool:
    """A failure of the main task may follow from the end of a watch, which is the one to report."""
    return task.done() and not task.cancelled() and task.exception() is None
