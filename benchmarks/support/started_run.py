"""A run of `dapo-async train` on the quickstart's config in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from quickstart import CONFIG


class StartedRun:
    """`root` is the run directory; `process` leads a session, which can be ended as a whole."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        """`words`: overrides and options of `train`. The output goes to `folder/run.out`."""
        self.root, self._log = folder / "run", folder / "run.out"
        train = (sys.executable, "-m", "dapo_async", "train", str(CONFIG))
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*train, *words, f"run_dir={self.root}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What the run has printed so far."""
        return self._log.read_text()
