"""`dapo-async rerun`: the learner alone on the recorded batches of a run."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_async.cli.arguments import Parser, path, say
from dapo_async.config import load

if TYPE_CHECKING:  # they take seconds to import
    from dapo_async.learner.rerun import StepComparison
    from dapo_async.tracking.run_dir import RunDir

HELP = "train the learner alone on a run's recorded batches and compare the numbers"


def add_arguments(parser: Parser) -> None:
    """Adds what `rerun` takes."""
    parser.add_argument(
        "run_dir", type=path, metavar="RUN_DIR", help="a run with recorded/ (train.record=true)"
    )
    parser.add_argument(
        "--model", type=path, metavar="FOLDER", help="where the base model is now, if it was moved"
    )


def run(options: argparse.Namespace) -> int:
    """Exit code 0 when every recorded step gives the numbers of the run, 1 otherwise."""
    from dapo_async.tracking.run_dir import RunDir

    run_dir = RunDir(options.run_dir.resolve())
    if not run_dir.config.is_file():
        raise ValueError(
            f"{run_dir.root} has no config.yaml, so it is no run directory; "
            "give the folder that a run has printed"
        )

    from dapo_async.learner.rerun import recorded_steps, rerun, tolerance_for
    from dapo_async.model import with_positions
    from dapo_async.runtime.local_model import with_local_model
    from dapo_async.runtime.resume import with_model_at_hand
    from dapo_async.utils.manifest import damage

    recorded = {
        name: each
        for name, each in run_dir.listed_files().items()
        if name.startswith(f"{run_dir.recorded.name}/")
    }
    if found := damage(run_dir.root, recorded):
        raise ValueError(f"{found[0]}; copy the recorded batches again")
    moved = [f"model.path={json.dumps(str(options.model))}"] if options.model else []
    config = load(run_dir.config, moved, files=False)
    state = _first_state(run_dir, recorded_steps(run_dir.recorded)[0])
    config = with_model_at_hand(config, state.parent.parent if state else None)
    config, _ = with_local_model(config, download=True)
    if not Path(config.model.path).is_dir():
        raise ValueError(
            f"model.path ({config.model.path}) does not exist; "
            "give --model FOLDER, the folder where this base model is now"
        )
    config = config.with_model(with_positions(config.model.path, config.model.max_positions))
    rows = {row["step"]: row for row in run_dir.rows()}
    steps = different = 0
    for compared in rerun(config, run_dir.recorded, rows=rows, state=state):
        say(_step_line(compared))
        steps += 1
        different += bool(compared.differing)
    tolerance = tolerance_for(config)
    how = f"to {tolerance:g} of each number" if tolerance else "bit for bit"
    say(
        f"{different} of {steps} steps differ"
        if different
        else f"all {steps} steps are equal, {how}"
    )
    return int(bool(different))


def _first_state(run_dir: RunDir, first: int) -> Path | None:
    """The learner's state before the first recorded step; None: the base model."""
    from dapo_async.utils.checkpoint_dir import LEARNER_FOLDER, STATE, CheckpointFolder

    if first == 0:
        return None
    state = CheckpointFolder(run_dir.checkpoints).path(first) / STATE / LEARNER_FOLDER
    if not state.is_dir():
        raise ValueError(
            f"recording began at step {first}, and {state} is gone; "
            "keep that checkpoint (train.keep_checkpoints) to rerun from there"
        )
    return state


def _step_line(compared: StepComparison) -> str:
    verdict = "equal"
    for name, (before, now) in list(compared.differing.items())[:1]:
        verdict = f"DIFFERS by up to {compared.largest:.1e}: {name} was {before}, is {now}"
    norm = compared.values.get("grad_norm", math.nan)
    loss = compared.values["loss"]
    return f"step {compared.step + 1:>4}  loss {loss:+.6f}  grad norm {norm:.6f}  {verdict}"
