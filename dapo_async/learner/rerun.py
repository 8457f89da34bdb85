"""The learner alone, once more on the recorded batches of a run (L3): does it come to the same numbers? Called by `dapo-async replay`.

Recorded groups (`train.record`) and the rows of `metrics.jsonl` come in; one comparison per step leaves. One rank on the same machine with as many
threads repeats a run's numbers bit for bit; several ranks add up in another order than the one here, so theirs are compared within `SEVERAL_RANKS`.
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

OF_THE_LAYOUT = ("imbalance",)  # says how a batch fell on the ranks
SEVERAL_RANKS = 1e-2  # relative: rounding, amplified by every step in between


@dataclass(frozen=True, slots=True)
class StepComparison:
    """What the learner's own metrics of one step are now, and where they differ from the row of the run."""

    step: int
    values: Mapping[str, float]
    differing: Mapping[
        str, tuple[float | None, float | None]
    ]  # name → (in the run, now); None: not finite, or not there

    @property
    def largest(self) -> float:
        """The largest relative difference; 0 when all are equal."""
        pairs = [
            (old, new)
            for old, new in self.differing.values()
            if old is not None and new is not None
        ]
        gaps = [abs(old - new) / max(abs(old), abs(new), 1e-12) for old, new in pairs]
        return math.inf if len(pairs) < len(self.differing) else max(gaps, default=0.0)


def _equal(before: float | None, now: float | None, tolerance: float) -> bool:
    if before is None or now is None:
        return before is now
    return before == now or abs(before - now) <= tolerance * max(abs(before), abs(now), 1e-3)


def tolerance_for(config: Config) -> float:
    """The relative difference that still counts as equal: none for a run of one rank."""
    return (
        0.0 if config.learner.data_parallel * config.learner.tensor_parallel == 1 else SEVERAL_RANKS
    )


def recorded_steps(folder: Path) -> list[int]:
    """Steps with a recorded batch, ascending. Raises ValueError when there is none, or one is missing in between."""
    steps = sorted(
        int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.safetensors")
    )
    if not steps:
        raise ValueError(f"{folder} has no recorded batch; train with train.record=true")
    if steps != [*range(steps[0], steps[-1] + 1)]:
        raise ValueError(
            f"{folder} lacks recorded batches between step {steps[0]} and {steps[-1]}; a replay needs every step"
        )
    return steps


def rerun(
    config: Config,
    recorded: Path,
    *,
    rows: Mapping[int, Mapping[str, Any]],
    state: Path | None = None,
) -> Iterator[StepComparison]:
    """Trains on each recorded batch in turn, from the base model or from a checkpoint's folder of the learner's state; `rows` by step."""
    torch.set_num_threads(max(1, int(config.learner.num_cpus)))
    decoder = load_decoder(Path(config.model.path), activations=getattr(torch, config.model.dtype))
    rank = LearnerRank(
        decoder, algorithm=config.algorithm, learner=config.learner, seed=config.seed
    )
    steps = recorded_steps(recorded)
    tolerance = tolerance_for(config)
    if state is not None:
        rank.load(state)
    rank.version = steps[0]
    for step in steps:
        values = summarise(rank.step(read_groups(recorded / f"step_{step:06d}.safetensors")))
        now = {
            name: value if math.isfinite(value) else None
            for name, value in values.items()
            if name not in OF_THE_LAYOUT
        }
        row = rows.get(step, {})
        differing = {
            name: (row.get(name), value)
            for name, value in now.items()
            if name not in row or not _equal(row[name], value, tolerance)
        }
        yield StepComparison(step, values, differing)
