"""Reads and writes plain Hugging Face folders.

Weights keep their Hugging Face names, and a tied head is not written. Called by the learner and the
engines to load a decoder, by checkpoints to export one, and by preflight to check a folder.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dapo_async.model.config import ModelConfig
from dapo_async.model.decoder import Decoder
from dapo_async.model.gather import buckets
from dapo_async.model.mesh import Mesh
from dapo_async.model.parallel import part_of, shard_decoder, shard_of
from dapo_async.utils.files import atomic_file

WEIGHTS_FILE = "model.safetensors"
FILE_BYTES = 4 * 2**30  # size limit of one file of an exported model
# What transformers and SGLang read from a folder besides its weights.
COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files, on CPU, in their own dtype.

    Raises ValueError if there is no such file.
    """
    weights = {}
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            weights.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a mapping)
    return weights


def check_weights(folder: Path, config: ModelConfig) -> None:
    """Compares the names and shapes of the weights with those that the config needs.

    Reads only the files' headers. Raises ValueError for a folder without safetensors files, for a
    broken file, and for missing, unexpected or wrongly shaped tensors.
    """
    found = _shapes_in(folder)
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)
    with torch.device("meta"):
        state = Decoder(config).state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ],
    }
    listed = ", ".join(f"{what} {names[:3]}" for what, names in problems.items() if names)
    if listed:
        raise ValueError(
            f"weights of {folder} do not fit their config.json: {listed}; take both from one model"
        )


def _shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is no readable safetensors file ({error}); "
                "copy it again from the base model"
            ) from error
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise ValueError(
            f"model folder {folder} has no *.safetensors file; pickled weights are never loaded, "
            "so convert them to safetensors first"
        )
    return paths


def build_decoder(
    config: ModelConfig,
    *,
    mesh: Mesh = Mesh(),  # noqa: B008 (frozen)
    dtype: torch.dtype = torch.float32,
    activations: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder, or this rank's part of one, whose parameters have no values yet (see `fill`).

    It computes in `activations` (None: in `dtype`, the dtype of its weights). Raises ValueError for
    a size that the mesh's tensor-parallel axis does not divide.
    """
    config.check_split(mesh.tp.size)
    with torch.device("meta"):
        decoder = Decoder(config, mesh.tp).to(dtype)
    decoder.activations = activations
    if mesh.devices is not None:
        shard_decoder(decoder, mesh, dtype=activations or dtype)
    decoder.to_empty(device=device)
    # The rotary tables stay in float32: positions beyond 256 are not exact in bfloat16.
    cos, sin = config.rope.tables(config.head_dim, config.max_positions)
    decoder.rope_cos, decoder.rope_sin = cos.to(device), sin.to(device)
    return decoder


@torch.no_grad()
def fill(decoder: Decoder, read: Callable[[str, tuple[slice, ...]], Tensor]) -> None:
    """Sets every parameter; `read(name, part)` returns this rank's part of one parameter."""
    for name, parameter in decoder.named_parameters():
        mine, given = shard_of(parameter), read(name, part_of(parameter))
        assert mine.shape == given.shape, (
            f"{name}: this rank has {tuple(mine.shape)}, read {tuple(given.shape)}"
        )
        mine.copy_(given)


def load_decoder(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    activations: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    mesh: Mesh = Mesh(),  # noqa: B008 (frozen)
) -> Decoder:
    """Builds the decoder of a plain Hugging Face folder, or this rank's part of it, with weights.

    Reads only this rank's part. Raises ValueError for missing, unexpected or wrongly shaped
    tensors, and for a size that the mesh does not divide.
    """
    folder = Path(folder)
    config = ModelConfig.from_folder(folder)
    config.check_split(mesh.tp.size)
    check_weights(folder, config)
    decoder = build_decoder(config, mesh=mesh, dtype=dtype, activations=activations, device=device)
    with ExitStack() as stack:
        files = {}
        for path in _weight_files(folder):
            file = stack.enter_context(safe_open(path, framework="pt"))
            files.update(dict.fromkeys(file.keys(), file))
        fill(decoder, lambda name, part: files[name].get_slice(name)[part])
    return decoder


def save_weights(weights: Mapping[str, Tensor], folder: Path, *, name: str = WEIGHTS_FILE) -> None:
    """Writes `folder/name` atomically: the file is whole or absent, even if the machine stops."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_file(Path(folder) / name) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def export_folder(
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[Sequence[str]], Mapping[str, Tensor]],
    *,
    dtype: torch.dtype,
    base: Path,
    out: Path,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Makes `out` a plain Hugging Face folder with the weights of `shapes` in `dtype`.

    Config and tokenizer come from the folder `base`. `read(names)` returns whole weights in any
    precision. It is called for one file after the other: each time for at most `file_bytes` in
    `dtype`, or for one weight.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in COMPANION_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    config = json.loads((out / "config.json").read_text())
    config.pop("torch_dtype", None)  # its name in transformers 4
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    files = [*buckets(sizes, sizes.__getitem__, limit=file_bytes)]
    places: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        numbered = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file = numbered if len(files) > 1 else WEIGHTS_FILE
        weights = {name: tensor.to(dtype) for name, tensor in read(names).items()}
        save_weights(weights, out, name=file)
        places |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (out / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index, indent=2) + "\n")
