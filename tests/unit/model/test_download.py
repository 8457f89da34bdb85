"""Models of the Hugging Face hub: what is downloaded, and the one line when it fails."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any, Never

import httpx
import huggingface_hub.constants
import pytest
from hub_server import COMMIT, hub_server
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from dapo_async.model import download_model
from dapo_async.model.download import model_shape

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {"a": "b-2.safetensors"}}',
    "b-2.safetensors": b"weights",
    "b-1.safetensors": b"of an older save",
    "pytorch_model.bin": b"pickled",
    "modeling.py": b"code",
    "chat_template.jinja": b"default",
    "additional_chat_templates/tool_use.jinja": b"tools",
    "additional_chat_templates/readme.md": b"no template",
    "onnx/config.json": b"{}",
}
DOWNLOADED = {
    "config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
    "b-2.safetensors",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub's library, empty; without a token."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub"


def use_hub(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library asks the hub at this URL."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


def refusal(repository: str, revision: str | None = None) -> str:
    """Reason and remedy of the one line about a failed download."""
    with pytest.raises(ValueError, match=r"model\.path") as error:
        download_model(repository, revision=revision)
    line = str(error.value)
    assert "\n" not in line
    _, found, end = line.partition(" cannot be downloaded from the Hugging Face hub: ")
    assert found
    assert end.endswith(", or give the folder of a model")
    return end.removesuffix(", or give the folder of a model")


def test_config_tokenizer_templates_and_named_weights_are_downloaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server(FILES) as url:
        use_hub(url, monkeypatch)
        assert download_model("me/here", download=False) is None
        folder = download_model("me/here", revision="v1")
    assert folder is not None
    assert folder.name == COMMIT
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == DOWNLOADED
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_bytes() == b"tools"
    assert download_model("me/here", revision="v1", download=False) == folder
    (folder / "b-2.safetensors").unlink()
    assert download_model("me/here", revision="v1", download=False) is None


def test_broken_index_of_the_hub_keeps_its_own_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server({**FILES, "model.safetensors.index.json": b"{"}) as url:
        use_hub(url, monkeypatch)
        with pytest.raises(ValueError, match=r"index\.json is not valid JSON") as error:
            download_model("me/here")
    assert "network" not in str(error.value)


NO_TOKEN = [
    ("gated", "its owner gives access on request (HTTP 403); ask for access on the page of"),
    ("unknown", "the hub has none of this name, or a private one (HTTP 401); correct the name, or"),
    ("removed", "the hub has none of this name, or a private one (HTTP 404); correct the name, or"),
    ("revision", "it has no revision v1 (HTTP 404); correct the revision, or leave it out"),
    ("disabled", "the hub has disabled it (HTTP 403); use another one"),
    ("token", "the hub has none of this name, or a private one (HTTP 401); "),
    ("forbidden", "the token may not read it (HTTP 403); give the token the permission"),
    ("nowhere", "the hub does not know it (HTTP 404); correct the name, and HF_ENDPOINT"),
    ("busy", "the hub got too many requests (HTTP 429); wait some minutes, or set HF_TOKEN"),
    ("broken", "the hub has a fault (HTTP 501); try again later"),
]
WITH_TOKEN = [
    ("gated", "its owner gives access on request (HTTP 403); ask for access on the page of"),
    ("unknown", "correct the name, or use a token of an account that may read it"),
    ("token", "the hub does not accept the token (HTTP 401); set HF_TOKEN to a valid token, or"),
]


def test_each_answer_of_the_hub_has_its_own_remedy(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server(FILES) as url:
        use_hub(url, monkeypatch)
        for name, expected in NO_TOKEN:
            assert expected in refusal(f"me/{name}", "v1"), name
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        for name, expected in WITH_TOKEN:
            line = refusal(f"me/{name}")
            assert expected in line, name
            assert "hf_secret" not in line
        assert "wait until it is granted" in refusal("me/gated")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (httpx.ConnectError("refused"), "the hub can't be reached (refused); check the network"),
        (httpx.ConnectTimeout("late"), "the hub does not answer in time (late); check the network"),
        (
            httpx.ProxyError("503 Busy"),
            "the proxy does not connect (503 Busy); correct HTTPS_PROXY",
        ),
        (
            httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] unknown authority"),
            "set SSL_CERT_FILE to the certificate of your network's authority",
        ),
        (
            httpx.UnsupportedProtocol("Request URL is missing an 'http://'"),
            "the address of the hub is wrong (Request URL is missing an 'http://'); correct HF_END",
        ),
        (
            huggingface_hub.errors.OfflineModeIsEnabled("offline"),
            "HF_HUB_OFFLINE is set, and it is not on this machine; unset HF_HUB_OFFLINE",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/hf/x"),
            "a file can't be used: no space left on device (/hf/x); free some space",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/hf/x"),
            "a file can't be used: permission denied (/hf/x); set HF_HOME to a folder that",
        ),
        (HFValidationError("Repo id must be short"), "Repo id must be short; correct the name"),
        (RuntimeError("another\nreason."), "another; check name and network, and HF_ENDPOINT"),
    ],
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_each_error_of_the_network_and_the_disk_has_its_own_remedy(
    error: Exception, expected: str, is_wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(name: str, **options: Any) -> Never:
        if is_wrapped:
            raise LocalEntryNotFoundError(str(error)) from error
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert expected in refusal("nobody/nothing")


SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def test_sizes_come_from_the_config_alone_and_nothing_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server({"config.json": json.dumps(SHAPE).encode()}) as url:
        use_hub(url, monkeypatch)
        model = model_shape("me/here")
    assert (model.num_layers, model.num_kv_heads, model.head_dim) == (28, 2, 128)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("repository", "config", "said"),
    [
        ("me/here", b'{"model_type": "mamba"}', "model_type 'mamba' is not supported"),
        ("me/here", b"<html>", "config.json of me/here can't be read from the Hugging Face hub"),
        ("me/gated", b"", "config.json of me/gated can't be read from the Hugging Face hub"),
    ],
)
def test_sizes_that_can_not_be_read_are_one_line(
    monkeypatch: pytest.MonkeyPatch, cache: Path, repository: str, config: bytes, said: str
) -> None:
    with hub_server({"config.json": config}) as url:
        use_hub(url, monkeypatch)
        with pytest.raises(ValueError, match=said) as error:
            model_shape(repository)
    assert "\n" not in str(error.value)


def test_hub_that_is_not_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub("http://127.0.0.1:9", monkeypatch)
    began_s = time.monotonic()
    with pytest.raises(ValueError, match="can't be read from the Hugging Face hub"):
        model_shape("me/here")
    assert time.monotonic() - began_s < 5.0
