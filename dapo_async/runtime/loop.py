"""The main loop. Everything asynchronous happens around it: workers generate, the publisher sends
weights, evaluations and checkpoints run beside the steps."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import TypeVar

from dapo_async.config import Config
from dapo_async.replay import StopReason
from dapo_async.runtime.checkpointer import Checkpointer
from dapo_async.runtime.evaluations import Evaluations
from dapo_async.runtime.step_metrics import Tracker
from dapo_async.runtime.system import System
from dapo_async.types import StepMetrics, TrainBatch

T = TypeVar("T")
MAX_SKIPPED_STEPS = 3  # this many non-finite steps in a row end the run


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

    replay ──batch──▶ learner.step ──snapshot──▶ publisher ──weights──▶ engines
      ▲                                                 │ once every engine serves them
      └─────────────────── credits of the trained groups ┘
    """
    replay, learner, publisher = system.replay, system.learner, system.publisher
    clock = tracker.clock
    skipped_in_a_row = 0
    for step in range(first_step, config.train.num_steps):
        clock.enter("wait for batch", f"step {step}")
        batch = await replay.take(step)
        if isinstance(batch, StopReason):
            return batch
        clock.enter("wait for step", f"step {step}")
        metrics = await unbroken(
            train_step(system, tracker, step, batch), deadline_s=config.deadlines.work_s
        )
        clock.enter("wait for publish", f"step {step}")
        await publisher.start(
            learner.snapshot(), on_served=partial(return_credits, system, batch.group_ids)
        )
        evaluations.start_if_due(step)
        if (step + 1) % config.train.checkpoint_every_steps == 0:
            clock.enter("freeze", f"step {step}")
            await checkpointer.start(step + 1)
        skipped_in_a_row = skipped_in_a_row + 1 if metrics.totals["non_finite"] else 0
        if skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise TrainingStopped(
                f"{skipped_in_a_row} steps in a row had a non-finite loss or gradient; "
                "lower learner.lr, read non_finite/"
            )
    return None


async def train_step(system: System, tracker: Tracker, step: int, batch: TrainBatch) -> StepMetrics:
    """One step of the learner and its bookkeeping: a checkpoint has both or neither."""
    metrics = await system.learner.step(batch)
    await system.replay.trained(
        batch.group_ids,
        skipped=bool(metrics.totals["skipped"]),
        non_finite=bool(metrics.totals["non_finite"]),
    )
    system.in_background(tracker.log(step, metrics, batch), f"report of step {step}")
    return metrics


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


async def return_credits(system: System, group_ids: Sequence[int], version: int) -> None:
    """Every engine serves `version`: the credits of the groups that it was trained on return."""
    await system.replay.serve(version, group_ids)
