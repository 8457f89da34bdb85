"""`train --resume RUN_DIR` and `train.resume=auto`: where a run continues, and with which config.

The run's own config comes in, with the few knobs that may change; a `ResumePoint` leaves. Called by
the command line, before anything is started.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dapo_async import config as knobs
from dapo_async.config import Config, parse_source
from dapo_async.config.validate import check
from dapo_async.model import special_tokens
from dapo_async.model.positions import KEY as POSITIONS
from dapo_async.replay import Counts
from dapo_async.replay.state_io import read_outcomes
from dapo_async.runtime.scale_desk import asked_for
from dapo_async.runtime.status import Status
from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.checkpoint_dir import LEARNER_FOLDER, STATE, CheckpointFolder
from dapo_async.utils.manifest import damage
from dapo_async.utils.paths import for_shell

# What may change when a run is resumed: its length, its place, its speed, and where its files lie.
# Everything else would make it another run.
SAFE = (
    "train.", "deadlines.", "ray.", "evaluation.", "weights.", "tracking.",
    "data.train", "data.heldout", "data.contamination", "model.path", "model.device",
    "model.num_cpus", "rollout.num_workers", "rollout.num_slots", "rollout.engine",
    "rollout.tensor_parallel", "rollout.servers", "rollout.server_flags",
    "learner.tensor_parallel", "learner.context_parallel", "learner.data_parallel",
    "learner.microbatch_tokens", "learner.recompute", "learner.zero_stage", "learner.reduce_dtype",
    "learner.kernels",
    "learner.offload_optimizer", "learner.profile", "learner.node_resource",
    "rollout.node_resource", "network.",
)  # fmt: skip
DRIVER_FILE = "driver.json"
BEST = "best"  # --from best


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a run continues. Without a checkpoint it starts again from the base model."""

    checkpoint: Path | None
    version: int
    driver: dict[str, Any]  # the driver's state; empty without a checkpoint
    counts: Counts = field(default_factory=lambda: Counts(0))  # of all groups up to there
    failures: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # lines about the choice of this checkpoint
    # Newer copies on the mirror that are removed when the run begins: the user has rolled back, or
    # they are damaged.
    withdrawn: tuple[int, ...] = ()

    @property
    def state(self) -> Path | None:
        return self.checkpoint / STATE if self.checkpoint else None


START = ResumePoint(None, 0, {})


def saved_config(root: Path) -> Path:
    """The config file of the run in `root`. Raises ValueError where there is no run."""
    saved = RunDir(root).config
    if not saved.is_file():
        raise ValueError(
            f"--resume {root}: there is no config.yaml, so this is no run directory; "
            "give the folder that a run has printed"
        )
    return saved


def resumed_config(
    root: Path, overrides: Sequence[str], *, checkpoint: Path | None = None
) -> Config:
    """The saved config of the run in `root`, wherever that folder is now, with `overrides`.

    `checkpoint`: the one to resume from; None: the newest. Raises ValueError where there is no run,
    and for an override that would make it another run.
    """
    saved = saved_config(root)
    before = knobs.load(saved, files=False)
    after = knobs.load(saved, overrides, files=False)
    return _same_run(before, after, root, checkpoint)


def continued_config(root: Path, given: Config, *, checkpoint: Path | None) -> Config:
    """The config `given` at a start with `train.resume=auto`, for the run that is in `root`.

    Until the first checkpoint nothing is trained, so every knob may differ. The number of workers
    is the one that `dapo-async scale` has asked for last. Raises ValueError for a knob that would
    make it another run, and for files that do not exist.
    """
    given = asked_for(root, given)
    if checkpoint is None:
        check(given)
        return replace(given, run_dir=str(root))
    before = knobs.load(saved_config(root), files=False)
    same = replace(given, run_dir=before.run_dir)
    ours, saved = parse_source(given.model.path), parse_source(before.model.path)
    if ours.hub is not None and ours == replace(saved, revision=None):
        # The run has saved the exact revision.
        same = replace(same, model=replace(same.model, path=before.model.path))
    return _same_run(before, same, root, checkpoint)


def complete_line(root: Path, config: Config, point: ResumePoint) -> str | None:
    """One line where nothing is left to train in `root`, else None."""
    summary = RunDir(root).summary
    ended = json.loads(summary.read_text()) if summary.is_file() else {}
    if point.version > 0 and point.version >= config.train.num_steps:
        why = f"all {config.train.num_steps} steps (train.num_steps) are trained"
    elif ended.get("status") == Status.SOLVED and ended.get("steps") == point.version:
        why = str(ended["reason"])
    else:
        return None
    return f"the run in {root} is complete: {why}"


def changed_knobs(before: Config, after: Config) -> Iterator[tuple[str, Any, Any]]:
    """Knobs that make `after` another run, with both values."""
    for name in [knob.name for knob in knobs.knobs()]:
        old, new = _value(before, name), _value(after, name)
        if old != new and not name.startswith(SAFE):
            yield name, old, new


def _same_run(before: Config, after: Config, root: Path, checkpoint: Path | None) -> Config:
    """`after`, if it continues the run that has the config `before`."""
    for name, old, new in changed_knobs(before, after):
        raise ValueError(
            f"{name} can't change from {old} to {new} when a run is resumed; "
            f"only {', '.join(SAFE)} may change; start a new run from a checkpoint "
            "of this run instead (model.path=CHECKPOINT)"
        )
    checkpoint = checkpoint or CheckpointFolder(RunDir(root).checkpoints).newest
    if after.model.path != before.model.path:
        _check_same_model(after.model.path, checkpoint, after.model.max_positions)
    check(with_model_at_hand(after, checkpoint))
    return replace(after, run_dir=str(root))


def _check_same_model(path: str, checkpoint: Path | None, max_positions: int | None) -> None:
    """A resumed run may find its base model in another folder, but it must be the same model."""
    if checkpoint is None:
        raise ValueError(
            f"model.path can't change to {path} when a run without a checkpoint is resumed, "
            "because the run has no copy to compare it with; start a new run"
        )
    if parse_source(path).hub is not None:
        raise ValueError(f"model.path ({path}) must be a folder when a run is resumed")
    for ours in sorted(checkpoint.iterdir()):
        # Not compared: the state, the weights, and stop tokens, which an export brings together.
        if ours.is_dir() or ours.name.startswith("model") or ours.name == "generation_config.json":
            continue
        theirs = Path(path) / ours.name
        if _content(ours, max_positions) != _content(theirs, max_positions):
            raise ValueError(
                f"model.path can't change to {path} when a run is resumed: {theirs} differs from "
                f"{ours}; give the folder where the same model is now, or leave it out"
            )
    if set(special_tokens(Path(path)).stop) != set(special_tokens(checkpoint).stop):
        raise ValueError(
            f"model.path can't change to {path} when a run is resumed: its stop tokens differ from "
            f"those of {checkpoint}; give the folder where the same model is now, or leave it out"
        )


def _content(path: Path, max_positions: int | None) -> Any:
    """For comparison: exports rewrite the dtype of config.json, and `model.max_positions`."""
    if not path.is_file():
        return None
    if path.name != "config.json":
        return path.read_bytes()
    config = json.loads(path.read_text())
    rewritten = {"dtype", "torch_dtype", *([] if max_positions is None else [POSITIONS])}
    return {key: value for key, value in config.items() if key not in rewritten}


def with_model_at_hand(config: Config, checkpoint: Path | None) -> Config:
    """`config`, with `checkpoint` as its model when the folder of the base model is gone.

    A checkpoint is a whole model: after a move only the weights of the base model are missing, and
    a resumed run reads those of the checkpoint anyway.
    """
    source = parse_source(config.model.path)
    if checkpoint is None or source.hub is not None or Path(config.model.path).exists():
        return config
    return config.with_model(str(checkpoint))


def choose_checkpoint(root: Path, *, at: str | None = None) -> ResumePoint:
    """The newest checkpoint of the run in `root` whose files are whole; START before the first.

    A damaged one is stepped over, with a note. `at`: the checkpoint that the user has named, such
    as step_000120 or 120; `best` is the one with the best evaluation. Raises ValueError if it is
    not there, or if no checkpoint is whole.
    """
    run_dir = RunDir(root)
    folder = CheckpointFolder(run_dir.checkpoints)
    if at == BEST:
        best = run_dir.best_version(folder.versions())
        if best is None:
            raise ValueError(
                f"--from {BEST}: no checkpoint in {folder.root} was evaluated "
                "(evaluation.every_steps); name one of them"
            )
        at = folder.path(best).name
    notes: list[str] = []
    first_error: ValueError | None = None
    for version in _candidates(folder, at):
        try:
            point = _read_point(folder, version)
        except ValueError as error:
            first_error = first_error or error
            why = str(error).partition(";")[0]
            notes.append(f"{folder.path(version).name} is damaged, so it is not used: {why}")
            continue
        return replace(point, notes=(*notes, *point.notes))
    if first_error is not None:
        raise first_error
    return START


def _candidates(folder: CheckpointFolder, at: str | None) -> list[int]:
    """The versions to try, the best first."""
    versions = folder.versions()
    if at is None:
        return versions[::-1]
    number = at.rstrip("/").rpartition("/")[2].removeprefix("step_")
    if not number.isdecimal() or int(number) not in versions:
        there = ", ".join(folder.path(version).name for version in versions) or "none yet"
        raise ValueError(
            f"--from {at} is no checkpoint in {folder.root}; give one of those there: {there}"
        )
    return [int(number)]


def find_resume_point(
    config: Config,
    *,
    train_data: str | None,
    heldout_data: str | None = None,
    point: ResumePoint | None = None,
) -> ResumePoint:
    """`point`, or what `choose_checkpoint` finds, after a check that the run may continue there.

    `train_data`, `heldout_data`: fingerprints of the prompts (`Inputs`); None: not compared, for
    they are not loaded. Raises ValueError when no step is left, when the data differ, and for
    a checkpoint that can't be read.
    """
    run_dir = RunDir(Path(config.run_dir))
    point = point or choose_checkpoint(run_dir.root)
    if point.checkpoint is None:
        return point
    newest = for_shell(point.checkpoint)
    if point.version >= config.train.num_steps:
        raise ValueError(
            f"--resume {run_dir.root}: all {config.train.num_steps} steps (train.num_steps) are "
            f"trained; to continue, add train.num_steps={2 * config.train.num_steps} or another "
            "larger number"
        )
    if train_data is not None and point.driver["train_data"] != train_data:
        raise ValueError(
            f"data.train ({config.data.train}) does not give the prompts that this run began with; "
            "restore data.train, data.heldout and data.contamination, or start a new run with "
            f"model.path={newest}"
        )
    known = point.driver.get("heldout_data")  # absent in older checkpoints
    if heldout_data and known and heldout_data != known:
        raise ValueError(
            f"data.heldout ({config.data.heldout}) does not give the prompts that this run was "
            "evaluated on, so its accuracies could not be compared; restore the data, or start a "
            f"new run with model.path={newest}"
        )
    return point


def _read_point(folder: CheckpointFolder, version: int) -> ResumePoint:
    """Checks every file of a checkpoint, and that the actors will find what they read.

    Raises ValueError, which names the file.
    """
    from dapo_async.learner import check_state  # imports torch, which a new run does not need here

    checkpoint, began_s = folder.path(version), time.monotonic()
    driver = read_driver_state(checkpoint)
    check_state(checkpoint / STATE / LEARNER_FOLDER)
    counts, failures = read_outcomes(checkpoint / STATE)
    sums = folder.manifest(version)
    if sums is None:
        note = f"{checkpoint.name} has no checksums, so the content of its files is not checked"
        return ResumePoint(checkpoint, version, driver, counts, failures, (note,))
    if found := damage(checkpoint, sums):
        raise ValueError(
            f"{found[0]}; copy the checkpoint whole, or remove {checkpoint} to resume from the one "
            "before"
        )
    size = sum(each.num_bytes for each in sums.values()) / 2**20
    note = (
        f"{checkpoint.name} is whole: {len(sums)} files, {size:,.1f} MiB, checked in "
        f"{time.monotonic() - began_s:.2f} s"
    )
    return ResumePoint(checkpoint, version, driver, counts, failures, (note,))


def read_driver_state(checkpoint: Path) -> dict[str, Any]:
    """What the driver saved. Raises ValueError, which names the file, when it can't be read."""
    path = checkpoint / STATE / DRIVER_FILE
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(state.get("train_data"), str):
            raise ValueError("train_data is missing")
    except (OSError, ValueError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{path} can't be read ({why}); copy the checkpoint whole, or remove "
            f"{checkpoint} to resume from the one before"
        ) from error
    return state


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
