"""Models of the Hugging Face hub: what is downloaded, and the one line when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Never

import huggingface_hub
import pytest

from dapo_async.model import download_model


def test_only_the_files_that_the_index_names_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        folder = tmp_path / "0123abc"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}'
        )
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert download_model("Qwen/Qwen2.5-32B", revision="v1") == tmp_path / "0123abc"
    always = {"ignore_patterns": ["*/*"], "local_files_only": False}
    small = ["*.json", "*.txt", "*.model", "*.jinja"]
    weights = ["model-1.safetensors", "model-2.safetensors"]
    assert asked == [
        ("Qwen/Qwen2.5-32B", {"revision": "v1", "allow_patterns": small, **always}),
        ("Qwen/Qwen2.5-32B", {"revision": "0123abc", "allow_patterns": weights, **always}),
    ]
    assert download_model("Qwen/Qwen2.5-32B", download=False) is None  # no weights yet


def test_without_download_an_absent_model_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert download_model("nobody/nothing", download=False) is None


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: Any) -> Never:
        raise huggingface_hub.errors.LocalEntryNotFoundError(
            "Got: ConnectError: no network\nAn error happened while trying to locate the files"
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"model\.path") as error:
        download_model("nobody/nothing", revision="v1")
    assert str(error.value) == (
        "model.path: nobody/nothing is no folder here, and nobody/nothing@v1 cannot be downloaded "
        "from the Hugging Face hub: Got: ConnectError: no network; check name and network, or give "
        "the folder of a model"
    )
