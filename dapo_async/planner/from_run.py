"""A scenario from the last steps of a run: its own rates, lengths and acceptance.

In: a run directory (`config.yaml`, `metrics.jsonl`, `rollouts/`). Out: the content of a scenario
file for `read_scenario`, and what was measured, to be compared with the simulation.

The rates are those at the run's own concurrency. A split with the same slots per engine is
predicted from them; more slots would need a measurement (`dapo-async bench`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dapo_async.config import Config, load

FEWEST_STEPS = 10  # a run with fewer says too little
SHARE = 0.5  # of its steps: the last ones are measured
FEWEST_LENGTHS = 50  # below it, the lognormal distribution stands for the responses
GENERATED = "tokens_per_s.generated"
NEEDED = ("step_s", "tokens", "response_tokens", "idle.learner", "slots.idle", "offered")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run did in its last steps."""

    steps: int
    step_s: float
    staleness: float
    idle_learner: float
    generated_tokens_per_s: float


def scenario_of_run(folder: Path) -> tuple[dict[str, Any], Measured]:
    """The content of a scenario file, and what was measured.

    Raises ValueError if the folder is no run, or if the run has too few steps.
    """
    config_file = folder / "config.yaml"
    if not config_file.is_file() or not (folder / "metrics.jsonl").is_file():
        raise ValueError(
            f"{folder} is no run directory: it needs config.yaml and metrics.jsonl; give the "
            "run_dir of a run"
        )
    config = load(config_file, files=False)
    rows = _last_rows(folder / "metrics.jsonl")
    return values_of_rows(config, rows, samples=_samples(folder, rows)), measured_in(rows)


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the last steps that have every needed number."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a run that goes on
        if isinstance(row, dict) and has_step(row):
            rows.append(row)
    if len(rows) < FEWEST_STEPS:
        raise ValueError(
            f"{path} has {len(rows)} steps with rates, {FEWEST_STEPS} are needed; let the run go on"
        )
    return rows[-max(FEWEST_STEPS, round(SHARE * len(rows))) :]


def has_step(row: Mapping[str, Any]) -> bool:
    """Whether the row has all needed numbers, but for the rate of the engines."""
    return all(_is_number(row.get(name)) for name in NEEDED)


def has_rates(row: Mapping[str, Any]) -> bool:
    """Whether a scenario can be made of the row: both sides worked in its step."""
    return (
        has_step(row)
        and _is_number(row.get(GENERATED))
        and row[GENERATED] > 0
        and row["tokens"] > 0
        and row["idle.learner"] < 1
        and _occupied(row) > 0
    )


def measured_in(rows: Sequence[Mapping[str, Any]]) -> Measured:
    """What these rows say. Raises ValueError if they have no rate of generated tokens."""
    elapsed_s = sum(row["step_s"] for row in rows)
    steps = round(sum(row.get("steps", 1) for row in rows))  # a row may stand for several
    tokens = sum(row["tokens"] for row in rows)
    behind = sum((row.get("staleness") or 0.0) * row["tokens"] for row in rows)
    generated = [(row[GENERATED], row["step_s"]) for row in rows if _is_number(row.get(GENERATED))]
    if not generated:
        raise ValueError(
            "the run has no rate of generated tokens (tokens_per_s.generated); use a run of this "
            "version"
        )
    return Measured(
        steps=steps,
        step_s=elapsed_s / steps,
        staleness=behind / tokens,
        idle_learner=sum(row["idle.learner"] * row["step_s"] for row in rows) / elapsed_s,
        generated_tokens_per_s=sum(rate * seconds for rate, seconds in generated)
        / sum(seconds for _, seconds in generated),
    )


def values_of_rows(
    config: Config, rows: Sequence[Mapping[str, Any]], *, samples: Sequence[float] = ()
) -> dict[str, Any]:
    """The content of a scenario file with the rates of these rows.

    `samples`: measured response lengths; with fewer than 50 a lognormal distribution is assumed.
    """
    measured = measured_in(rows)
    rollout, replay, learner = config.rollout, config.replay, config.learner
    elapsed_s = sum(row["step_s"] for row in rows)
    shared = config.model.is_shared  # an engine sleeps while the learner has its device
    occupied = sum(_occupied(row) * row["step_s"] for row in rows) / elapsed_s
    # Of an engine; with `auto` the mean of what it had.
    slots = sum(row.get("slots_per_engine", rollout.fixed_slots) * row["step_s"] for row in rows)
    slots /= elapsed_s
    running = occupied * rollout.num_workers * slots
    offered = sum(row["offered"] for row in rows)
    accepted = sum((row.get("acceptance") or 0.0) * row["offered"] for row in rows)
    busy_s = elapsed_s * (1 - measured.idle_learner)
    pause_s = _mean_of(rows, "publish_pause_s")
    publish_s = max(pause_s, _mean_of(rows, "publish_s"))
    switch_s = sum(row.get("switch_s") or 0.0 for row in rows)
    learner_ranks = learner.num_ranks
    engine_gpus = 0 if shared else rollout.num_workers * rollout.tensor_parallel
    return {
        "engines": rollout.num_workers,
        "seed": config.seed,
        "colocated": shared,
        "engine": {
            "slots": max(1, round(slots)),
            "step_s": running / measured.generated_tokens_per_s,
            "gpus": rollout.tensor_parallel,
            "weight_update": rollout.weight_update,
        },
        "learner": {
            "token_s": busy_s / sum(row["tokens"] for row in rows),
            "gpus": learner_ranks,
            "tensor_parallel": learner.tensor_parallel,
            "context_parallel": learner.context_parallel,
            "minibatches": learner.num_minibatches,
        },
        "lengths": {
            "max": rollout.max_response_tokens,
            "mean": _mean_length(rows),
            **({"samples": list(samples)} if len(samples) >= FEWEST_LENGTHS else {}),
        },
        "replay": {
            "groups_per_step": replay.groups_per_step,
            "group_size": replay.group_size,
            "max_staleness": replay.max_staleness,
            "admission": "eager" if replay.admission == "eager" else "paced",
            "acceptance": accepted / offered if offered else 1.0,
        },
        "publish": {"seconds": publish_s, "pause_s": pause_s},
        "control": {"snapshot_s": switch_s / measured.steps if shared else 0.0},
        "plan": {"gpus": engine_gpus + learner_ranks},
    }


def _occupied(row: Mapping[str, Any]) -> float:
    """Share of the slots that ran a sequence."""
    return 1.0 - float(row["slots.idle"]) - float(row.get("slots.asleep") or 0.0)


def _mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Over the rows that have it; 0 if none has."""
    values = [float(row[name]) for row in rows if _is_number(row.get(name))]
    return fmean(values) if values else 0.0


def _mean_length(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of the trained responses."""
    tokens = sum(row["tokens"] for row in rows)
    return float(tokens / sum(row["tokens"] / row["response_tokens"] for row in rows))


def _samples(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Lengths of the written responses."""
    samples: list[float] = []
    for row in rows:
        file = folder / "rollouts" / f"step_{int(row['step']):06d}.jsonl"
        if file.is_file():
            written = map(json.loads, file.read_bytes().splitlines())
            samples += [float(each["tokens"]) for each in written if each["tokens"] > 0]
    return samples


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
