"""Plain Hugging Face folders in and out: names are the identity, a tied head is not written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dapo_async.model.config import ModelConfig
from dapo_async.model.decoder import Decoder

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


def load_decoder(folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Decoder:
    """Builds the decoder of a plain Hugging Face folder with its weights. Raises ValueError for tensors missing, left over or of another shape."""
    config = ModelConfig.from_folder(Path(folder))
    check_weights(Path(folder), config)
    weights = read_weights(Path(folder))
    if config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    decoder = Decoder(config).to(device=device, dtype=dtype)
    decoder.load_state_dict(weights)
    # The rotary tables stay in float32: positions beyond 256 are not exact in bfloat16.
    rotary = Decoder(config)
    decoder.rope_cos, decoder.rope_sin = rotary.rope_cos.to(device), rotary.rope_sin.to(device)
    return decoder


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
