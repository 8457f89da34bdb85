"""Trains the learner alone on the recorded batches of a run and compares the metrics.

In: recorded groups (`train.record`) and the rows of `metrics.jsonl`. Out: one comparison per step.
Called by `dapo-async rerun`. With one rank, on the same machine and with as many threads, the
numbers of the run repeat bit for bit. Several ranks add up in another order than the single rank
here, so their numbers are compared within `SEVERAL_RANKS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dapo_async.algorithm import summarise
from dapo_async.config import Config
from dapo_async.learner import LearnerRank
from dapo_async.model import load_decoder
from dapo_async.replay.group_io import read_groups

LAYOUT_METRICS = ("imbalance", "train_flops")  # depend on how the batch was split over the ranks
EXPERTS = "expert"  # begins the names of loads, which count shared prompts and padding
# Relative tolerance: rounding that every step amplifies. Maxima over all tokens differ most, by up
# to 0.04 in six steps of 2 × 2 ranks.
SEVERAL_RANKS = 5e-2
# Smaller numbers have the tolerance of this one. The advantages of a group add up to 0, so some
# gradients are only rounding, and AdamW scales them up.
SMALL = 1e-2


@dataclass(frozen=True, slots=True)
class StepComparison:
    """The learner's metrics of one step now, and those that differ from the run's."""

    step: int
    values: Mapping[str, float]
    # Name → (in the run, now). None: not finite, or absent.
    differing: Mapping[str, tuple[float | None, float | None]]

    @property
    def largest(self) -> float:
        """The largest relative difference; 0 if all are equal, infinite if one has no number."""
        gaps = [
            abs(old - new) / max(abs(old), abs(new), 1e-12)
            for old, new in self.differing.values()
            if old is not None and new is not None
        ]
        return math.inf if len(gaps) < len(self.differing) else max(gaps, default=0.0)


def tolerance_for(config: Config) -> float:
    """The relative difference that still counts as equal; 0 for a run of one rank."""
    return 0.0 if config.learner.num_ranks == 1 else SEVERAL_RANKS


def recorded_steps(folder: Path) -> list[int]:
    """Steps with a recorded batch, ascending.

    Raises ValueError if there is none, or if one in between is missing.
    """
    names = [path.stem for path in folder.glob("step_*.safetensors")]
    steps = sorted(int(name.removeprefix("step_")) for name in names)
    if not steps:
        raise ValueError(f"{folder} has no recorded batch; train with train.record=true")
    if steps != [*range(steps[0], steps[-1] + 1)]:
        raise ValueError(
            f"{folder} lacks recorded batches between step {steps[0]} and step {steps[-1]}, but a "
            "rerun needs every step; copy the folder whole"
        )
    return steps


def rerun(
    config: Config,
    recorded: Path,
    *,
    rows: Mapping[int, Mapping[str, Any]],
    state: Path | None = None,
) -> Iterator[StepComparison]:
    """Trains on each recorded batch in turn.

    Starts from the base model, or from `state`, a checkpoint's folder of the learner's state.
    `rows` are the rows of `metrics.jsonl` by step.
    """
    torch.set_num_threads(max(1, int(config.model.num_cpus)))
    decoder = load_decoder(Path(config.model.path), activations=getattr(torch, config.model.dtype))
    rank = LearnerRank(
        decoder,
        algorithm=config.algorithm,
        learner=config.learner,
        guards=config.train.guards,
    )
    steps = recorded_steps(recorded)
    tolerance = tolerance_for(config)
    if state is not None:
        rank.load(state)
    rank.version = steps[0]
    size = config.replay.groups_per_step // config.learner.num_minibatches
    for step in steps:
        groups = read_groups(recorded / f"step_{step:06d}.safetensors")
        values = summarise(rank.step(groups, groups_per_minibatch=size))
        yield _compare(step, values, rows.get(step, {}), tolerance)


def _compare(
    step: int, values: Mapping[str, float], row: Mapping[str, Any], tolerance: float
) -> StepComparison:
    differing = {}
    for name, value in values.items():
        now = value if math.isfinite(value) else None
        if name in LAYOUT_METRICS or name.startswith(EXPERTS):
            continue
        if name in row and _equal(row[name], now, tolerance):
            continue
        differing[name] = (row.get(name), now)
    return StepComparison(step, values, differing)


def _equal(before: float | None, now: float | None, tolerance: float) -> bool:
    if before is None or now is None:
        return before is now
    return before == now or abs(before - now) <= tolerance * max(abs(before), abs(now), SMALL)
