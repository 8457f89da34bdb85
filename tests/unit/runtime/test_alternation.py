"""Who has the shared devices: switches, restarts in each turn, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.runtime.alternation import OwnDevices, SharedDevices
from dapo_async.runtime.turns import Turn

CONFIG = knobs.load(QUICKSTART, ["model.placement=shared"])


class World:
    """An engine and a learner with device memory, and a log; both at once is a failure."""

    def __init__(self, *, limit_s: float = 5.0) -> None:
        self.log: list[str] = []
        self.busy = {"rollout-0"}
        self.dead: set[str] = set()
        self.learner_is_back = asyncio.Event()
        self.learner_is_back.set()
        deadlines = replace(CONFIG.deadlines, start_s=limit_s, answer_s=limit_s, work_s=limit_s)
        self.devices = SharedDevices(
            replace(CONFIG, deadlines=deadlines),
            learner=self.side("learner"),
            workers=[self.side("rollout-0")],
            ranks=["learner"],
        )

    def side(self, name: str) -> Any:
        world = self

        class Side:
            """Does what an actor does with its memory."""

            def __init__(self) -> None:
                self.name = name

            async def sleep(self) -> None:
                await asyncio.sleep(0.01)
                world.log.append(f"{name} sleeps")
                world.busy.discard(name)

            async def wake(self) -> None:
                if name == "learner":
                    await world.learner_is_back.wait()
                if name not in world.dead:
                    world.take(name)
                    world.log.append(f"{name} wakes")

        return Side()

    def take(self, name: str) -> None:
        assert self.busy <= {name}, f"{name} and {self.busy} hold memory of one device"
        self.busy = {name}

    async def step(self) -> None:
        await self.devices.to_learner()
        assert self.busy == {"learner"}
        self.log.append("step")
        await self.devices.to_engines()
        assert self.busy == {"rollout-0"} - self.dead


def play(scene: Callable[[World], Coroutine[Any, Any, None]], **options: float) -> list[str]:
    async def run() -> list[str]:
        world = World(**options)
        await asyncio.wait_for(scene(world), 20)
        return world.log

    return asyncio.run(run())


TO_LEARNER, TO_ENGINES = (
    ["rollout-0 sleeps", "learner wakes"],
    ["learner sleeps", "rollout-0 wakes"],
)


def test_steps_alternate_and_the_engines_have_the_first_and_the_last_turn() -> None:
    async def scene(world: World) -> None:
        await world.step()
        await world.step()
        assert world.devices.turns.turn is Turn.ENGINES

    assert play(scene) == 2 * [*TO_LEARNER, "step", *TO_ENGINES]


def test_an_engine_that_dies_while_the_learner_trains_starts_in_its_own_turn() -> None:
    async def scene(world: World) -> None:
        await world.devices.to_learner()
        world.dead.add("rollout-0")

        async def replace_it() -> None:
            async with world.devices.engine_starts("rollout-0"):
                world.take("rollout-0")
                world.log.append("rollout-0 starts")

        replacing = asyncio.create_task(replace_it())
        await asyncio.sleep(0.05)
        world.log.append("step")
        await world.devices.to_engines()
        await replacing

    log = play(scene)
    assert log == [*TO_LEARNER, "step", "learner sleeps", "rollout-0 starts"]


def test_the_learner_waits_for_an_engine_that_starts_and_takes_weights() -> None:
    async def scene(world: World) -> None:
        async def replace_it() -> None:
            async with world.devices.engine_starts("rollout-0"):
                await asyncio.sleep(0.05)
                world.log.append("rollout-0 starts")
            async with world.devices.engine_returns("rollout-0"):
                await asyncio.sleep(0.05)
                world.log.append("rollout-0 is proved")

        replacing = asyncio.create_task(replace_it())
        await asyncio.sleep(0.01)
        await world.step()
        await replacing

    assert play(scene) == [
        "rollout-0 starts",
        "rollout-0 is proved",
        *TO_LEARNER,
        "step",
        *TO_ENGINES,
    ]


def test_a_learner_that_dies_in_a_turn_of_the_engines_borrows_their_devices() -> None:
    """A publish may wait for the learner: its restart can't wait for the next batch."""

    async def scene(world: World) -> None:
        world.learner_is_back.clear()
        async with world.devices.learner_restarts():
            world.take("learner")
            world.log.append("learner restarts")
        world.learner_is_back.set()
        assert world.devices.turns.turn is Turn.ENGINES
        await world.step()

    assert play(scene) == [
        "rollout-0 sleeps",
        "learner restarts",
        *TO_ENGINES,
        *TO_LEARNER,
        "step",
        *TO_ENGINES,
    ]


def test_a_learner_that_dies_in_its_own_turn_keeps_the_devices() -> None:
    async def scene(world: World) -> None:
        await world.devices.to_learner()
        async with world.devices.learner_restarts():
            world.log.append("learner restarts")
        await world.devices.to_engines()

    assert play(scene) == [*TO_LEARNER, "learner restarts", *TO_ENGINES]


def test_a_restart_that_fails_keeps_the_lent_devices_for_the_next_one() -> None:
    async def scene(world: World) -> None:
        world.learner_is_back.clear()
        with pytest.raises(RuntimeError, match="again"):
            async with world.devices.learner_restarts():
                raise RuntimeError("lost again")
        waking = asyncio.create_task(world.devices.to_learner())  # the step takes the turn over
        await asyncio.sleep(0.02)
        assert not waking.done()
        async with world.devices.learner_restarts():
            world.take("learner")
            world.log.append("learner restarts")
        world.learner_is_back.set()
        await waking
        assert world.devices.turns.turn is Turn.LEARNER
        await world.devices.to_engines()

    assert play(scene) == ["rollout-0 sleeps", "learner restarts", "learner wakes", *TO_ENGINES]


def test_a_wait_for_the_devices_ends_with_who_waits_for_whom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dapo_async.runtime.alternation.MARGIN_S", 0.0)

    async def scene(world: World) -> None:
        async with world.devices.engine_returns("rollout-0"):
            with pytest.raises(TimeoutError) as late:
                await world.devices.to_learner()
        assert str(late.value) == (
            "the learner waited 0.2 s for the shared devices: the return of rollout-0 has not ended"
        )
        async with world.devices.engine_starts("rollout-0"):
            with pytest.raises(TimeoutError) as late:
                await world.devices.to_learner()
        assert "the learner waited 0.2 s for the shared devices: the start of rollout-0 has" in str(
            late.value
        )
        await world.devices.to_learner()
        with pytest.raises(TimeoutError) as late:
            async with world.devices.engine_starts("rollout-0"):
                pass
        assert str(late.value) == (
            "rollout-0 waited 0.4 s for the shared devices: the learner's step has not ended"
        )

    play(scene, limit_s=0.1)


def test_with_devices_of_their_own_nobody_waits() -> None:
    async def scene() -> None:
        devices = OwnDevices()
        await devices.to_learner()
        await devices.to_engines()
        async with devices.engine_starts("rollout-0"), devices.engine_returns("rollout-0"):
            pass
        async with devices.learner_restarts():
            pass

    asyncio.run(scene())
