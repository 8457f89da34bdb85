"""THE loop. Everything asynchronous happens around it: workers generate, the publisher sends, checkpoints are written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from dapo_async.config import Config
from dapo_async.replay import Verdict
from dapo_async.runtime.system import System
from dapo_async.runtime.tracker import Tracker
from dapo_async.tracking.run_dir import RunDir


class TrainingStopped(RuntimeError):
    """The run can't go on; the message says why and what to look at."""


async def train_loop(system: System, tracker: Tracker, *, config: Config, run_dir: RunDir) -> Verdict | None:
    """Trains until the last step (None) or until the filters have had enough (their verdict).

    replay ──batch──▶ learner.step ──snapshot──▶ publisher ──weights──▶ engines
      ▲                                              └──credits, once every engine serves them──▶ replay
    """
    replay, learner, publisher, clock = system.replay, system.learner, system.publisher, tracker.clock
    skipped_in_a_row = 0
    for step in range(config.train.num_steps):
        clock.enter("wait for batch", f"step {step}")
        batch = await replay.take(step)
        if isinstance(batch, Verdict):
            return batch
        clock.enter("wait for step", f"step {step}")
        metrics = await learner.step(batch)
        skipped = bool(metrics.totals["skipped"])
        await replay.trained(batch, skipped=skipped)
        clock.enter("wait for publish", f"step {step}")
        await publisher.start(learner.snapshot(), on_served=partial(release, system, batch.admission_indices))
        clock.enter("log", f"step {step}")
        if (step + 1) % config.train.checkpoint_every_steps == 0:
            system.in_background(learner.save(run_dir.checkpoints), f"checkpoint after step {step}")
        system.in_background(tracker.log(step, metrics, batch), f"report of step {step}")
        skipped_in_a_row = skipped_in_a_row + 1 if metrics.totals["non_finite"] else 0
        if skipped_in_a_row >= config.learner.max_skipped_steps:
            raise TrainingStopped(
                f"{skipped_in_a_row} steps in a row had a non-finite loss or gradient (learner.max_skipped_steps); lower learner.lr, read rollouts/"
            )
    return None


async def release(system: System, indices: Sequence[int], version: int) -> None:
    """Every engine serves `version`: the credits of the groups that made it return."""
    await system.replay.serve(version, indices)
