"""The orderly end of a run: last checkpoint, reports, timeline, then the end of every actor."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from dapo_async.config import STOP_S, Config
from dapo_async.runtime.services import Services
from dapo_async.runtime.status import RunOutcome, Status

UNFINISHED = (Status.FAILED, Status.INTERRUPTED, Status.OUT_OF_TIME)
REPORT_SHARE = 0.8  # of STOP_S, so that a late actor is named before the time is up
LAST_ROWS_S = 1.0


class Attempt(Protocol):
    """Awaits one part of the end; a failure is counted and printed, and the end goes on."""

    async def __call__(
        self, what: str, awaitable: Awaitable[object], *, within_s: float = STOP_S
    ) -> None: ...


async def shut_down(
    services: Services,
    outcome: RunOutcome,
    *,
    config: Config,
    attempt: Attempt,
    write_timeline: Callable[[], Awaitable[None]],
) -> None:
    """Saves and collects what can still be had, then kills the actors."""
    if not outcome.lost_node:
        await _collect(services, outcome, config=config, attempt=attempt)
    await attempt("the timeline", write_timeline())
    services.system.kill()
    services.evaluations.clear()
    copy_s = max(STOP_S, config.deadlines.work_s)
    copies = services.checkpointer.finish_copies(deadline_s=copy_s)
    await attempt("a copy of the newest checkpoint", copies, within_s=copy_s + STOP_S)


async def _collect(
    services: Services, outcome: RunOutcome, *, config: Config, attempt: Attempt
) -> None:
    """What only the actors have."""
    system, tracker, report_s = services.system, services.tracker, REPORT_SHARE * STOP_S
    if outcome.status in UNFINISHED and system.started:  # before that nothing is new
        await attempt("the last rows of metrics", tracker.flush(deadline_s=LAST_ROWS_S))
        await _save(services, outcome, config=config, attempt=attempt)
    await attempt("the last counts", system.replay.close())
    if system.started:
        await attempt("the last reports", tracker.collect(deadline_s=report_s))
    if outcome.lost_actor != "evaluator":
        await attempt(
            "the evaluator's spans",
            services.evaluations.collect(tracker.timeline, deadline_s=report_s),
        )


async def _save(
    services: Services, outcome: RunOutcome, *, config: Config, attempt: Attempt
) -> None:
    """A checkpoint of the newest step, so that only what was generated since is lost.

    Without learner or replay actor, and with ranks that wait for one that has failed, the newest
    periodic checkpoint has to do. Where nothing is known
    to hang it may take as long as any other checkpoint; a second signal ends the process sooner.
    After a passed deadline it may take a little longer than the longest one of the run.
    """
    lost = outcome.lost_actor or ""
    if lost == "replay" or lost.startswith("learner") or services.system.learner.is_stuck:
        return
    save_s = max(STOP_S, config.deadlines.work_s)
    if outcome.hangs:
        save_s = STOP_S + 2 * services.checkpointer.longest_write_s
    await attempt(
        "a last checkpoint", services.checkpointer.save(deadline_s=save_s), within_s=save_s
    )
