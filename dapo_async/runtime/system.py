"""All actors of one run, as the loop sees them: the replay room, the learner, the workers, and what watches over them."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import ray

from dapo_async.config import Config
from dapo_async.evaluate import Evaluation
from dapo_async.replay import StopReason
from dapo_async.rollout.sglang.client import SERVER_KEY
from dapo_async.runtime.actors.learner import LearnerActor
from dapo_async.runtime.actors.replay import ReplayActor
from dapo_async.runtime.actors.reports import LearnerReport, ProcessInfo, ReplayReport, WorkerReport
from dapo_async.runtime.actors.rollout import RolloutActor
from dapo_async.runtime.cluster.connect import SPREAD, home, near
from dapo_async.runtime.handles.evaluator import start_evaluator
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed, Remote
from dapo_async.runtime.handles.learner import Learner, rank_names
from dapo_async.tracking.run_dir import RunDir
from dapo_async.types import TrainBatch
from dapo_async.weights import Announcement, Attestation, Publisher

Report = ReplayReport | LearnerReport | WorkerReport
REPORT_S = 60.0  # a report is a moment's work: an actor that does not answer for so long hangs
DEATH_NEWS_S = 2.0  # within which Ray tells of a death
PATIENCE_S = 20.0  # after which a start that lasts is spoken of, again and again
START_MARGIN_S = (
    30.0  # the actor, who can say why, is the first to notice a server that does not start
)
TAKE_MARGIN_S = 10.0  # the replay actor, who can say why, is the first to notice a late batch


class Worker:
    """An engine's side of a publish, its share of an evaluation, its loss and return."""

    def __init__(self, remote: Remote, config: Config) -> None:
        self.remote, self.name, self._deadlines = remote, remote.name, config.deadlines

    async def receive(self, announcement: Announcement) -> Attestation | None:
        attestation: Attestation | None = await self.remote.call(
            "receive", announcement, deadline_s=self._deadlines.answer_s
        )
        return attestation

    async def read(self, announcement: Announcement, folder: str) -> Attestation | None:
        attestation: Attestation | None = await self.remote.call(
            "read", announcement, folder, deadline_s=self._deadlines.answer_s
        )
        return attestation

    async def quarantine(self, on: bool) -> None:
        await self.remote.call("quarantine", on, deadline_s=REPORT_S)

    async def confirm(self) -> None:
        await self.remote.call("confirm", deadline_s=REPORT_S)

    async def lost(self) -> str:
        why: str = await self.remote.call("lost", deadline_s=None)
        return why

    async def restart(self) -> None:
        await self.remote.call("restart", deadline_s=self._deadlines.start_s + START_MARGIN_S)

    async def revive(self) -> None:
        await self.remote.call("revive", deadline_s=REPORT_S)

    async def back(self) -> None:
        deadlines = self._deadlines
        await self.remote.call(
            "back", deadline_s=deadlines.start_s + START_MARGIN_S + deadlines.answer_s
        )

    async def evaluate(self, part: int, num_parts: int) -> Evaluation | None:
        evaluation: Evaluation | None = await self.remote.call(
            "evaluate", part, num_parts, deadline_s=self._deadlines.work_s
        )
        return evaluation


class Replay:
    """The replay room as the loop sees it."""

    def __init__(self, remote: Remote, config: Config) -> None:
        self.remote, self._take_s, self._save_s = (
            remote,
            config.deadlines.work_s,
            config.deadlines.work_s,
        )

    async def take(self, learner_version: int) -> TrainBatch | StopReason:
        taken: TrainBatch | StopReason = await self.remote.call(
            "take", learner_version, self._take_s, deadline_s=self._take_s + TAKE_MARGIN_S
        )
        return taken

    async def trained(self, batch: TrainBatch, *, skipped: bool, non_finite: bool) -> None:
        await self.remote.call(
            "trained",
            batch.group_ids,
            skipped=skipped,
            non_finite=non_finite,
            deadline_s=REPORT_S,
        )

    async def serve(self, version: int, release: Sequence[int] = ()) -> None:
        await self.remote.call("serve", version, release, deadline_s=REPORT_S)

    async def suspend(self, worker: str, on: bool) -> None:
        await self.remote.call("suspend", worker, on, deadline_s=REPORT_S)

    async def freeze(self, version: int) -> None:
        await self.remote.call("freeze", version, deadline_s=REPORT_S)

    async def save(self, state: Path) -> None:
        await self.remote.call("save", state, deadline_s=self._save_s)

    async def lose_worker(self, name: str) -> None:
        await self.remote.call("lose_worker", name, deadline_s=REPORT_S)

    async def close(self) -> None:
        await self.remote.call("close", deadline_s=REPORT_S)


class System:
    """One run's actors. `start` makes them; `kill` ends them."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        *,
        incarnation: str,
        say: Callable[[str], None],
        resume: Path | None = None,
    ) -> None:
        """`resume`: the `state/` folder of the checkpoint to go on from. `say`: what the person at the terminal has to know."""
        self._config, self._say, self.started = config, say, False
        self.restarts: Counter[str] = Counter()  # of lost engines, by worker
        learner, rollout = config.learner, config.rollout
        # num_cpus=0 and no restarts: the driver decides what a death means.
        names = rank_names(config)
        node = home(
            num_cpus=len(names) * learner.num_cpus, num_gpus=len(names) * config.gpus_per_rank
        )
        room = ray.remote(ReplayActor).options(
            num_cpus=0, scheduling_strategy=near(node, reserves=False)
        )
        replay = room.remote(config, incarnation=incarnation, run_dir=run_dir, resume=resume)
        near_replay = near(node, reserves=True)
        rank = ray.remote(LearnerActor).options(
            num_cpus=learner.num_cpus,
            num_gpus=config.gpus_per_rank,
            scheduling_strategy=near_replay,
        )
        self.replay = Replay(Remote("replay", replay), config)
        ranks = [
            Remote(
                name,
                rank.remote(
                    config,
                    number=number,
                    name=name,
                    incarnation=incarnation,
                    run_dir=run_dir,
                    resume=resume,
                ),
            )
            for number, name in enumerate(names)
        ]
        self.learner = Learner(ranks, config)
        worker = ray.remote(RolloutActor).options(
            num_cpus=rollout.num_cpus, num_gpus=config.gpus_per_worker, scheduling_strategy=SPREAD
        )
        place = {
            "incarnation": incarnation,
            "replay": replay,
            "logs": run_dir.engines,
            "outer_key": os.environ.get(SERVER_KEY, ""),
        }
        self.workers = [
            Worker(
                Remote(f"rollout-{number}", worker.remote(config, number=number, **place)), config
            )
            for number in range(rollout.num_workers)
        ]
        self.evaluator = (
            start_evaluator(config, incarnation=incarnation, node=node)
            if config.evaluation.during_training
            else None
        )
        self.background: set[asyncio.Task[Any]] = (
            set()
        )  # checkpoints and reports on their way, none of which the next step waits for
        self.publisher = Publisher(
            self.learner,
            self.workers,
            transport=config.weights.transport,
            tolerance=config.model.probe_tolerance,
            deadline_s=config.deadlines.answer_s,
            regroup=self._regroup,
        )

    @property
    def remotes(self) -> list[Remote]:
        evaluators = [self.evaluator.remote] if self.evaluator else []
        return [
            self.replay.remote,
            *self.learner.remotes,
            *(worker.remote for worker in self.workers),
            *evaluators,
        ]

    async def start(self) -> list[ProcessInfo]:
        """Waits until every actor is up, and says whom it waits for when that takes long."""
        start_s, began_s = self._config.deadlines.start_s, time.monotonic()
        others = [remote for remote in self.remotes if remote not in self.learner.remotes]
        up: dict[str, asyncio.Task[Any]] = {"learner": asyncio.create_task(self.learner.ready())}
        up |= {
            remote.name: asyncio.create_task(
                remote.call("ready", deadline_s=start_s + START_MARGIN_S)
            )
            for remote in others
        }
        everybody = asyncio.gather(*up.values())
        try:
            while not (await asyncio.wait([everybody], timeout=PATIENCE_S))[0]:
                slow = ", ".join(name for name, task in up.items() if not task.done())
                self._say(
                    f"still waiting for {slow} to start, {time.monotonic() - began_s:.0f} s by now (deadlines.start_s is {start_s:g})"
                )
            ranks, *infos = await everybody
        finally:
            for task in up.values():
                task.cancel()
            await asyncio.gather(*up.values(), return_exceptions=True)
        self.started = True
        return [infos[0], *ranks, *infos[1:]]

    async def _regroup(self, names: Sequence[str]) -> None:
        """Forms the weight group of the learner, its rank 0, and the workers named, each of which brings the ranks of its engine."""
        deadline_s, tp = self._config.deadlines.answer_s, self._config.rollout.tensor_parallel
        members = [worker for worker in self.workers if worker.name in names]
        size = 1 + len(members) * tp
        address = await self.learner.first.call("open_group", deadline_s=deadline_s)
        joins = [self.learner.first.call("join", size, deadline_s=deadline_s)]
        joins += [
            worker.remote.call("join", address, 1 + place * tp, size, deadline_s=deadline_s)
            for place, worker in enumerate(members)
        ]
        await asyncio.gather(*joins)

    def in_background(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Runs `work` beside the steps; its failure ends the run as any other does."""
        task = asyncio.create_task(work, name=name)
        self.background.add(task)
        return task

    async def settle(self) -> None:
        """Waits for the publish in flight and for everything in the background."""
        await self.publisher.finish()
        await asyncio.gather(*self.background)

    async def watched(self, main: Coroutine[Any, Any, Any]) -> Any:
        """Runs `main` for as long as every actor lives and every background publish goes well; the first failure ends it (law 8)."""
        task = asyncio.create_task(main, name="main")
        watches = [
            asyncio.create_task(self._watch(remote), name=remote.name) for remote in self.remotes
        ]
        if self._config.rollout.engine == "sglang":
            watches += [
                asyncio.create_task(self._mend(worker), name=worker.name) for worker in self.workers
            ]
        try:
            while not task.done():
                # What runs in the background changes from step to step: look again at least once a second.
                running = {
                    each
                    for each in (*self.background, self.publisher.in_flight)
                    if each is not None
                }
                for done in [each for each in running if each.done()]:
                    done.result()
                    self.background.discard(done)
                    running.discard(done)
                await asyncio.wait(
                    {task, *watches, *running}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED
                )
                for watch in watches:
                    if watch.done() and not task.done():
                        watch.result()
                        raise ActorDied(watch.get_name(), "ended by itself while the run went on")
            return task.result()
        except ActorFailed:
            # A broken connection is felt by its other end before Ray tells of the death behind it.
            told, _ = await asyncio.wait(watches, timeout=DEATH_NEWS_S)
            for watch in told:
                if isinstance(death := watch.exception(), ActorDied):
                    raise death from None
            raise
        finally:
            others = [task, *watches, *self.background]
            for each in others:
                each.cancel()
            # What the others raise now follows from the first failure, which is the one to tell.
            await asyncio.gather(*others, return_exceptions=True)

    async def _watch(self, remote: Remote) -> None:
        await remote.call("run" if remote.name.startswith("rollout") else "alive", deadline_s=None)

    async def _mend(self, worker: Worker) -> None:
        """Never returns: a lost engine is started anew, reads the newest weights, proves them, and only then gets credits again (laws 1, 5)."""
        while True:
            why = await worker.lost()
            self.restarts[worker.name] += 1
            count, most = self.restarts[worker.name], self._config.rollout.max_restarts
            if count > most:
                raise ActorFailed(
                    f"{worker.name} lost its engine {count} times, rollout.max_restarts is {most}; the last time: {why}"
                )
            self._say(
                f"{worker.name} lost its engine: {why}; it is started anew ({count} of {most})"
            )
            await self.replay.suspend(worker.name, True)
            self.publisher.lose(worker)
            await worker.restart()
            if await self.publisher.restore(worker):
                await self.replay.suspend(worker.name, False)
                await worker.revive()
                self._say(f"{worker.name} generates again")

    async def evaluate(self) -> Evaluation:
        """Greedy accuracy on the held-out prompts, shared among the workers. One that loses its engine does its part when it is back."""

        async def evaluate(worker: Worker, part: int) -> Evaluation:
            while (evaluation := await worker.evaluate(part, len(self.workers))) is None:
                await worker.back()
            return evaluation

        first, *others = await asyncio.gather(
            *(evaluate(worker, part) for part, worker in enumerate(self.workers))
        )
        return sum(others, start=first)

    async def reports(self, *, deadline_s: float) -> dict[str, Report | Exception]:
        """By actor: its report, or why there is none. The evaluator is not asked: on idle CPU time it may take long to answer."""
        asked = [
            remote
            for remote in self.remotes
            if self.evaluator is None or remote is not self.evaluator.remote
        ]
        answers: list[Any] = await asyncio.gather(
            *(remote.call("report", deadline_s=deadline_s) for remote in asked),
            return_exceptions=True,
        )
        return dict(zip((remote.name for remote in asked), answers, strict=True))

    def kill(self) -> None:
        for remote in self.remotes:
            remote.kill()
