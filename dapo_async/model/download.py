"""Downloads a model from the Hugging Face hub: weights, config and tokenizer only.

In: a repository and a revision. Out: a folder on this machine, or for a dry run the sizes of the
model. Called at the start of `train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dapo_async.model.config import ModelConfig
from dapo_async.model.weight_files import weight_names
from dapo_async.utils.hub_faults import HubFault, hub_fault

# The config, the index of the weights and the tokenizer. Pickled weights and code are not
# downloaded; of the safetensors files only those of the model.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"  # transformers reads them too
NOT_BELOW = ("*/*",)
SHAPE_TIMEOUT_S = 5.0  # a dry run waits for the hub no longer
UNKNOWN = "check name and network, and HF_ENDPOINT if it is set"


def download_model(
    repository: str, *, revision: str | None = None, download: bool = True
) -> Path | None:
    """The local folder of `repository` (OWNER/NAME) at `revision` (None: the newest).

    The folder's name is the exact revision. With `download=False` only the local cache is searched,
    and the result is None if the model is not in it. On a cluster every node must see the folder:
    put HF_HOME on a shared disk. Raises ValueError if the model cannot be downloaded.
    """
    folder = _fetch(repository, revision, SMALL_FILES, ignored=NOT_BELOW, download=download)
    if folder is None:
        return None
    names = weight_names(folder)
    if download:
        _fetch(repository, folder.name, [*names, NAMED_TEMPLATES], download=True)
    elif not all((folder / name).is_file() for name in names):
        return None
    return folder


def model_shape(repository: str, *, revision: str | None = None) -> ModelConfig:
    """The sizes of a model on the hub, from its config.json alone, with one request.

    Raises ValueError if it can't be read, or describes an unsupported model.
    """
    import httpx
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import hf_raise_for_status

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"config.json of {repository} is not read, because HF_HUB_OFFLINE is set")
    try:
        url = hf_hub_url(repository, "config.json", revision=revision)
        answer = httpx.get(
            url, headers=build_hf_headers(), timeout=SHAPE_TIMEOUT_S, follow_redirects=True
        )
        hf_raise_for_status(answer)
        values = answer.json()
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        fault = _fault(error, repository, revision)
        raise ValueError(
            f"config.json of {repository} can't be read from the Hugging Face hub: "
            f"{fault.reason}; {fault.remedy}"
        ) from error
    try:
        return ModelConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"config.json of {repository}: {error}") from error


def _fetch(
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    ignored: Sequence[str] = (),
    download: bool,
) -> Path | None:
    """The local folder with the matching files; None: not on this machine, without `download`."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
                local_files_only=not download,
            )
        )
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        if not download and isinstance(error, LocalEntryNotFoundError):
            return None
        raise ValueError(_not_downloaded(error, repository, revision)) from error


def _not_downloaded(error: Exception, repository: str, revision: str | None) -> str:
    name = repository if revision is None else f"{repository}@{revision}"
    fault = _fault(error, repository, revision)
    return (
        f"model.path: {repository} is no folder here, and {name} cannot be downloaded from the "
        f"Hugging Face hub: {fault.reason}; {fault.remedy}, or give the folder of a model"
    )


def _fault(error: Exception, repository: str, revision: str | None) -> HubFault:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return hub_fault(error, repository, revision) or HubFault(lines[0], UNKNOWN)
