"""Loads a decoder from a plain Hugging Face folder, and writes such a folder.

Weights keep their Hugging Face names, and a tied head is not written. Called by the learner and the
engines to load a decoder, and by checkpoints to export one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dapo_async.model.config import ModelConfig, special_tokens
from dapo_async.model.decoder import Decoder
from dapo_async.model.expert_names import one_by_one, pieces
from dapo_async.model.gather import buckets
from dapo_async.model.mesh import Mesh
from dapo_async.model.parallel import part_of, shard_decoder, shard_of
from dapo_async.model.parameters import parameter_shapes
from dapo_async.model.special_tokens import CONFIG, GENERATION, SpecialTokens
from dapo_async.model.weight_files import INDEX_FILE, WEIGHTS_FILE, find_weights
from dapo_async.utils.files import atomic_file

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
    "chat_template.json",
)
COMPANION_FOLDERS = ("additional_chat_templates",)


def build_decoder(
    config: ModelConfig,
    *,
    mesh: Mesh = Mesh(),  # noqa: B008 (frozen)
    dtype: torch.dtype = torch.float32,
    activations: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder, or this rank's part of one, whose parameters have no values yet (see `fill`).

    It computes in `activations` (None: in `dtype`, the dtype of its weights). `reduce_dtype` of
    gradients: see `shard_decoder`. Raises ValueError for a size that the mesh's tensor-parallel
    axis does not divide.
    """
    config.check_split(mesh.tp.size)
    with torch.device("meta"):
        decoder = Decoder(config, mesh.tp, mesh.cp).to(dtype)
    decoder.activations = activations
    if mesh.devices is not None:
        shard_decoder(decoder, mesh, dtype=activations or dtype, reduce_dtype=reduce_dtype)
        decoder.to_empty(device=device)
    else:
        _allocate(decoder, device)
    # The rotary tables stay in float32: positions beyond 256 are not exact in bfloat16.
    cos, sin = config.rope.tables(config.head_dim, config.max_positions)
    decoder.rope_cos, decoder.rope_sin = cos.to(device), sin.to(device)
    return decoder


def _allocate(decoder: Decoder, device: torch.device | str) -> None:
    """Gives the parameters of a whole decoder on the meta device memory, but no values.

    `to_empty` does the same, but for plain tensors torch then imports sympy, which takes 0.4 s.
    """
    memory = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in decoder.state_dict().items()
    }
    decoder.load_state_dict(memory, assign=True)


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
    reduce_dtype: torch.dtype = torch.float32,
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
    weights = find_weights(folder, config)
    decoder = build_decoder(
        config,
        mesh=mesh,
        dtype=dtype,
        activations=activations,
        reduce_dtype=reduce_dtype,
        device=device,
    )
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(safe_open(path, framework="pt")) for path in weights.paths
        }

        shapes = parameter_shapes(config)

        def read(name: str, part: tuple[slice, ...]) -> Tensor:
            rows, *columns = part
            found = []
            for piece in pieces(name, shapes[name], config):
                start = max(0, rows.start - piece.first_row)
                stop = min(piece.shape[0], rows.stop - piece.first_row)
                if start < stop or piece.name == name:
                    stored = weights.tensors[piece.name]
                    place = (slice(start, max(start, stop)), *columns)
                    found.append(stored.part(files[stored.path], place))
            return torch.cat(found) if found else torch.empty(0, *shapes[name][1:])

        fill(decoder, read)
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

    Config and tokenizer come from the folder `base`. `read(names)` returns whole weights of the
    decoder in any precision; experts are written one by one. It is called for one file after the
    other: each time for at most `file_bytes` in `dtype`, or for one weight.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in COMPANION_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    for name in COMPANION_FOLDERS:
        if (base / name).is_dir():
            shutil.copytree(base / name, out / name, dirs_exist_ok=True)
    config = json.loads((out / CONFIG).read_text())
    config.pop("torch_dtype", None)  # its name in transformers 4
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(out / CONFIG, config)
    _write_stop_tokens(special_tokens(base), config, out / GENERATION)
    model = ModelConfig.from_folder(base)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    files = [*buckets(sizes, sizes.__getitem__, limit=file_bytes)]
    places: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        numbered = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file = numbered if len(files) > 1 else WEIGHTS_FILE
        weights = {name: tensor.to(dtype) for name, tensor in read(names).items()}
        written = one_by_one(weights, model)
        save_weights(written, out, name=file)
        places |= dict.fromkeys(written, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        _write_json(out / INDEX_FILE, index)


def _write_stop_tokens(tokens: SpecialTokens, config: Mapping[str, Any], path: Path) -> None:
    """Puts all stop tokens into `generation_config.json`, which every engine reads."""
    stop = list(tokens.stop)
    values = json.loads(path.read_text()) if path.is_file() else None
    known = (values or config).get("eos_token_id")
    if set(known if isinstance(known, list) else [known]) == set(stop) or not stop:
        return
    if values is None:  # without the file transformers takes these from config.json
        values = {key: config.get(key) for key in ("bos_token_id", "pad_token_id")}
    values["eos_token_id"] = stop if len(stop) > 1 else stop[0]
    _write_json(path, values)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
