"""`train --resume RUN_DIR`: the run's own config with the few knobs that may change, its newest checkpoint, and everything after that cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dapo_async import config as knobs
from dapo_async.config import Config
from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.checkpoint_dir import STATE, CheckpointFolder

# What may change when a run goes on: how much of it, where and how fast it runs. Everything else is what the run is.
SAFE = (
    "train.", "deadlines.", "ray.", "evaluation.", "weights.", "tracking.",
    "model.device", "rollout.num_workers", "rollout.num_cpus", "rollout.num_slots",
    "rollout.engine", "rollout.tensor_parallel", "rollout.servers", "rollout.server_flags", "rollout.max_restarts",
    "learner.num_cpus", "learner.tensor_parallel", "learner.data_parallel", "learner.microbatch_tokens",
    "learner.recompute", "learner.offload_optimizer", "learner.profile",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a run goes on. `checkpoint` None: it was killed before its first one and starts again from the base model."""

    checkpoint: Path | None
    version: int
    driver: dict[str, Any]  # what the driver had to remember; empty without a checkpoint

    @property
    def state(self) -> Path | None:
        return self.checkpoint / STATE if self.checkpoint else None


START = ResumePoint(None, 0, {})


def resumed_config(root: Path, overrides: Sequence[str]) -> Config:
    """The saved config with `overrides`. Raises ValueError where there is no run, or when an override would make it another run."""
    saved = RunDir(root).config
    if not saved.is_file():
        raise ValueError(
            f"--resume {root}: there is no config.yaml, so this is no run directory; give the folder that a run has printed"
        )
    before = knobs.load(saved)
    after = knobs.load(saved, overrides)
    for name, *_ in knobs.knobs():
        old, new = _value(before, name), _value(after, name)
        if old != new and not name.startswith(SAFE):
            raise ValueError(
                f"{name} can't change from {old} to {new} when a run is resumed; only {', '.join(SAFE)} may: start a new run, with model.path set "
                "to a checkpoint of this one"
            )
    return replace(after, run_dir=str(root))


def find_resume_point(config: Config, *, train_data: str | None) -> ResumePoint:
    """The newest complete checkpoint of the run directory. Raises ValueError when nothing is left to train or the data are others now.

    `train_data`: fingerprint of the training prompts (`Inputs.fingerprint`); None: not loaded, so not compared.
    """
    from dapo_async.runtime.checkpointer import read_driver_state

    run_dir = RunDir(Path(config.run_dir))
    folder = CheckpointFolder(run_dir.checkpoints)
    if folder.newest is None:
        return START
    point = ResumePoint(folder.newest, folder.versions()[-1], read_driver_state(folder.newest))
    if point.version >= config.train.num_steps:
        raise ValueError(
            f"--resume {run_dir.root}: all {config.train.num_steps} steps (train.num_steps) are trained; to go on, add train.num_steps="
            f"{2 * config.train.num_steps} or another larger number"
        )
    if train_data is not None and point.driver["train_data"] != train_data:
        raise ValueError(
            f"data.train ({config.data.train}) does not give the prompts that this run began with, which would be mixed up; restore the data and "
            f"what they are checked against, or start a new run with model.path={point.checkpoint}"
        )
    return point


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
