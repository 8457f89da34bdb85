"""Plain Hugging Face folders in and out: names are the identity, a tied head is not written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dapo_async.model.config import ModelConfig
from dapo_async.model.decoder import Decoder
from dapo_async.model.parallel import ALONE, Axis, split_dim

WEIGHTS_FILE = "model.safetensors"
# What a folder needs besides its weights to be loaded by transformers and by SGLang.
COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files, on CPU, in their own dtype. Raises ValueError when there is no such file."""
    weights = {}
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            weights.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a mapping)
    return weights


def check_weights(folder: Path, config: ModelConfig) -> None:
    """Compares names and shapes with what the config asks for; reads the files' headers, no tensor.

    Raises ValueError for a folder without safetensors files, a broken file, and tensors missing, left over or of another shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no readable safetensors file ({error}); copy it once more from the base model") from error
    if config.tie_embeddings:
        shapes.pop("lm_head.weight", None)
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}
    missing, unexpected = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    wrong = [f"{name} {shapes[name]} instead of {shape}" for name, shape in wanted.items() if shapes.get(name, shape) != shape]
    if missing or unexpected or wrong:
        named = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        listed = ", ".join(f"{what} {names[:3]}" for what, names in named if names)
        raise ValueError(f"weights of {folder} do not fit their config.json: {listed}; take both from one model")


def _weight_files(folder: Path) -> list[Path]:
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise ValueError(f"model folder {folder} has no *.safetensors file; pickled weights are never loaded, so convert them first")
    return paths


def load_decoder(folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", tp: Axis = ALONE) -> Decoder:
    """Builds the decoder of a plain Hugging Face folder with its weights, or this rank's shard of it: only that is read.

    Raises ValueError for tensors missing, left over or of another shape, and for a size that `tp` does not divide.
    """
    folder = Path(folder)
    config = ModelConfig.from_folder(folder)
    config.check_split(tp.size)
    check_weights(folder, config)
    with torch.device("meta"):
        decoder = Decoder(config, tp)
    decoder.to_empty(device=device).to(dtype)
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():
        for path in _weight_files(folder):
            with safe_open(path, framework="pt") as file:
                for name in parameters.keys() & set(file.keys()):
                    parameters[name].copy_(_shard(file.get_slice(name), name, tp))
    # The rotary tables stay in float32: positions beyond 256 are not exact in bfloat16.
    decoder.rope_cos, decoder.rope_sin = (table.to(device) for table in config.rope.tables(config.head_dim, config.max_positions))
    return decoder


def _shard(tensor: Any, name: str, tp: Axis) -> Tensor:
    """This rank's part of a lazily read tensor."""
    dim, shape = split_dim(name), tensor.get_shape()
    part: Tensor = tensor[tp.share(shape[0])] if dim == 0 else tensor[:, tp.share(shape[1])] if dim == 1 else tensor[:]
    return part


def save_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes `folder/model.safetensors` atomically: whole or not at all, even when the machine stops."""
    path, partial = Path(folder) / WEIGHTS_FILE, Path(folder) / (WEIGHTS_FILE + ".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, partial, metadata={"format": "pt"})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)


def export_folder(weights: Mapping[str, Tensor], *, base: Path, out: Path) -> None:
    """Makes `out` a plain Hugging Face folder: these weights with the base folder's config and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    for name in COMPANION_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_weights(weights, out)
