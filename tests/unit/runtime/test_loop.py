"""A step of several minibatches: whole, cut by a signal, by the stop rule, or by a bad loss."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.algorithm.guards import RunGuards
from dapo_async.replay import StopReason
from dapo_async.runtime.handles.handle import ActorFailed
from dapo_async.runtime.loop import Step, to_engines, train_step
from dapo_async.types import RejectReason, StepMetrics, TrainBatch
from dapo_async.utils.state_clock import StateClock

STOP = StopReason({RejectReason.ALL_WRONG: 512})


def batch(group_id: int, *, closes_step: bool = False) -> TrainBatch:
    return TrainBatch(0, (group_id,), (0,), (), evicted=(9,), closes_step=closes_step)


class Fakes:
    """Replay actor, learner and tracker; `calls` has what they were asked for, in order."""

    def __init__(
        self,
        answers: Sequence[TrainBatch | StopReason | Exception | None],
        *,
        bad: int | None = None,
        lockstep: bool = False,
    ) -> None:
        """`answers`: of the takes; None: no answer comes. `bad`: the group with a bad loss."""
        self.config = knobs.load(QUICKSTART, ["deadlines.work_s=5"])
        if lockstep:
            in_step = replace(self.config.replay, admission="lockstep")
            self.config = replace(self.config, replay=in_step)
        self.answers, self.bad, self.calls = iter(answers), bad, list[Any]()
        self.clock = StateClock("driver")
        self.replay = self.learner = self.devices = self
        self.guards = RunGuards()

    async def take(self, _: int) -> TrainBatch | StopReason:
        answer = next(self.answers)
        if answer is None:
            await asyncio.Event().wait()
        assert answer is not None
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def minibatch(self, batch: TrainBatch) -> StepMetrics:
        self.calls.append(("minibatch", *batch.group_ids))
        await asyncio.sleep(0.01)
        bad = float(self.bad in batch.group_ids)
        return StepMetrics(totals={"tokens": 1.0, "non_finite": bad, "skipped": 0.0})

    async def trained(self, step: int, group_ids: Sequence[int], **_: bool) -> None:
        self.calls.append(("trained", *group_ids))

    async def end_step(self) -> None:
        self.calls.append("end_step")

    async def cut(self, step: int) -> None:
        self.calls.append(("cut", step))

    async def log(self, step: int, metrics: StepMetrics, *, num_evicted: int) -> None:
        self.calls.append(("log", metrics.totals["tokens"], num_evicted))

    def in_background(self, work: Any, _: str) -> None:
        self.report = asyncio.ensure_future(work)

    def switching(self, to: str) -> AbstractContextManager[None]:
        self.calls.append(to)
        return nullcontext()

    async def to_learner(self) -> None:
        await asyncio.sleep(0)

    async def to_engines(self) -> None:
        await asyncio.sleep(0)

    async def step(self) -> Step:
        done = await train_step(self, self, 0, config=self.config)  # type: ignore[arg-type]
        if done.batches:
            await self.report
        return done


def trained(*group_ids: int) -> list[Any]:
    return [(what, each) for each in group_ids for what in ("minibatch", "trained")]


def test_a_step_trains_its_minibatches_one_by_one_and_is_logged_once() -> None:
    fakes = Fakes([batch(1), batch(2), batch(3, closes_step=True)])
    step = asyncio.run(fakes.step())
    assert fakes.calls == [*trained(1, 2, 3), ("log", 3.0, 3)]
    assert (step.group_ids, step.non_finite, step.stopped) == ((1, 2, 3), False, None)


CUT = ["end_step", ("cut", 0)]


def test_a_bad_loss_ends_the_step_and_the_run_goes_on() -> None:
    fakes = Fakes([batch(1), batch(2), batch(3, closes_step=True)], bad=2)
    step = asyncio.run(fakes.step())
    assert fakes.calls == [*trained(1, 2), *CUT, ("log", 2.0, 2)]
    assert (step.group_ids, step.non_finite) == ((1, 2), True)


def test_a_stop_in_the_midst_of_a_step_ends_it_with_what_was_trained() -> None:
    fakes = Fakes([batch(1), STOP])
    step = asyncio.run(fakes.step())
    assert fakes.calls == [*trained(1), *CUT, ("log", 1.0, 1)]
    assert (step.group_ids, step.stopped) == ((1,), STOP)


def test_a_stop_before_a_step_leaves_no_trace() -> None:
    fakes = Fakes([STOP])
    step = asyncio.run(fakes.step())
    assert (fakes.calls, step.group_ids, step.stopped) == ([], (), STOP)


@pytest.mark.parametrize("while_training", [True, False])
def test_a_signal_ends_the_step_after_the_minibatch_that_runs(while_training: bool) -> None:
    fakes = Fakes([batch(1), batch(2) if while_training else None, None])

    async def interrupted() -> None:
        task = asyncio.create_task(fakes.step())
        while ("minibatch", 2) not in fakes.calls if while_training else not fakes.calls[1:]:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await fakes.report

    asyncio.run(interrupted())
    number = 2 if while_training else 1
    assert fakes.calls == [*trained(*range(1, number + 1)), *CUT, ("log", number, number)]


def test_in_lockstep_a_signal_cuts_no_step() -> None:
    fakes = Fakes([batch(1), batch(2), batch(3, closes_step=True)], lockstep=True)

    async def interrupted() -> None:
        task = asyncio.create_task(fakes.step())
        while not fakes.calls:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await fakes.report

    asyncio.run(interrupted())
    assert fakes.calls == [*trained(1, 2, 3), ("log", 3.0, 3)]


def test_a_failed_take_ends_the_step_and_stays_the_reason() -> None:
    failed = ActorFailed("replay failed in take: OSError('full')")
    fakes = Fakes([batch(1), failed])
    with pytest.raises(ActorFailed, match="failed in take"):
        asyncio.run(fakes.step())
    assert fakes.calls == [*trained(1), *CUT, ("log", 1.0, 1)]

    async def gone() -> None:
        raise ActorFailed("learner is gone")

    fakes = Fakes([batch(1), failed])
    fakes.end_step = gone  # type: ignore[method-assign]
    with pytest.raises(ActorFailed, match="failed in take"):
        asyncio.run(fakes.step())


def test_a_learner_that_hangs_is_not_asked_to_end_the_step() -> None:
    fakes = Fakes([batch(1), batch(2)])

    async def late(batch: TrainBatch) -> StepMetrics:
        raise TimeoutError("the driver waited 1 s for learner to finish minibatch")

    async def scene() -> None:
        fakes.minibatch = late  # type: ignore[method-assign]
        with pytest.raises(TimeoutError, match="learner to finish minibatch"):
            await fakes.step()

    asyncio.run(scene())
    assert fakes.calls == []


def test_on_shared_devices_a_step_is_one_turn() -> None:
    fakes = Fakes([batch(1), batch(2, closes_step=True)])
    fakes.config = replace(fakes.config, model=replace(fakes.config.model, placement="shared"))

    async def scene() -> None:
        await fakes.step()
        await to_engines(fakes, fakes)  # type: ignore[arg-type]

    asyncio.run(scene())
    assert fakes.calls == [
        "to the learner",
        *trained(1, 2),
        ("log", 2.0, 2),
        "to the engines",
    ]


def test_on_shared_devices_a_stop_before_a_batch_leaves_the_engines_their_turn() -> None:
    fakes = Fakes([STOP])
    fakes.config = replace(fakes.config, model=replace(fakes.config.model, placement="shared"))
    step = asyncio.run(fakes.step())
    assert (step.stopped, fakes.calls) == (STOP, [])
