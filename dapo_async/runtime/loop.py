"""The main loop. Everything asynchronous happens around it: workers generate, the publisher sends
weights, evaluations and checkpoints run beside the steps."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from dapo_async.algorithm.guards import guards_in
from dapo_async.config import Config
from dapo_async.replay import StopReason
from dapo_async.runtime.checkpointer import Checkpointer
from dapo_async.runtime.evaluations import Evaluations
from dapo_async.runtime.step_metrics import Tracker
from dapo_async.runtime.system import System
from dapo_async.types import StepMetrics, TrainBatch

T = TypeVar("T")
MAX_SKIPPED_STEPS = 3  # this many steps in a row that changed no weight end the run


class TrainingStopped(RuntimeError):
    """Training can't go on; the message has the reason and what to look at."""


async def train_loop(
    system: System,
    tracker: Tracker,
    checkpointer: Checkpointer,
    evaluations: Evaluations,
    *,
    config: Config,
    first_step: int = 0,
) -> StopReason | None:
    """Trains until the last step (None), or until the stop rule ends it (its reason).

    replay ──minibatches──▶ learner ──snapshot──▶ publisher ──weights──▶ engines
      ▲                                                  │ once every engine serves them
      └──────────────────── credits of the trained groups ┘

    With model.placement=shared engines stop while the learner trains, and go on before the weights
    are sent: `alternation.py`.
    """
    publisher, clock = system.publisher, tracker.clock
    skipped_in_a_row = 0
    for step in range(first_step, config.train.num_steps):
        trained = await train_step(system, tracker, step, config=config)
        if trained.group_ids:
            clock.enter("wait for publish", f"step {step}")
            await publisher.start(
                system.learner.snapshot(),
                on_served=partial(return_credits, system, trained.group_ids),
                before=partial(to_engines, system, tracker) if config.model.is_shared else None,
            )
        if trained.stopped is not None:
            return trained.stopped
        evaluations.start_if_due(step)
        if checkpointer.is_late or (step + 1) % config.train.checkpoint_every_steps == 0:
            clock.enter("freeze", f"step {step}")
            await checkpointer.start(step + 1)
        if tracker.guards.stop_reason is not None:
            raise TrainingStopped(tracker.guards.stop_reason)
        skipped_in_a_row = skipped_in_a_row + 1 if trained.held else 0
        if skipped_in_a_row >= MAX_SKIPPED_STEPS:
            if trained.non_finite:
                raise TrainingStopped(
                    f"{skipped_in_a_row} steps in a row had a non-finite loss or gradient; "
                    "lower learner.lr, read non_finite/"
                )
            names = ", ".join(guard.value for guard in guards_in(trained.metrics.totals))
            raise TrainingStopped(
                f"{skipped_in_a_row} steps in a row had a batch that train.guards=skip has left "
                f"out ({names}); lower learner.lr or replay.max_staleness, read guarded/"
            )
    return None


@dataclass(slots=True)
class Step:
    """A step so far."""

    number: int
    batches: list[TrainBatch] = field(default_factory=list)  # its trained minibatches
    metrics: StepMetrics = field(default_factory=StepMetrics)
    in_learner: bool = False  # a minibatch is being trained or booked
    stopped: StopReason | None = None  # no batch comes any more

    @property
    def group_ids(self) -> tuple[int, ...]:
        return tuple(group_id for batch in self.batches for group_id in batch.group_ids)

    @property
    def non_finite(self) -> bool:
        return bool(self.metrics.totals.get("non_finite"))

    @property
    def held(self) -> bool:
        """Its newest minibatch has changed no weight."""
        return self.non_finite or bool(self.metrics.totals.get("held"))

    @property
    def is_whole(self) -> bool:
        return bool(self.batches) and self.batches[-1].closes_step

    @property
    def is_over(self) -> bool:
        return self.is_whole or self.held or self.stopped is not None


async def train_step(system: System, tracker: Tracker, number: int, *, config: Config) -> Step:
    """Trains on the minibatches of a step, each as soon as its groups are finished.

    A step that is cut short ends with the minibatches that were trained. That happens when the run
    ends, or after a loss that was not finite. In lockstep all groups of a step are finished before
    its first minibatch, and the end of a run does not cut it: the resumed run is the same. So it is
    on shared devices, where the engines do not generate during a step.
    """
    step, deadline_s = Step(number), config.deadlines.work_s
    try:
        while not step.is_over:
            batch = await take_minibatch(system, tracker, step)
            if batch is None:
                break
            if config.model.is_shared and not step.batches:
                with tracker.switching("to the learner"):
                    await system.to_learner()
            if config.replay.admission == "lockstep" or config.model.is_shared:
                work = train_the_rest(system, tracker, step, batch)
            else:
                work = train_minibatch(system, tracker, step, batch)
            await unbroken(work, deadline_s=deadline_s)
    except (asyncio.CancelledError, Exception) as error:
        if not step.in_learner:
            await end_after(error, system, tracker, step, deadline_s=deadline_s)
        raise
    await unbroken(end_step(system, tracker, step), deadline_s=deadline_s)
    return step


async def take_minibatch(system: System, tracker: Tracker, step: Step) -> TrainBatch | None:
    """The next minibatch of `step`; None if the run ends."""
    tracker.clock.enter("wait for batch", f"step {step.number}")
    batch = await system.replay.take(step.number)
    if isinstance(batch, StopReason):
        step.stopped = batch
        return None
    return batch


async def train_minibatch(system: System, tracker: Tracker, step: Step, batch: TrainBatch) -> None:
    """One minibatch and its bookkeeping: a checkpoint has both or neither."""
    tracker.clock.enter("wait for step", f"step {step.number}")
    step.in_learner = True
    metrics = await system.learner.minibatch(batch)
    await system.replay.trained(
        step.number,
        batch.group_ids,
        non_finite=bool(metrics.totals["non_finite"]),
        held=bool(metrics.totals.get("held")),
        guarded=bool(tracker.guards.to_keep(metrics.totals)),
    )
    step.batches.append(batch)
    step.metrics = step.metrics + metrics
    step.in_learner = False


async def train_the_rest(
    system: System, tracker: Tracker, step: Step, batch: TrainBatch | None
) -> None:
    """`batch` and the minibatches of its step that follow."""
    while batch is not None:
        await train_minibatch(system, tracker, step, batch)
        batch = None if step.is_over else await take_minibatch(system, tracker, step)


async def end_step(system: System, tracker: Tracker, step: Step) -> None:
    """Ends the step in learner and replay actor, if some minibatches are missing, and logs it."""
    if not step.batches:
        return
    if not step.is_whole:
        await system.learner.end_step()
        await system.replay.cut(step.number)
    num_evicted = sum(len(batch.evicted) for batch in step.batches)
    row = tracker.log(step.number, step.metrics, num_evicted=num_evicted)
    system.in_background(row, f"report of step {step.number}")


async def end_after(
    error: BaseException, system: System, tracker: Tracker, step: Step, *, deadline_s: float
) -> None:
    """Ends the step after `error`, which stays the one that the run reports."""
    try:
        await unbroken(end_step(system, tracker, step), deadline_s=deadline_s)
    except Exception as another:
        raise error from another


async def unbroken(work: Coroutine[None, None, T], *, deadline_s: float) -> T:
    """The result of `work`. A cancellation lets it go on to its end, for `deadline_s` at most, so
    that a trained step is counted and saved."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=deadline_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise


async def to_engines(system: System, tracker: Tracker) -> None:
    """After a step on shared devices, before its weights are sent."""
    with tracker.switching("to the engines"):
        await system.devices.to_engines()


async def return_credits(system: System, group_ids: Sequence[int], version: int) -> None:
    """Every engine serves `version`: the credits of the groups that it was trained on return."""
    await system.replay.serve(version, group_ids)
    system.served(version)
