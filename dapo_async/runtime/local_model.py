"""Replaces a model of the Hugging Face hub in the config by its folder on this machine.

Called by `cli/` for every `train`. Imports no Ray: the environment is not prepared for it yet.
"""

from __future__ import annotations

from dataclasses import replace

from dapo_async.config import Config, parse_source
from dapo_async.model import download_model


def with_local_model(config: Config, *, download: bool) -> tuple[Config, Config]:
    """`config` with the model's local folder, and `config` with the model's exact revision.

    The second one is saved in the run directory. Without `download`, a model that is not on this
    machine yet leaves both unchanged. Raises ValueError if the model cannot be downloaded.
    """
    source = parse_source(config.model.path)
    if source.hub is None:
        return config, config
    folder = download_model(source.hub, revision=source.revision, download=download)
    if folder is None:
        return config, config
    pinned = replace(source, revision=folder.name).where
    return config.with_model(str(folder)), config.with_model(pinned)
