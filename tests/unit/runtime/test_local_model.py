"""The config of a run whose model is on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.runtime.local_model import with_local_model


def hub_config(name: str) -> knobs.Config:
    return knobs.load(QUICKSTART, [f"model.path={name}"])


def test_a_run_uses_the_downloaded_folder_and_saves_the_exact_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        return str(tmp_path / "0123abc")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    used, saved = with_local_model(hub_config("Qwen/Qwen2.5-32B@v1"), download=True)
    assert used.model.path == str(tmp_path / "0123abc")
    assert saved.model.path == "hub:Qwen/Qwen2.5-32B@0123abc"


def test_a_local_model_leaves_the_config_unchanged() -> None:
    config = knobs.load(QUICKSTART)
    assert with_local_model(config, download=True) == (config, config)


def test_a_dry_run_downloads_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = hub_config("nobody/nothing")
    assert with_local_model(config, download=False) == (config, config)
