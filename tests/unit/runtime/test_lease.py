"""A rollout worker's engine is leased for an evaluation: what happens in which order, and that the checks see each order broken."""

import asyncio

import pytest
from lease_world import HELD_OUT, check_lease, play
from worker_world import settled

from dapo_async.rollout import EngineFault
from dapo_async.rollout.worker import RolloutWorker
from dapo_async.runtime.actors.replay import ReplayActor
from dapo_async.tracking.run_dir import RunDir
from dapo_async.weights import Publisher
from dapo_async.weights.publisher import HandshakeError

TRANSPORTS = pytest.mark.parametrize("transport", ["broadcast", "disk"])


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path)


async def lease_during_a_publish(world):
    """Three credits: rollout-0 has groups 0 and 1, rollout-1 has 2 and asks for more. It is leased while version 1 is on its way to rollout-0."""
    world.hosts[0].engine.finish(0)
    await settled()
    world.hosts[0].gate.clear()
    await world.step()
    lease = world.lease()
    await settled()
    world.hosts[0].gate.set()
    await settled()
    return lease


async def evaluation_scene(world) -> None:
    """An evaluation of version 1, during which versions 2 and 3 are published."""
    first, second = (host.engine for host in world.hosts)
    lease = await lease_during_a_publish(world)
    assert (second.group_ids, second.version) == (
        [2],
        1,
    )  # what it was granted goes on, under the version that was being published
    second.finish(2)
    await settled()
    assert second.group_ids == [-2, -1]
    await world.step()
    await settled()
    first.finish(1)
    await settled()
    await world.step()
    await settled()
    assert world.room._buffer.served_version == 3  # nobody waited for the leased engine
    for group_id in (-1, -2):
        second.finish(group_id)
    world.evaluation = await lease
    await settled()


def finish_all(world) -> None:
    for host in world.hosts:
        for group_id in host.engine.group_ids:
            host.engine.finish(group_id)


@TRANSPORTS
def test_a_leased_engine_measures_one_version_and_comes_back_with_the_newest(
    run_dir, transport
) -> None:
    world = play(evaluation_scene, run_dir, transport=transport)
    check_lease(world.events)
    assert world.evaluation.weight_versions == {1}
    assert world.evaluation.num_prompts == len(HELD_OUT)
    second = [event for event in world.events if event[1] == "rollout-1"]
    order = [event[:1] + event[2:] for event in second]
    assert order[:2] == [("swap", 0), ("admitted", 2, 0)]
    # What was asked for before is answered with nothing, versions 2 and 3 pass by, and the newest is swapped in before anything is admitted.
    assert order[2:] == [
        ("leased",),
        ("swap", 1),
        ("offered", 2, True),
        ("evaluate",),
        ("swap", 3),
        ("returned",),
        *order[8:],
    ]
    assert order[8:], "nothing was admitted after the lease"
    assert {event[0] for event in order[8:]} == {"admitted"}
    assert [what for what, _ in world.entered] == ["drain", "evaluate", "take back"]
    assert world.publisher.outcomes == {
        "passed": 2 * 4 - 1
    }  # every engine every version, but for version 2 on the leased one


@TRANSPORTS
def test_every_group_ends_once_and_keeps_its_staleness_through_a_lease(run_dir, transport) -> None:
    async def scene(world) -> None:
        await evaluation_scene(world)
        for _ in range(4):
            finish_all(world)
            await settled()
            await world.step()
            await settled()

    world = play(scene, run_dir, transport=transport)
    check_lease(world.events)
    counts = world.room._buffer.counts
    assert counts.flat()["evicted"] == counts.flat()["failed"] == 0
    assert counts.flat()["trained"] == 7
    assert world.room._buffer.credits_held <= 3


async def nothing(*_) -> None:
    """In place of a step that is left out."""


async def yes(*_) -> bool:
    """In place of one that claims to have been done."""
    return True


@TRANSPORTS
def test_lease_check_notices_a_room_that_goes_on_granting(
    run_dir, monkeypatch: pytest.MonkeyPatch, transport
) -> None:
    async def scene(world) -> None:
        lease = await lease_during_a_publish(
            world
        )  # the credit of group 0 goes to rollout-0, which is full then
        world.hosts[1].engine.finish(2)
        await settled()
        await world.step()  # that of group 2 goes to rollout-1, which asked for it before its engine was lent out at version 1
        await settled()
        lease.cancel()

    monkeypatch.setattr(ReplayActor, "lease", nothing)
    world = play(scene, run_dir, transport=transport)
    with pytest.raises(AssertionError, match="admitted to rollout-1 while its engine was leased"):
        check_lease(world.events)


@TRANSPORTS
def test_lease_check_notices_an_engine_that_comes_back_as_it_went(
    run_dir, monkeypatch: pytest.MonkeyPatch, transport
) -> None:
    monkeypatch.setattr(Publisher, "take_back", yes)
    world = play(evaluation_scene, run_dir, transport=transport)
    with pytest.raises(
        AssertionError, match="rollout-1, whose engine is 2 versions behind what is served"
    ):
        check_lease(world.events)


@TRANSPORTS
def test_an_engine_that_is_not_lent_measures_more_than_one_version(
    run_dir, monkeypatch: pytest.MonkeyPatch, transport
) -> None:
    monkeypatch.setattr(Publisher, "lend", nothing)
    monkeypatch.setattr(Publisher, "is_lent", lambda *_: True)
    monkeypatch.setattr(Publisher, "take_back", yes)
    assert play(evaluation_scene, run_dir, transport=transport).evaluation.weight_versions == {1, 3}


def test_lease_check_notices_an_offer_under_a_version_that_is_not_proved(
    run_dir, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(world) -> None:
        world.hosts[0].engine.finish(0)
        await settled()
        world.hosts[0].gate.clear()
        await world.step()
        await settled()
        world.hosts[0].engine.finish(1)  # between the swap and its handshake
        await settled()
        world.hosts[0].gate.set()

    check_lease(play(scene, run_dir).events)
    monkeypatch.setattr(RolloutWorker, "hold", lambda *_: None)
    with pytest.raises(
        AssertionError, match="rollout-0 offered group 1 under a version that is not proved"
    ):
        check_lease(play(scene, run_dir).events)


@TRANSPORTS
def test_an_engine_with_wrong_weights_is_reloaded_before_it_comes_back(run_dir, transport) -> None:
    async def scene(world) -> None:
        lease = await lease_during_a_publish(world)
        world.hosts[1].engine.finish(2)
        await settled()
        await world.step()
        await settled()
        world.hosts[1].attests_wrongly = 1
        for group_id in (-1, -2):
            world.hosts[1].engine.finish(group_id)
        await lease
        await settled()

    world = play(scene, run_dir, transport=transport)
    check_lease(world.events)
    last = [event for event in world.events if event[1] == "rollout-1"][-6:]
    swaps = ("swap", "rollout-1", 2)
    assert [event[:3] for event in last[:5]] == [
        swaps,
        ("quarantine", "rollout-1", True),
        swaps,
        ("quarantine", "rollout-1", False),
        ("returned", "rollout-1"),
    ]
    assert world.publisher.outcomes["mismatch"] == 1


def test_an_engine_with_wrong_weights_twice_ends_the_lease_and_is_never_admitted_anything(
    run_dir,
) -> None:
    async def scene(world) -> None:
        lease = await lease_during_a_publish(world)
        world.hosts[1].engine.finish(2)
        await settled()
        await world.step()
        await settled()
        world.hosts[1].attests_wrongly = 2
        for group_id in (-1, -2):
            world.hosts[1].engine.finish(group_id)
        with pytest.raises(HandshakeError, match="wrong weights twice"):
            await lease
        await settled()

    world = play(scene, run_dir)
    assert ("quarantine", "rollout-1", False) not in world.events
    assert "returned" not in {event[0] for event in world.events}


async def step_while_an_engine_is_taken_back(world) -> None:
    lease = await lease_during_a_publish(world)
    world.hosts[1].engine.finish(2)
    await settled()
    await world.step()
    await settled()
    world.hosts[1].gate.clear()  # its swap takes long
    for group_id in (-1, -2):
        world.hosts[1].engine.finish(group_id)
    world.hosts[0].engine.finish(1)
    await settled()
    step = asyncio.create_task(world.step())
    await settled()
    world.events.append(("swapped", "rollout-1", 2))
    world.hosts[1].gate.set()
    await asyncio.gather(step, lease)


def check_turns(events) -> None:
    """The learner keeps the snapshot that an engine is being brought to: wrong weights are reloaded from it."""
    assert events.index(("swapped", "rollout-1", 2)) < events.index(("snapshot", 3)), (
        "the snapshot was replaced while an engine was taken back to it"
    )


@TRANSPORTS
def test_the_next_snapshot_waits_until_the_engine_is_back(run_dir, transport) -> None:
    world = play(step_while_an_engine_is_taken_back, run_dir, transport=transport)
    check_turns(world.events)
    check_lease(world.events)
    assert world.hosts[1].engine.version == 3  # it takes part in the publish that waited for it


def test_turn_check_notices_a_publisher_that_does_not_wait(run_dir) -> None:
    class Everybody:
        async def acquire(self) -> None:
            pass

        def release(self) -> None:
            pass

        async def __aenter__(self):
            pass

        async def __aexit__(self, *_):
            pass

    class Hasty(Publisher):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self._turn = Everybody()

    world = play(step_while_an_engine_is_taken_back, run_dir, publisher=Hasty)
    with pytest.raises(AssertionError, match="the snapshot was replaced"):
        check_turns(world.events)


def test_an_engine_is_taken_back_only_after_the_publish_in_flight(run_dir) -> None:
    async def scene(world) -> None:
        lease = await lease_during_a_publish(world)
        world.hosts[1].engine.finish(2)
        await settled()
        world.hosts[0].gate.clear()
        await world.step()  # version 2 takes long to reach rollout-0
        for group_id in (-1, -2):
            world.hosts[1].engine.finish(group_id)
        await settled()
        assert (world.hosts[1].engine.version, lease.done()) == (1, False)
        world.hosts[0].gate.set()
        await lease
        assert world.hosts[1].engine.version == 2

    check_lease(play(scene, run_dir).events)


def test_an_engine_that_missed_nothing_comes_back_without_a_swap(run_dir) -> None:
    async def scene(world) -> None:
        lease = await lease_during_a_publish(world)
        world.hosts[1].engine.finish(2)
        await settled()
        for group_id in (-1, -2):
            world.hosts[1].engine.finish(group_id)
        await lease
        await settled()

    world = play(scene, run_dir)
    check_lease(world.events)
    assert [event[2] for event in world.events if event[:2] == ("swap", "rollout-1")] == [0, 1]


def test_a_late_engine_is_named_when_it_is_taken_back(run_dir) -> None:
    async def scene(world) -> None:
        lease = await lease_during_a_publish(world)
        world.hosts[1].engine.finish(2)
        await settled()
        await world.step()
        await settled()
        world.hosts[1].gate.clear()
        world.publisher._deadline_s = 0.1
        for group_id in (-1, -2):
            world.hosts[1].engine.finish(group_id)
        with pytest.raises(
            TimeoutError,
            match=r"taking back of rollout-1 with version 2: the learner waited 0.1 s for rollout-1",
        ):
            await lease

    play(scene, run_dir)


def test_the_last_engine_that_serves_cannot_be_lent(run_dir) -> None:
    async def scene(world) -> None:
        await world.publisher.lend(world.hosts[0])
        with pytest.raises(AssertionError, match="the last engine that serves"):
            await world.publisher.lend(world.hosts[1])

    play(scene, run_dir)


@pytest.mark.parametrize("when", ["drain", "evaluate", "take back"])
def test_engine_that_is_lost_during_a_lease_comes_back_as_any_other(run_dir, when) -> None:
    async def scene(world) -> None:
        second, engine = world.hosts[1], world.hosts[1].engine
        lease = await lease_during_a_publish(world)
        mending = asyncio.create_task(world.mend(second))
        if when == "drain":
            engine.fail(2, EngineFault("killed"))
            await settled()
        else:
            engine.finish(2)
            await settled()
            await world.step()  # version 2 passes by
            await settled()
            second.lost_over_swap = when == "take back"
            if when == "evaluate":
                engine.fail(-1, EngineFault("killed"))
            for group_id in [group_id for group_id in engine.group_ids if group_id < 0]:
                engine.finish(group_id)
        world.evaluation = await lease
        await mending
        await settled()
        for _ in range(3):
            finish_all(world)
            await settled()
            await world.step()
            await settled()

    world = play(scene, run_dir, transport="disk")
    check_lease(world.events)
    assert (world.evaluation is not None) == (when == "take back")
    assert not world.publisher.is_lent(world.hosts[1])
    returned = world.events.index(("returned", "rollout-1"))
    assert [event for event in world.events[returned:] if event[:2] == ("admitted", "rollout-1")], (
        "it was never admitted to again"
    )
    assert world.hosts[1].engine.version == world.version
    assert world.room._buffer.counts.flat()["failed"] == 0
