"""Two workers, a real replay actor's room, a real publisher; fake engines and a fake learner, so that a scene drives everything step by step.

Whatever happens is written into `events`, and `check_lease` reads from them whether the laws were kept.
"""

import asyncio
from dataclasses import replace

import numpy as np
from run_support import QUICKSTART
from worker_world import PATIENCE_S, SAMPLING, FakeEngine, settled

from dapo_async import config as knobs
from dapo_async.evaluate import evaluate
from dapo_async.reward import Verdict, score_group
from dapo_async.rollout import EngineFault
from dapo_async.rollout.worker import RolloutWorker
from dapo_async.runtime.actors.replay import ReplayActor
from dapo_async.runtime.lease import evaluate_on_lease
from dapo_async.types import Completion, FinishReason, Prompt
from dapo_async.weights import Announcement, Attestation, Manifest, Publisher

RIGHT = Verdict(True, "42", "correct")
HELD_OUT = [Prompt(row, "", np.array([1, 2], np.int32), "42") for row in range(2)]


def announce(version):
    return Announcement(
        "first", version, Manifest(()), "", np.arange(4, dtype=np.int32), np.zeros(3, np.float32)
    )


class VersionedEngine(FakeEngine):
    """Each completion has one token of the version at its start and one of that at its end."""

    version = -1

    def __init__(self, num_slots) -> None:
        super().__init__(num_slots)
        self.began = {}

    async def generate(self, request):
        self.began[request.group_id] = self.version
        return await super().generate(request)

    def finish(self, group_id) -> None:
        versions = np.array([self.began[group_id], self.version], np.int32)
        completion = Completion(
            np.array([3, 4], np.int32),
            np.zeros(2, np.float32),
            versions,
            self.began[group_id],
            FinishReason.STOP,
        )
        self._running.pop(group_id).set_result((completion,) * (1 if group_id < 0 else 2))


class Host:
    """A rollout worker with its engine, in place of its Ray actor."""

    def __init__(self, name, world) -> None:
        self.name, self.world, self.engine = name, world, VersionedEngine(num_slots=2)
        self.worker = RolloutWorker(
            name,
            self.engine,
            replay=RoomPort(world, self),
            score=self._score,
            sampling=SAMPLING,
            group_size=2,
        )
        self.proved, self.attests_wrongly, self.staged = True, 0, None
        self.lost_over_swap = False
        self.gate = asyncio.Event()  # of a swap
        self.gate.set()

    async def receive(self, announcement):
        return await self._swap(announcement)

    async def read(self, announcement, folder):
        return await self._swap(announcement)

    async def stage(self, announcement) -> None:
        self.staged = announcement

    async def swap_staged(self, announcement):
        assert self.staged is announcement, f"{self.staged} is staged, {announcement} is asked for"
        return await self._swap(announcement)

    async def _swap(self, announcement):
        self.worker.hold(True)
        self.proved = False
        self.world.events.append(("swap", self.name, announcement.version))
        await self.gate.wait()
        if self.lost_over_swap:
            self.lost_over_swap = False
            self.worker.lose("killed")
            return None
        self.engine.version = announcement.version
        attests, self.attests_wrongly = (
            announcement.version - (self.attests_wrongly > 0),
            max(0, self.attests_wrongly - 1),
        )
        return Attestation(
            self.name,
            "first",
            attests,
            announcement.probe_logprobs + 1,
            announcement.probe_logprobs,
        )

    async def quarantine(self, on) -> None:
        self.world.events.append(("quarantine", self.name, on))
        await self.worker.quarantine(on)

    async def confirm(self) -> None:
        self.proved = True
        self.worker.hold(False)

    async def lease(self, on) -> None:
        self.world.events.append(("leased" if on else "returned", self.name))
        self.worker.lease(on)

    async def drained(self) -> None:
        await self.worker.drained()

    async def evaluate(self):
        self.world.events.append(("evaluate", self.name))
        try:
            return await evaluate(
                self.engine, HELD_OUT, judge=lambda *_: 1.0, max_tokens=2, stop_token_ids=()
            )
        except EngineFault as fault:
            self.worker.lose(str(fault))
            return None

    async def _score(self, admission, completions):
        texts = [""] * len(completions)
        return score_group(
            admission,
            completions,
            texts=texts,
            verify=lambda *_: RIGHT,
            max_response_tokens=2,
            incarnation="first",
            temperature=1.0,
        )


class RoomPort:
    """What the worker sees of the replay actor; tells the events what was admitted and offered, and in which state of its engine."""

    def __init__(self, world, host) -> None:
        self._world, self._host = world, host

    async def admit(self, worker, num_groups):
        served, room = lambda: self._world.room._buffer.served_version, self._world.room
        admissions = await room.admit(worker, num_groups)
        for admission in admissions:
            self._world.events.append(
                ("admitted", worker, admission.group_id, self._host.engine.version - served())
            )
        return admissions

    async def offer(self, group) -> None:
        self._world.events.append(("offered", self._host.name, group.group_id, self._host.proved))
        await self._world.room.offer(group)

    async def fail(self, group_ids, why) -> None:
        await self._world.room.fail(group_ids, why)

    async def hand_back(self, group_id, partial_completions) -> None:
        await self._world.room.hand_back(group_id, partial_completions)

    async def doomed(self, worker):
        return await self._world.room.doomed(worker)


class World:
    """`lease` and `finish` are what a scene needs; the learner trains on whatever is finished."""

    def __init__(self, run_dir, *, transport="broadcast", publisher=Publisher) -> None:
        config = knobs.load(QUICKSTART)
        few = replace(config.data, train=config.data.heldout)
        small = replace(
            config.replay, groups_per_step=1, group_size=2, max_staleness=2, dynamic_sampling=False
        )
        self.events, self.version, self.transport, self.snapshots = [], 0, transport, []
        self.room = ReplayActor(
            replace(config, data=few, replay=small), incarnation="first", run_dir=run_dir
        )
        self.hosts = [Host("rollout-0", self), Host("rollout-1", self)]
        self.publisher = publisher(
            self, self.hosts, transport=transport, tolerance=1e-3, deadline_s=PATIENCE_S
        )
        self.entered = []

    # The learner's side of a publish.

    async def broadcast(self, announcement) -> None:
        pass

    async def write(self, announcement) -> str:
        return "folder"

    async def snapshot(self):
        self.snapshots.append(self.version)
        self.events.append(("snapshot", self.version))
        return announce(self.version)

    async def step(self) -> None:
        """Takes what is finished, trains it and starts its publish."""
        buffer = self.room._buffer
        batch = buffer.take(self.version)
        assert batch is not None, buffer.explain_wait(self.version)
        buffer.trained(batch.group_ids)
        self.version += 1
        await self.publisher.start(
            self.snapshot(),
            on_served=lambda version: self.room.serve(version, batch.group_ids),
        )

    async def mend(self, host) -> None:
        """What a run does about a lost engine."""
        await host.worker.lost()
        await self.room.lease(host.name, True)
        self.publisher.lose(host)
        host.worker.started_anew()
        assert await self.publisher.restore(host)
        await self.room.lease(host.name, False)
        host.worker.revive()

    def lease(self):
        """Starts an evaluation on the second worker's engine."""
        enter = lambda *what: self.entered.append(what)  # noqa: E731
        return asyncio.create_task(
            evaluate_on_lease(
                self.hosts[1], replay=self.room, publisher=self.publisher, enter=enter
            )
        )


def play(scene, run_dir, **world):
    """Runs `scene(world)` beside both workers, from the first publish on; returns the world."""

    async def main():
        made = World(run_dir, **world)

        async def nobody(version) -> None:
            pass

        async with asyncio.timeout(PATIENCE_S):
            await made.publisher.publish(announce(0), on_served=nobody)
            await made.room.serve(0)
            runs = [asyncio.create_task(host.worker.run()) for host in made.hosts]
            await settled()
            await scene(made)
            await settled()
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)
        made.room._buffer.check()
        return made

    return asyncio.run(main())


def check_lease(events) -> None:
    """Law 1 and law 5 of a leased engine. Raises unless every admission finds an engine as new as what is served, while it is not leased, and
    every offer finds it proved."""
    leased = set()
    for what, *about in events:
        if what == "leased":
            leased.add(about[0])
        elif what == "returned":
            leased.discard(about[0])
        elif what == "admitted":
            worker, group_id, ahead = about
            assert worker not in leased, (
                f"group {group_id} was admitted to {worker} while its engine was leased"
            )
            assert ahead >= 0, (
                f"group {group_id} was admitted to {worker}, whose engine is {-ahead} versions behind what is served"
            )
        elif what == "offered":
            worker, group_id, proved = about
            assert proved, f"{worker} offered group {group_id} under a version that is not proved"
