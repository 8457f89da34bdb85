"""Downloads a model from the Hugging Face hub: weights, config and tokenizer only.

In: a repository and a revision. Out: a folder on this machine. Called at the start of `train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dapo_async.model.weight_files import weight_names

# The config, the index of the weights and the tokenizer. Pickled weights and code are not
# downloaded; of the safetensors files only those of the model.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def download_model(
    repository: str, *, revision: str | None = None, download: bool = True
) -> Path | None:
    """The local folder of `repository` (OWNER/NAME) at `revision` (None: the newest).

    The folder's name is the exact revision. With `download=False` only the local cache is searched,
    and the result is None if the model is not in it. On a cluster every node must see the folder:
    put HF_HOME on a shared disk. Raises ValueError if the model cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(patterns: Sequence[str], revision: str | None) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
                local_files_only=not download,
            )
        )

    try:
        folder = fetch(SMALL_FILES, revision)
        names = weight_names(folder)
        if download:
            fetch(names, folder.name)
    except (OSError, ValueError) as error:
        if not download and isinstance(error, LocalEntryNotFoundError):
            return None
        reason = str(error).strip().splitlines()[0]
        name = repository if revision is None else f"{repository}@{revision}"
        raise ValueError(
            f"model.path: {repository} is no folder here, and {name} cannot be downloaded from the "
            f"Hugging Face hub: {reason}; check name and network, or give the folder of a model"
        ) from error
    if not download and not all((folder / name).is_file() for name in names):
        return None
    return folder
