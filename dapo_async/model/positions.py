"""A model folder with another number of positions (`model.max_positions`).

Rotary embeddings have no weights, so a model can run at positions beyond its `config.json`; how
well it does there is for the training to show. The folder has links to all files of the model, and
a `config.json` of its own, so that learner, engines, SGLang's servers and exports read one number.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from pathlib import Path

from dapo_async.model.special_tokens import CONFIG, read_json

KEY = "max_position_embeddings"


def with_positions(base: str, positions: int | None, folder: Path | None = None) -> str:
    """Such a folder for the model in `base`; `base` itself where `positions` is None.

    `folder` is made anew; None: a temporary one, which the end of this process removes. `base` also
    where the model has no `config.json` here, as one of the hub that a dry run left there. Raises
    ValueError for a broken one.
    """
    model = Path(base)
    if positions is None or not (model / CONFIG).is_file():
        return base
    values = read_json(model / CONFIG, "copy the config.json of the base model")
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="dapo-async-model-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.name != CONFIG:
            (folder / path.name).symlink_to(path.resolve())
    (folder / CONFIG).write_text(json.dumps({**values, KEY: positions}, indent=2) + "\n")
    return str(folder)
