"""No silent death, on real processes: actors are replaced when they die or hang; when that can't
be, the run ends soon and says who.

It keeps its counts and a checkpoint, and leaves no process behind.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_actors import fake_actor
from paths import QUICKSTART
from ray.exceptions import RayActorError
from run_ends import END_S, LONG, check_end, end_after
from run_support import (
    MARKER,
    TINY,
    Live,
    check_checkpoint,
    check_conservation,
    running,
)

from dapo_async import config as knobs
from dapo_async.replay.group_io import read_groups
from dapo_async.runtime.handles.actors import LearnerHandle, ReplayHandle
from dapo_async.runtime.handles.handle import ActorDied, ActorFailed
from dapo_async.runtime.launch import Actors
from dapo_async.runtime.loop import unbroken
from dapo_async.runtime.signals import SAME_S, Interrupts
from dapo_async.runtime.system import System


@pytest.mark.ray
def test_replay_actor_and_learner_that_die_are_replaced_while_the_run_goes_on(
    tmp_path: Path,
) -> None:
    with running(tmp_path / "run", *TINY, *LONG, "train.record=true") as live:
        for victim, back in (
            ("replay", "replay goes on after"),
            ("learner", "the learner trains again after"),
        ):
            live.wait_for(r"^step +3/")
            began_s = time.monotonic()
            os.kill(live.pid(victim), signal.SIGKILL)
            live.wait_for(f"^{back}", timeout_s=60.0)
            print(f"{victim}: back after {time.monotonic() - began_s:.1f} s")
            before = [int(step) for step in re.findall(r"^step +(\d+)/", live.output, re.MULTILINE)]
            live.wait_for(rf"^step +{before[-1] + 4}/")
        os.kill(live.driver, signal.SIGINT)
        run = live.finish(timeout_s=END_S)
        live.seconds_until_nothing_is_left(timeout_s=END_S)
    check_end(run, exit_code=130, status="interrupted")
    assert [row["step"] for row in run.metrics] == [*range(len(run.metrics))]
    assert run.summary["groups"]["failed"] == 0
    assert run.summary["handshake"].get("mismatch", 0) == 0
    assert not (run.root / "journal").exists()
    trained = [
        group.group_id
        for path in (run.root / "recorded").glob("step_*.safetensors")
        for group in read_groups(path)
    ]
    assert len(set(trained)) == len(trained), "a group was trained twice"


@pytest.mark.ray
def test_worker_and_evaluator_that_die_are_replaced_while_training_goes_on(tmp_path: Path) -> None:
    two = ("rollout.num_workers=2", "evaluation.every_steps=2")
    with running(tmp_path / "run", *TINY, *LONG, *two) as live:
        live.wait_for(r"^step +3/")
        os.kill(live.pid("evaluator"), signal.SIGKILL)
        began_s = time.monotonic()
        os.kill(live.pid("rollout-1"), signal.SIGKILL)
        live.wait_for("^rollout-1 generates again", timeout_s=60.0)
        print(f"{time.monotonic() - began_s:.1f} s until it generated again")
        before = [int(step) for step in re.findall(r"^step +(\d+)/", live.output, re.MULTILINE)]
        live.wait_for(rf"^step +{before[-1] + 5}/")
        live.wait_for("^evaluator lost its process")
        os.kill(live.driver, signal.SIGINT)
        run = live.finish(timeout_s=END_S)
        live.seconds_until_nothing_is_left(timeout_s=END_S)
    check_end(run, exit_code=130, status="interrupted")
    summary = run.summary
    assert summary["groups"]["failed"] == 0, "the groups of the lost worker were given up"
    assert summary["engine_restarts"] == 1, run.output
    assert summary["token_flow"]["in_flight"] == 0, summary["token_flow"]
    assert summary["handshake"].get("mismatch", 0) == 0


@pytest.mark.ray
def test_sigterm_ends_with_143_and_a_checkpoint(tmp_path: Path) -> None:
    # To the whole group, as batch queues send it: Ray's processes get it too, and must not end
    # before the driver has saved.
    with running(tmp_path / "run", *TINY, *LONG) as live:
        run = end_after(live, lambda: os.killpg(live.driver, signal.SIGTERM))
    checkpoint = check_end(run, exit_code=143, status="interrupted")
    assert run.summary["reason"] == "SIGTERM received"
    assert checkpoint == run.root / "checkpoints" / f"step_{run.summary['steps']:06d}"
    assert "*** SIGTERM" not in run.output, run.output


@pytest.mark.ray
def test_sigint_while_ray_starts_ends_it_in_order(tmp_path: Path) -> None:
    with running(tmp_path / "run", *TINY) as live:
        live.wait_for("^run directory")
        deadline_s = time.monotonic() + 60.0
        while not any("raylet/raylet" in line for line in live.processes().values()):
            assert time.monotonic() < deadline_s, live.output
            time.sleep(0.02)
        os.killpg(live.driver, signal.SIGINT)
        run = live.finish(timeout_s=60.0)
        live.seconds_until_nothing_is_left(timeout_s=10.0)
    assert run.exit_code == 130, run.output
    assert (run.summary["status"], run.summary["reason"]) == ("interrupted", "SIGINT received")
    assert run.summary["groups"]["admitted"] == 0
    check_checkpoint(run.checkpoint)


@pytest.mark.parametrize("by_session", [False, True])
def test_search_for_processes_notices_one_that_is_left_behind(by_session: bool) -> None:
    live = object.__new__(Live)
    environment = {**os.environ, MARKER: "left-behind"}
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        env=environment,
        start_new_session=by_session,
    )
    live._mark, live._process = "" if by_session else "left-behind", sleeper
    try:
        with pytest.raises(AssertionError, match=r"there still is: .*time\.sleep"):
            live.seconds_until_nothing_is_left(timeout_s=0.5)
    finally:
        sleeper.kill()
        sleeper.wait(10)
    assert live.seconds_until_nothing_is_left(timeout_s=5.0) < 5.0


def _never(*_: object) -> None:
    raise AssertionError("nothing is replaced here")


def watched_error(*, replay_dies_after_s: float | None) -> Exception:
    """What ends a run without restarts whose learner notices a broken connection at once."""
    config = knobs.load(QUICKSTART)

    async def live() -> None:
        await asyncio.Event().wait()

    async def die() -> None:
        if replay_dies_after_s is not None:
            await asyncio.sleep(replay_dies_after_s)
            raise RayActorError
        await live()

    async def ping() -> None:
        pass

    actors = Actors(
        ReplayHandle("replay", fake_actor(alive=die, ping=ping), config.deadlines),
        [LearnerHandle("learner", fake_actor(alive=live, ping=ping), config.deadlines)],
        [],
        None,
        start_replay=_never,
        start_rank=_never,
        start_worker=_never,
        start_evaluator=_never,
        without_room=tuple,
    )

    async def main() -> None:
        raise ActorFailed("learner failed in broadcast: RuntimeError('Connection closed by peer')")

    async def watch() -> None:
        await System(config, actors, say=print).watched(main())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dapo_async.runtime.supervisor.MAX_RESTARTS", 0)
        patch.setattr("ray.kill", lambda _: None)
        with pytest.raises((ActorDied, ActorFailed)) as caught:
            asyncio.run(watch())
    return caught.value


def test_death_is_named_even_if_its_consequence_is_heard_first() -> None:
    error = watched_error(replay_dies_after_s=0.2)
    assert isinstance(error, ActorDied)
    assert error.actor == "replay"


def test_failure_without_a_death_is_told_as_it_is() -> None:
    assert str(watched_error(replay_dies_after_s=None)).startswith("learner failed in broadcast")


def received(*pauses_s: float) -> tuple[list[str], list[signal.Signals], list[signal.Signals]]:
    """What is printed, which signals are noted and which end the process at once, when SIGINT comes
    after each pause."""
    said: list[str] = []
    noted: list[signal.Signals] = []
    at_once: list[signal.Signals] = []

    async def main() -> None:
        interrupts = Interrupts(said.append, noted.append, at_once.append)
        task = asyncio.create_task(asyncio.sleep(60.0))
        interrupts.listen(task)
        for pause_s in pauses_s:
            await asyncio.sleep(pause_s)
            os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait([task], timeout=5.0)
        await asyncio.sleep(0.01)
        assert task.cancelled()

    asyncio.run(main())
    return said, noted, at_once


def test_second_signal_ends_at_once_but_not_the_echo_of_the_first() -> None:
    said, noted, at_once = received(0.0, 0.05)
    assert (len(said), noted, at_once) == (1, [signal.SIGINT], [])
    assert received(0.0, 2 * SAME_S)[2] == [signal.SIGINT]


def test_step_that_is_interrupted_is_booked_when_it_ends() -> None:
    booked = []

    async def step() -> None:
        await asyncio.sleep(0.3)
        booked.append("step")

    async def main() -> None:
        task = asyncio.create_task(unbroken(step(), deadline_s=5.0))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert booked == ["step"]


def test_conservation_check_notices_what_a_death_would_hide() -> None:
    with pytest.raises(AssertionError, match="24 groups were admitted, 20 ended"):
        check_conservation(
            {"admitted": 24, "trained": 12, "failed": 0, "unused": 8, "in_flight": 0}
        )


def test_checkpoint_check_notices_a_torn_checkpoint(tmp_path: Path) -> None:
    base = Path(knobs.load(QUICKSTART).model.path)
    for file in base.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(
            data[: len(data) // 2] if file.suffix == ".safetensors" else data
        )
    with pytest.raises(Exception, match=r"(?i)safetensors|header|incomplete|metadata"):
        check_checkpoint(tmp_path)
