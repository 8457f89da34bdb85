"""One W&B run: parameters and metrics come in; its files in `wandb/` of the run directory leave.

The only module that imports `wandb` (extra `wandb`). Nothing leaves the machine unless the
environment sets WANDB_MODE=online; WANDB_API_KEY and WANDB_PROJECT are W&B's own variables.
`wandb sync FOLDER` uploads the files of an offline run later.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapo_async.utils.files import atomic_write

PROJECT = "dapo-async"
STEP = "version"  # W&B's own step must grow; an evaluation is logged after later steps
OFFLINE = "offline"
MODE = "WANDB_MODE"


class WandbWriter:
    """A `MetricWriter` for one run. Every method raises what the library raises."""

    def __init__(self, root: Path, parameters: Mapping[str, str]) -> None:
        """`root`: the run directory; a resumed run continues the W&B run of its `wandb.json`."""
        os.environ.setdefault(MODE, OFFLINE)
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        settings: Any = wandb.Settings(
            console="off",  # the output of the run stays its own
            disable_code=True,
            disable_git=True,
            silent=True,
            x_disable_meta=True,  # it has the command line, which may name a password
        )
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=_run_id(root / "wandb.json"),
            name=root.name,
            dir=str(root),
            config=dict(parameters),
            resume=None if os.environ[MODE] == OFFLINE else "allow",
            settings=settings,
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, values: Mapping[str, float], *, time_s: float) -> None:
        """One row, with its step as the metric `version`."""
        self._run.log({STEP: step, **values})

    def close(self, status: str, reason: str) -> None:
        """Notes how the run ended, and waits until the files are written."""
        self._run.summary.update({"status": status, "reason": reason})
        self._run.finish(exit_code=0 if status in ("done", "solved") else 1)


def _run_id(file: Path) -> str:
    if file.exists():
        return str(json.loads(file.read_text())["run_id"])
    run_id = secrets.token_hex(8)
    atomic_write(file, json.dumps({"run_id": run_id}) + "\n")
    return run_id
