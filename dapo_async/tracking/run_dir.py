"""What a run leaves behind, and where: the fixed points of the run directory. Written by the driver; `rollouts/` by the replay actor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_async.types import Group


@dataclass(frozen=True, slots=True)
class RunDir:
    """`config.yaml, metrics.jsonl, summary.json, timeline.json, dynamics.png, rollouts/, checkpoints/` under one root."""

    root: Path

    @classmethod
    def create(cls, root: Path) -> RunDir:
        """Makes the directory. Raises ValueError if it can't be made or holds anything: a run never writes over another."""
        try:
            if root.exists() and not root.is_dir():
                raise ValueError(f"run_dir {root} is a file; choose another run_dir")
            if root.exists() and any(root.iterdir()):
                raise ValueError(f"run_dir {root} is not empty; choose another run_dir, or remove it")
            for name in ("rollouts", "checkpoints"):
                (root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:  # below a file, no permission, a name too long, …
            raise ValueError(f"run_dir {root} can't be made: {error.strerror}; choose another run_dir") from error
        return cls(root)

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def weights(self) -> Path:
        """Versions for engines that load from disk."""
        return self.root / "weights"

    @property
    def error(self) -> Path:
        """The whole traceback of a failed run, the failed actor's own included."""
        return self.root / "error.txt"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    def log_step(self, values: Mapping[str, Any]) -> None:
        """One flat JSON object per step, on disk before the next step is logged. JSON knows no nan or infinity: null stands for them."""
        known = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
        with self.metrics.open("a") as file:
            file.write(json.dumps(known, allow_nan=False) + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Atomic: a reader sees the whole summary or none."""
        partial = self.root / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(partial, self.root / "summary.json")


def write_rollouts(folder: Path, *, step: int, groups: Sequence[Group]) -> None:
    """Readable samples of one step: a JSON line per rollout, `weight_versions` as [version, first token, end] spans."""
    with (folder / f"step_{step:06d}.jsonl").open("w", encoding="utf-8") as file:
        for group in groups:
            for sibling, rollout in enumerate(group.rollouts):
                row = {
                    "step": step,
                    "admission": group.admission_index,
                    "sibling": sibling,
                    "prompt": group.prompt.text,
                    "response": rollout.text,
                    "gold": group.prompt.answer,
                    "extracted": rollout.extracted,
                    "accuracy": rollout.accuracy,
                    "reward": rollout.reward,
                    "tokens": rollout.num_tokens,
                    "finish_reason": rollout.completion.finish_reason.value,
                    "weight_versions": version_spans(rollout.completion.weight_versions.tolist()),
                    "prefill_version": rollout.completion.prefill_version,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def version_spans(versions: Sequence[int]) -> list[list[int]]:
    """Run-length form of the versions per token: `[7, 7, 8] -> [[7, 0, 2], [8, 2, 3]]`."""
    spans: list[list[int]] = []
    for index, version in enumerate(versions):
        if spans and spans[-1][0] == version:
            spans[-1][2] = index + 1
        else:
            spans.append([version, index, index + 1])
    return spans
