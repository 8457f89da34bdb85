"""A run whose sequences are longer than the positions of the model's config.json."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from paths import CONFIGS
from run_support import TINY, finished

from dapo_async.model import ModelConfig

pytestmark = pytest.mark.ray
BASE = CONFIGS / "base" / "quickstart"


def test_a_run_with_more_positions_trains_and_resumes_without_its_base(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    most = ModelConfig.from_folder(BASE).max_positions
    run = finished(
        tmp_path / "run",
        *TINY,
        f"model.path={tmp_path / 'base'}",
        f"model.max_positions={most + 40}",
        f"rollout.max_response_tokens={most + 10}",
        "train.num_steps=2",
    )
    assert run.exit_code == 0, run.output
    for folder in (run.root / "model", *(run.root / "checkpoints").glob("step_*")):
        assert ModelConfig.from_folder(folder).max_positions == most + 40
    assert ModelConfig.from_folder(tmp_path / "base").max_positions == most
    shutil.rmtree(tmp_path / "base")
    again = finished(tmp_path / "run", "train.num_steps=3", config=None)
    assert again.exit_code == 0, again.output
    assert [row["step"] for row in again.metrics] == [0, 1, 2]
