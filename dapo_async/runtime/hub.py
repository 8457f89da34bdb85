"""A model of the Hugging Face hub as a folder on this machine: weights, config and tokenizer alone. Called by `cli.py` for every `train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dapo_async.config import Config, parse_source

# Pickled weights and code are left where they are. A tokenizer's files: *.json, merges.txt, *.model, chat_template.jinja.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def with_model_here(config: Config, *, download: bool) -> tuple[Config, Config]:
    """`config` with the model's folder, and `config` with the very revision that this is, for the run directory. Without `download` a model that
    is not here yet stays as it is.

    On a cluster every node has to see the folder: HF_HOME on a shared disk. Raises ValueError when the model can't be had.
    """
    source = parse_source(config.model.path)
    if source.hub is None:
        return config, config
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                source.hub,
                revision=source.revision,
                allow_patterns=list(FILES),
                ignore_patterns=["*/*"],
                local_files_only=not download,
            )
        )
    except (OSError, ValueError) as error:
        if not download and isinstance(error, LocalEntryNotFoundError):
            return config, config
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.path: there is no folder {source.hub} here, and {source.where} can't be had from the Hugging Face hub: {reason}; check name and "
            "network, or give the folder of a model"
        ) from error
    pinned = replace(source, revision=folder.name).where
    return _with_path(config, str(folder)), _with_path(config, pinned)


def _with_path(config: Config, path: str) -> Config:
    return replace(config, model=replace(config.model, path=path))
