"""Where a run stands, for `dapo-async status`.

In: the files of a running or ended run, or the newest state that its driver has posted
(`runtime/beat.py`). Out: a record, and the lines of one screen. It only reads. In a copy of the
folder it can't see whether the run still goes on.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from dapo_async.config import Config, load
from dapo_async.tracking.bottleneck import PARTS, BottleneckWatch, Layout
from dapo_async.tracking.report_reading import number, read_run
from dapo_async.tracking.run_dir import RunDir
from dapo_async.tracking.verdict import duration
from dapo_async.utils.checkpoint_dir import CheckpointFolder

MOST_ENGINES = 4  # are shown one by one
STEPS_FOR_PACE = 10  # rates and the remaining time use the newest 10 steps


class RunState(StrEnum):
    """What a run does now."""

    RUNNING = "running"
    DONE = "done"  # all steps are trained, or the task is solved
    ENDED = "ended"  # with another status: failed, interrupted, out_of_time
    STUCK = "stuck"  # a process holds the run, but nothing was written for the deadline
    KILLED = "killed"  # no process holds the run, and it has no summary


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One screen's facts. None and nan: not known yet."""

    root: Path
    state: RunState
    reason: str  # of the summary
    quiet_s: float  # since the last file was written
    step: int
    num_steps: int | None
    left_s: float | None  # of training, at the pace of the newest steps
    row: Mapping[str, float]  # the newest of metrics.jsonl
    pace_s: float | None  # seconds per step
    tokens_per_s: float | None  # trained
    evaluation: Mapping[str, float]  # the newest
    checkpoint: str | None
    checkpoint_age_s: float | None
    bottleneck: str | None
    notes: tuple[str, ...]
    engines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # the newest state
    workers: Mapping[str, Any] = field(default_factory=dict)  # wanted, here, states of the others

    def to_json(self) -> dict[str, Any]:
        """All fields; null stands for nan."""
        return {name: getattr(self, name) for name in RunStatus.__slots__} | {
            "root": str(self.root),
            "row": _known(self.row),
            "evaluation": _known(self.evaluation),
            "notes": list(self.notes),
        }


def read_status(root: Path) -> RunStatus:
    """Raises ValueError for a folder that is no run directory."""
    record, run_dir = read_run(root, root.name), RunDir(root)
    rows, notes = record.rows, list(record.notes)
    config = _config(run_dir, notes)
    row: Mapping[str, float] = rows[-1] if rows else {}
    recent = rows[-STEPS_FOR_PACE:]
    paces_s = [each["step_s"] for each in recent if "step_s" in each]
    pace_s = statistics.median(paces_s) if paces_s else None
    step, num_steps = int(row.get("version", 0)), config.train.num_steps if config else None
    saved = CheckpointFolder(run_dir.checkpoints).newest
    quiet_s = _quiet_s(run_dir, saved)
    state = _state(run_dir, record.summary, quiet_s, config)
    running = state in (RunState.RUNNING, RunState.STUCK)
    left_s = None
    if running and pace_s is not None and num_steps is not None:
        left_s = max(0.0, (num_steps - step) * pace_s)
    return RunStatus(
        root=root,
        state=state,
        reason="" if running else str(record.summary.get("reason") or ""),
        quiet_s=quiet_s,
        step=step,
        num_steps=num_steps,
        left_s=left_s,
        row=row,
        pace_s=pace_s,
        tokens_per_s=sum(each.get("tokens", 0.0) for each in recent) / sum(paces_s)
        if sum(paces_s)
        else None,
        evaluation=record.evaluations[-1] if record.evaluations else {},
        checkpoint=run_dir.relative(saved) if saved else None,
        checkpoint_age_s=time.time() - saved.stat().st_mtime if saved else None,
        bottleneck=_bottleneck(rows, config),
        notes=tuple(notes),
        engines=_posted_engines(run_dir) if running else {},
        workers=_posted_facts(run_dir).get("workers", {}) if running else {},
    )


def status_of_post(facts: Mapping[str, Any]) -> RunStatus:
    """From what the driver of a run has posted. Whether the driver lives is seen by the time."""
    quiet_s = max(0.0, time.time() - facts["time_s"])
    state = RunState(facts["state"])
    if state is RunState.RUNNING and quiet_s > facts["work_s"]:
        state = RunState.STUCK
    row, recent = _numbers_of(facts["row"]), facts["recent"]
    paces_s = [each["step_s"] for each in recent]
    pace_s = statistics.median(paces_s) if paces_s else None
    step, is_over = int(row.get("version", 0)), state in (RunState.DONE, RunState.ENDED)
    left_s = None if is_over or pace_s is None else (facts["num_steps"] - step) * pace_s
    return RunStatus(
        root=Path(facts["root"]),
        state=state,
        reason=facts["reason"],
        quiet_s=quiet_s,
        step=step,
        num_steps=facts["num_steps"],
        left_s=left_s,
        row=row,
        pace_s=pace_s,
        tokens_per_s=sum(each["tokens"] for each in recent) / sum(paces_s) if paces_s else None,
        evaluation=_numbers_of(facts["evaluation"]),
        checkpoint=facts["checkpoint"],
        checkpoint_age_s=None,
        bottleneck=facts["bottleneck"],
        notes=(f"as its driver on {facts['host']} (pid {facts['pid']}) has posted it",),
        engines={} if is_over else facts["engines"],
        workers={} if is_over else facts.get("workers", {}),
    )


def newest_run(folder: Path) -> Path:
    """The run directory in `folder` that was written last. Raises ValueError if there is none."""
    marks = [*folder.glob("*/config.yaml")] if folder.is_dir() else []
    if not marks:
        raise ValueError(
            f"{folder} has no run directories; give a run directory, or the address of a cluster"
        )
    return max(
        (path.parent for path in marks),
        key=lambda root: max(file.stat().st_mtime for file in root.iterdir() if file.is_file()),
    )


def _numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: each for name, value in values.items() if not math.isnan(each := number(value))}


def _posted_engines(run_dir: RunDir) -> dict[str, dict[str, float]]:
    """The newest state of each engine; empty where it can't be read."""
    engines = _posted_facts(run_dir).get("engines")
    if not isinstance(engines, dict):
        return {}
    return {name: _numbers_of(state) for name, state in engines.items() if isinstance(state, dict)}


def lines(status: RunStatus) -> Iterator[str]:
    """One screen."""
    row = status.row
    for name, facts in (
        ("run", [str(status.root)]),
        ("state", [*_state_facts(status)]),
        ("learning", [*_learning(status)]),
        ("speed", [*_speed(status)]),
        ("idle", [*_idle(row)]),
        ("engines", [*_engines(row)]),
        ("by engine", [*_engine_facts(status.engines)]),
        ("workers", [*_worker_facts(status.workers)]),
        ("groups", [*_groups(row)]),
        ("staleness", [*_staleness(row)]),
        ("weights", [*_weights(row)]),
        ("saved", [*_saved(status)]),
        ("bottleneck", [status.bottleneck] if status.bottleneck else []),
        *(("note", [note]) for note in status.notes),
    ):
        if facts:
            yield f"{name:<10} {'   '.join(facts)}"


def _state(
    run_dir: RunDir, summary: Mapping[str, Any], quiet_s: float, config: Config | None
) -> RunState:
    if run_dir.is_locked() or _goes_on_elsewhere(run_dir):
        limit_s = (config or Config()).deadlines.work_s
        return RunState.STUCK if quiet_s > limit_s else RunState.RUNNING
    if "status" not in summary:
        return RunState.KILLED
    return RunState.DONE if summary["status"] in ("done", "solved") else RunState.ENDED


def _goes_on_elsewhere(run_dir: RunDir) -> bool:
    """Whether a driver on another machine, whose lock may not be seen here, has not ended yet."""
    facts = _posted_facts(run_dir)
    return facts.get("state") == RunState.RUNNING and facts.get("host") != os.uname().nodename


def _posted_facts(run_dir: RunDir) -> dict[str, Any]:
    """`status.json`; empty where it can't be read."""
    try:
        facts = json.loads(run_dir.status.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _quiet_s(run_dir: RunDir, saved: Path | None) -> float:
    """Seconds since the run wrote its last row, checkpoint or summary, or since its start."""
    files = (
        run_dir.config,
        run_dir.metrics,
        run_dir.evaluations,
        run_dir.status,
        run_dir.summary,
        saved,
    )
    times = [path.stat().st_mtime for path in files if path is not None and path.exists()]
    return max(0.0, time.time() - max(times)) if times else 0.0


def _config(run_dir: RunDir, notes: list[str]) -> Config | None:
    try:
        return load(str(run_dir.config))
    except ValueError as error:
        notes.append(str(error))
        return None


def _bottleneck(rows: list[dict[str, float]], config: Config | None) -> str | None:
    if config is None:
        return None
    watch = BottleneckWatch(Layout.of(config))
    for row in rows:
        watch.add(row)
    return watch.summary()


def _state_facts(status: RunStatus) -> Iterator[str]:
    of = f"/{status.num_steps}" if status.num_steps is not None else ""
    yield f"{status.state}, step {status.step}{of}"
    if status.left_s is not None:
        yield f"about {duration(status.left_s)} left"
    if status.state is RunState.KILLED:
        yield f"continue it with dapo-async train --resume {status.root}"
    yield f"last file written {duration(status.quiet_s)} ago"
    if status.reason:
        yield status.reason


def _learning(status: RunStatus) -> Iterator[str]:
    row, evaluation = status.row, status.evaluation
    yield from _numbers(
        row,
        ("accuracy", "accuracy", ".3f"),
        ("response_tokens", "length", ".1f"),
        ("entropy", "entropy", ".3f"),
    )
    if evaluation:
        yield f"held-out {evaluation['accuracy']:.3f} after step {evaluation['version']:.0f}"


def _speed(status: RunStatus) -> Iterator[str]:
    if status.pace_s is not None:
        yield f"{status.pace_s:.1f} s/step"
    row = status.row
    if "tokens_per_s.generated" in row:
        yield f"{row['tokens_per_s.generated']:,.0f} generated tokens/s"
    if status.tokens_per_s is not None:
        yield f"{status.tokens_per_s:,.0f} trained tokens/s"
    if "groups_per_s.generated" in row:
        yield (
            f"{row['groups_per_s.generated']:.2g} generated and "
            f"{row.get('groups_per_s.trained', 0.0):.2g} trained groups/s"
        )
    use = [
        f"{name} {row[key]:.0%}"
        for name, key in (("learner", "mfu.learner"), ("rollout", "mfu.rollout"))
        if key in row
    ]
    if use:
        yield f"MFU {', '.join(use)}"
    if "efficiency.rollout" in row:
        yield f"engines at {row['efficiency.rollout']:.0%} of their best rate"


def _idle(row: Mapping[str, float]) -> Iterator[str]:
    if "idle.learner" in row:
        yield f"learner {row['idle.learner']:.0%}"
    if "idle.rollout" in row:
        yield f"rollout {row['idle.rollout']:.0%}"
    if "slots.idle" in row:
        shares = {part: row.get(f"slots.{part}", 0.0) for part in PARTS}
        parts = ", ".join(
            f"{part.replace('_', ' ')} {share:.0%}"
            for part, share in shares.items()
            if share >= 0.005
        )
        yield f"engine slots {row['slots.idle']:.0%}" + (f" ({parts})" if parts else "")
    if lost := row.get("engine_restarts", 0.0):
        yield f"engines restarted {lost:.0f} times"


def _engines(row: Mapping[str, float]) -> Iterator[str]:
    yield from _numbers(
        row,
        ("slots_per_engine", "slots", ".0f"),
        ("decode.batch", "decode batch", ".1f"),
        ("kv.use", "KV memory", ".0%"),
        ("prefix.hit", "prefix hits", ".0%"),
    )
    if count := row.get("kv.retractions", 0.0):
        yield f"retracted {count:.0f} sequences"


def _engine_facts(engines: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Each engine if there are few; else the versions, the range of rates and the slowest one."""
    if len(engines) <= MOST_ENGINES:
        for name, state in engines.items():
            yield f"{name} " + ", ".join(
                _numbers(
                    state,
                    ("version", "version", ".0f"),
                    ("tokens_per_s", "tokens/s", ",.0f"),
                    ("slots", "busy slots", ".1f"),
                )
            )
        return
    versions = Counter(int(state["version"]) for state in engines.values() if "version" in state)
    served = ", ".join(f"version {each} on {count}" for each, count in versions.most_common())
    yield f"{len(engines)} engines: {served}"
    rates = {
        name: state["tokens_per_s"] for name, state in engines.items() if "tokens_per_s" in state
    }
    if rates:
        slowest = min(rates, key=lambda name: rates[name])
        yield (
            f"tokens/s {rates[slowest]:,.0f} ({slowest}) to {max(rates.values()):,.0f}, "
            f"median {statistics.median(rates.values()):,.0f}"
        )


def _worker_facts(workers: Mapping[str, Any]) -> Iterator[str]:
    """Where some rollout workers join, leave or are being replaced."""
    states = workers.get("states", {})
    if states or workers.get("here") != workers.get("wanted"):
        told = ", ".join(f"{name} {state}" for name, state in states.items())
        yield f"{workers['here']} of {workers['wanted']} rollout workers are here"
        if told:
            yield told


def _numbers(row: Mapping[str, float], *wanted: tuple[str, str, str]) -> Iterator[str]:
    """Label and number of the wanted (name, label, format) that the row has."""
    for name, label, form in wanted:
        if name in row:
            yield f"{label} {row[name]:{form}}"


def _known(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _groups(row: Mapping[str, float]) -> Iterator[str]:
    for name in ("trained", "evicted", "failed", "in_flight"):
        if (count := row.get(f"groups.{name}", 0.0)) or (row and name == "trained"):
            yield f"{name.replace('_', ' ')} {count:.0f}"
    rejected = {
        name.removeprefix("groups.rejected.").replace("_", " "): count
        for name, count in row.items()
        if name.startswith("groups.rejected.") and count
    }
    if rejected:
        counts = ", ".join(f"{count:.0f} {name}" for name, count in sorted(rejected.items()))
        yield f"rejected {counts}"
    yield from _numbers(
        row, ("buffered", "buffered", ".0f"), ("credits_held", "credits held", ".0f")
    )


def _staleness(row: Mapping[str, float]) -> Iterator[str]:
    return _numbers(
        row,
        ("staleness", "mean", ".2f"),
        ("group_staleness_max", "max", ".0f"),
        ("behaviour_ess", "effective samples", ".0%"),
    )


def _weights(row: Mapping[str, float]) -> Iterator[str]:
    for name in ("passed", "inconclusive", "mismatch"):
        if count := row.get(f"handshake.{name}", 0.0):
            yield f"handshakes {name} {count:.0f}"
    if pause_s := row.get("publish_pause_s", 0.0):
        yield f"pause of the newest publish {pause_s:.2f} s"


def _saved(status: RunStatus) -> Iterator[str]:
    if status.checkpoint is None:
        yield "no checkpoint yet"
    elif status.checkpoint_age_s is None:
        yield status.checkpoint
    else:
        yield f"{status.checkpoint}, {duration(status.checkpoint_age_s)} ago"
