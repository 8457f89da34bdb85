"""`summary.json`: what a run came to, whatever ended it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dapo_async.config import Config
from dapo_async.evaluate import Evaluation
from dapo_async.runtime.resume import ResumePoint
from dapo_async.runtime.services import Measured
from dapo_async.runtime.slot_advice import slot_advice
from dapo_async.runtime.status import RunOutcome
from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.checkpoint_dir import CheckpointFolder


@dataclass(slots=True)
class RunProgress:
    """What a run has come to so far, besides what its services count."""

    outcome: RunOutcome = field(default_factory=RunOutcome)
    seconds: dict[str, float] = field(default_factory=dict)  # start_s, initial_evaluation_s, …
    evaluations: dict[str, Evaluation] = field(default_factory=dict)  # initial, final
    caught: Counter[str] = field(default_factory=Counter)  # errors that did not end the run


def summarise_run(
    record: RunProgress,
    measured: Measured,
    *,
    config: Config,
    run_dir: RunDir,
    incarnation: str,
    resume: ResumePoint,
    wall_s: float,
    mlflow_run_id: str | None,
    caught: Counter[str],
    bottleneck: str | None,
    faults: Sequence[str] = (),
    split: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of `summary.json`; 0 or null for what the run never came to.

    `wall_s`: of all incarnations. `caught`: errors that the sinks caught. `bottleneck`: one
    sentence on what limited the speed. `split`: what the planner says, see `next_split.compared`.
    """
    saved = CheckpointFolder(run_dir.checkpoints)
    best = run_dir.best_version(saved.versions())
    totals = measured.totals
    staleness = totals.staleness_sum / totals.staleness_tokens if totals.staleness_tokens else 0.0
    return {
        "status": record.outcome.status.value,
        "reason": record.outcome.reason,
        **_evaluated(record.evaluations),
        "wall_s": wall_s,
        "train_s": measured.train_s,
        **record.seconds,
        "steps": totals.steps,
        "tokens": int(totals.tokens),
        "staleness": {"mean": staleness, "max": totals.staleness_max},
        "groups": _groups(measured.counts),
        "token_flow": dict(measured.token_flow),
        **{name: dict(rates) for name, rates in measured.rates.items()},
        "idle": dict(measured.idle),
        **measured.use,
        **measured.slots,
        **measured.engine_state,
        "engines": dict(measured.engines),
        "bottleneck": bottleneck,
        "faults": list(faults),
        "split": split,
        "slot_advice": slot_advice(config),
        "weight_versions": measured.weight_versions,
        "handshake": dict(measured.handshake),
        "checkpoint": run_dir.relative(saved.newest or Path(config.model.path)),
        "best_checkpoint": run_dir.relative(saved.path(best)) if best is not None else None,
        "evaluations_skipped": measured.evaluations_skipped,
        "checkpoints": dict(measured.checkpoints),
        "resumed_from": run_dir.relative(resume.checkpoint) if resume.checkpoint else None,
        "seconds_by_state": dict(measured.seconds_by_state),
        "mlflow_run_id": mlflow_run_id,
        "restartable": record.outcome.restartable,
        "engine_restarts": measured.engine_restarts,
        "rollout_workers": dict(measured.workers),
        "caught": dict(record.caught + caught),
        "failures": dict(measured.failures),
        "quarantined": measured.quarantined,
        "guards": dict(measured.guards),
        "seed": config.seed,
        "incarnation": incarnation,
    }


def _evaluated(evaluations: Mapping[str, Evaluation]) -> dict[str, float | None]:
    initial, final = evaluations.get("initial"), evaluations.get("final")
    return {
        "initial_accuracy": initial.accuracy if initial else None,
        "final_accuracy": final.accuracy if final else None,
        "initial_response_tokens": initial.mean_response_tokens if initial else None,
        "final_response_tokens": final.mean_response_tokens if final else None,
    }


def _groups(counts: Mapping[str, int]) -> dict[str, Any]:
    """Flat counts such as `rejected.all_wrong`, with the rejections in a table of their own."""
    prefix = "rejected."
    groups: dict[str, Any] = {
        name: count for name, count in counts.items() if not name.startswith(prefix)
    }
    groups["rejected"] = {
        name.removeprefix(prefix): count
        for name, count in counts.items()
        if name.startswith(prefix)
    }
    return groups
