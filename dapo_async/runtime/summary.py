"""`summary.json`: what a run came to, whatever ended it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dapo_async.replay import Counts
from dapo_async.runtime.step_metrics import Totals
from dapo_async.utils.checkpoint_dir import CheckpointFolder

if TYPE_CHECKING:
    from dapo_async.runtime.run import Run


def summarise_run(run: Run, wall_s: float) -> dict[str, Any]:
    """The fixed points of `summary.json`; 0 or null for what the run never came to."""
    tracker, evaluations = run.tracker, run.evaluations
    totals = tracker.totals if tracker else Totals()
    counts = (tracker.replay.counts if tracker and tracker.replay else Counts(0)).flat()
    rejected = {
        name.removeprefix("rejected."): count
        for name, count in counts.items()
        if name.startswith("rejected.")
    }
    saved = CheckpointFolder(run.run_dir.checkpoints)
    published = run.system.publisher if run.system else None
    return {
        "status": run.ending.status.value,
        "reason": run.ending.reason,
        **{
            f"{name}_accuracy": evaluations[name].accuracy if name in evaluations else None
            for name in ("initial", "final")
        },
        **{
            f"{name}_response_tokens": evaluations[name].mean_response_tokens
            if name in evaluations
            else None
            for name in ("initial", "final")
        },
        "wall_s": run.resume.driver.get("wall_s", 0.0) + wall_s,
        "train_s": tracker.train_s if tracker else 0.0,
        **run.seconds,
        "steps": totals.steps,
        "tokens": int(totals.tokens),
        "staleness": {
            "mean": totals.staleness_sum / totals.staleness_tokens
            if totals.staleness_tokens
            else 0.0,
            "max": totals.staleness_max,
        },
        "groups": {
            name: count for name, count in counts.items() if not name.startswith("rejected.")
        }
        | {"rejected": rejected},
        "idle": tracker.idle if tracker else {"rollout": 0.0, "learner": 0.0},
        "weight_versions": published.num_served if published else 0,
        "handshake": dict(published.outcomes) if published else {},
        "checkpoint": str(saved.newest or run.config.model.path),
        "best_checkpoint": str(saved.path(best))
        if (best := run.run_dir.best_version(saved.versions())) is not None
        else None,
        "evaluations_skipped": run.held_out.num_skipped if run.held_out else 0,
        "checkpoints": run.checkpointer.summary() if run.checkpointer else {},
        "resumed_from": str(run.resume.checkpoint) if run.resume.checkpoint else None,
        "seconds_by_state": {
            actor: tracker.timeline.totals(actor) for actor in tracker.timeline.spans
        }
        if tracker
        else {},
        "mlflow_run_id": run.sinks.mlflow_run_id,
        "engine_restarts": sum(run.system.restarts.values()) if run.system else 0,
        "caught": dict(run.caught + run.sinks.caught),
        "failures": dict(tracker.replay.failures) if tracker and tracker.replay else {},
        "seed": run.config.seed,
        "incarnation": run.incarnation,
        "run_dir": str(run.run_dir.root),
    }
