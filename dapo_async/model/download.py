"""Downloads a model from the Hugging Face hub: weights, config and tokenizer only.

In: a repository and a revision. Out: a folder on this machine. Called at the start of `train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dapo_async.model.weight_files import weight_names
from dapo_async.utils.hub_faults import HubFault, hub_fault

# The config, the index of the weights and the tokenizer. Pickled weights and code are not
# downloaded; of the safetensors files only those of the model.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"  # transformers reads them too
NOT_BELOW = ("*/*",)
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
    lines = str(error).strip().splitlines() or [type(error).__name__]
    fault = hub_fault(error, repository, revision) or HubFault(
        lines[0], "check name and network, and HF_ENDPOINT if it is set"
    )
    return (
        f"model.path: {repository} is no folder here, and {name} cannot be downloaded from the "
        f"Hugging Face hub: {fault.reason}; {fault.remedy}, or give the folder of a model"
    )
