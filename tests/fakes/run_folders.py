"""A run directory with the small files of its checkpoints, without a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.replay import BufferState
from dapo_async.runtime.actors.replay_files import write_state

DATA = "f00d"  # fingerprint of the training prompts
REPLAY = BufferState(
    version=4,
    next_step=4,
    admitted=9,
    ended={"trained": 4, "all_wrong": 2, "evicted": 1},
    failures={"rollout-0": 1},
    streak={},
    acceptance={},
    reissue=(7, 8),
    buffered={},
)


def run_of(root: Path, base: Path, *, versions: tuple[int, ...] = (2, 4)) -> Path:
    """A run folder on the model `base`, with the small files of its checkpoints."""
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QUICKSTART.parent / "base" / "quickstart" / name, base)
    config = knobs.load(QUICKSTART, [f"model.path={base}"])
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(knobs.to_yaml(replace(config, run_dir="")))
    for version in versions:
        checkpoint = root / "checkpoints" / f"step_{version:06d}"
        shutil.copytree(base, checkpoint)
        exported = json.loads((checkpoint / "config.json").read_text()) | {"dtype": "bfloat16"}
        (checkpoint / "config.json").write_text(json.dumps(exported))
        (checkpoint / "model.safetensors").write_text("weights")
        (checkpoint / "state").mkdir()
        driver = {"version": version, "train_data": DATA}
        (checkpoint / "state" / "driver.json").write_text(json.dumps(driver))
        write_state(checkpoint / "state", REPLAY)
        learner = checkpoint / "state" / "learner"
        learner.mkdir()
        (learner / "part.safetensors").write_bytes(b"part")
        counts = {"version": version, "updates": 2, "files": {"part.safetensors": 4}}
        (learner / "learner.json").write_text(json.dumps(counts))
    return root
