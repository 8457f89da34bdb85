"""Which files of a folder are the model, and which tensor is where.

In: a model folder and its config. Out: the place of every parameter. The learner, the native
engine, SGLang, evaluation and the checks at the start all use this one answer.

`model.safetensors.index.json` names the files; without it `model.safetensors` is the model. Every
other file is left alone: adapters, value heads, `consolidated.safetensors`, shards of an older
save, pickles, optimizer states.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from dapo_async.model.config import ModelConfig
from dapo_async.model.expert_names import DOWN, GATE_UP, folder_shapes, pieces
from dapo_async.model.parameters import Shape
from dapo_async.model.special_tokens import read_json

if TYPE_CHECKING:  # preflight finds the weights without torch
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that old checkpoints hold. The rotary tables follow from the config.
BUFFER = re.compile(r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
PARAMETER_PREFIXES = ("model.", "lm_head.")
COPY = "copy the safetensors files and their index from one model"
LFS = b"version https://git-lfs"
LISTED = 3  # names in a message


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    path: Path
    name: str  # in the file
    shape: Shape
    dtype: str  # as safetensors names it: F32, BF16, …
    # Of experts that a file holds in one tensor: the expert, and the first of its rows there.
    within: tuple[int, int] | None = None

    def read(self) -> Tensor:
        """The whole tensor, on CPU."""
        with safe_open(self.path, framework="pt") as file:
            return self.part(file, tuple(slice(0, size) for size in self.shape))

    def part(self, file: Any, place: tuple[slice, ...]) -> Tensor:
        """The part at `place`, from the opened file."""
        stored, (rows, *columns) = file.get_slice(self.name), place
        if self.within is not None:
            expert, first = self.within
            inside = slice(first + rows.start, first + rows.stop)
            tensor: Tensor = stored[(expert, inside, *columns)]
        else:
            tensor = stored[place]
        return tensor


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of a model, the place of each parameter, and what else was found."""

    paths: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]  # by the name of the parameter, experts one by one
    left_alone: tuple[str, ...]  # further safetensors files of the folder
    unused: tuple[str, ...]  # tensors of the files that are no part of the decoder

    @property
    def moved(self) -> tuple[str, ...]:
        """Parameters that a file holds under another name.

        That is a tied embedding stored as the head, or all experts of a layer in one tensor.
        """
        return tuple(name for name, stored in self.tensors.items() if stored.name != name)

    @property
    def misread_by_sglang(self) -> tuple[str, ...]:
        """Files and tensors that SGLang would read otherwise from the same folder.

        Without an index it reads every safetensors file of a folder, and it does not take a tied
        embedding from `lm_head.weight`, or experts that are stored in one tensor.
        """
        has_index = (self.paths[0].parent / INDEX_FILE).is_file()
        return (*(() if has_index else self.left_alone), *self.moved)

    @property
    def summary(self) -> str:
        """The files with their dtypes, and what is left alone."""
        dtypes = "/".join(sorted({tensor.dtype for tensor in self.tensors.values()}))
        names = [path.name for path in self.paths]
        line = f"{dtypes} weights in {_listed(names)}"
        if self.left_alone:
            line += f"; no part of the model: {_listed(self.left_alone)}"
        if self.unused:
            line += f"; tensors that the model does not have: {_listed(self.unused)}"
        return line


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the model's files, on CPU, in their own dtype. Raises as `weight_paths`."""
    stored = [each for path in weight_paths(folder) for each in _headers(path)]
    return {each.name: each.read() for each in stored}


def weight_paths(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of the model in `folder`, sorted.

    Raises ValueError, with the file's name, for a broken index, for a file that the index names and
    the folder lacks, and for a folder without weights.
    """
    folder = Path(folder)
    names = weight_names(folder)
    if not (folder / INDEX_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(_no_weights(folder))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"model folder {folder} lacks {_listed(missing)} of the {len(names)} files that "
            f"{INDEX_FILE} names; copy the file from the base model, or its index with all files"
        )
    return tuple(folder / name for name in names)


def weight_names(folder: Path) -> list[str]:
    """The names of the model's safetensors files, which may be missing still, sorted.

    Raises ValueError for a broken index.
    """
    index = folder / INDEX_FILE
    return sorted(set(_weight_map(index).values())) if index.is_file() else [WEIGHTS_FILE]


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by the index."""
    places = read_json(index, COPY).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map with names of files; {COPY}")
    for tensor, name in places.items():
        if not isinstance(name, str) or name != os.path.basename(name) or not name.strip("."):
            raise ValueError(
                f"{index} places {tensor} in {name!r}, which is no file of the folder; {COPY}"
            )
        if not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} places {tensor} in {name}, which is no safetensors file; pickled weights "
                "are never loaded, so convert them to safetensors first"
            )
    return places


def _no_weights(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in others):
        return (
            f"model folder {folder} has {_listed(others)} but no {INDEX_FILE}, which says which "
            "files are the model; copy it from the base model"
        )
    if others:
        return (
            f"model folder {folder} has {_listed(others)} but neither {WEIGHTS_FILE} nor "
            f"{INDEX_FILE}, which names further files; give the folder of a whole model"
        )
    return (
        f"model folder {folder} has no *.safetensors file; pickled weights are never loaded, "
        "so convert them to safetensors first"
    )


def find_weights(folder: Path, config: ModelConfig) -> WeightFiles:
    """Finds every parameter of the config's decoder in the files of `folder`.

    Reads the files' headers, and the content of tensors that are there twice. Raises ValueError,
    with names of files and tensors, when the files do not fit the config or each other.
    """
    folder = Path(folder)
    paths = weight_paths(folder)
    tensors = dict[str, StoredTensor]()
    for path in paths:
        for stored in _headers(path):
            earlier = tensors.setdefault(stored.name, stored)
            if earlier is not stored and not _equal(earlier, stored):
                raise ValueError(
                    f"{path} and {earlier.path.name} both hold {stored.name}, with other values; "
                    f"{COPY}"
                )
    if config.tie_embeddings:
        _resolve_tied_head(tensors, folder)
    shapes = folder_shapes(config)
    _take_apart(tensors, config)
    _check_names(tensors, shapes, folder)
    _check_form(tensors, shapes, folder)
    unused = [
        name for name in tensors if name not in shapes and name != HEAD and not BUFFER.search(name)
    ]
    others = {path.name for path in folder.glob("*.safetensors")} - {path.name for path in paths}
    kept = {name: tensors[name] for name in shapes}
    return WeightFiles(paths, kept, tuple(sorted(others)), tuple(unused))


def _headers(path: Path) -> Iterator[StoredTensor]:
    """Name, shape and dtype of each tensor of a file."""
    try:
        with safe_open(path, framework="np") as file:  # torch is not needed for the headers
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(name)
                yield StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError) as error:
        remedy = "copy it again from the base model"
        with path.open("rb") as content:
            if content.read(len(LFS)) == LFS:
                remedy = "it is a pointer of Git LFS: fetch the file with `git lfs pull`"
        raise ValueError(f"{path} is no readable safetensors file ({error}); {remedy}") from error


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    if first.shape != second.shape:
        return False
    values = first.read()
    return values.equal(second.read().to(values.dtype))


def _resolve_tied_head(tensors: dict[str, StoredTensor], folder: Path) -> None:
    """A tied head may be stored beside the embedding, or instead of it, as in transformers."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None:
        return
    if embedding is None:
        tensors[EMBEDDING] = tensors.pop(HEAD)
    elif not _equal(head, embedding):
        raise ValueError(
            f"{folder / 'config.json'} ties lm_head to the embedding (tie_word_embeddings true), "
            f"but {HEAD} in {head.path.name} differs from {EMBEDDING} in {embedding.path.name}; "
            "set tie_word_embeddings to false"
        )


def _take_apart(tensors: dict[str, StoredTensor], config: ModelConfig) -> None:
    """Replaces a tensor with all experts of a layer by its experts.

    transformers 5 writes such tensors, `[E, 2I, D]` and `[E, D, I]`, with
    `save_pretrained(save_original_format=False)`. A tensor of another shape stays, as unexpected.
    """
    hidden, inner, experts = config.hidden_size, config.expert_size, config.num_experts
    for suffix, rows, columns in ((GATE_UP, 2 * inner, hidden), (DOWN, hidden, inner)):
        for name in [name for name in tensors if name.endswith(suffix)]:
            stored = tensors[name]
            if stored.shape != (experts, rows, columns):
                continue
            del tensors[name]
            for piece in pieces(name, (experts * rows, columns), config):
                within = divmod(piece.first_row, rows)
                tensors[piece.name] = replace(stored, shape=piece.shape, within=within)


def _check_names(
    tensors: Mapping[str, StoredTensor], shapes: Mapping[str, Shape], folder: Path
) -> None:
    missing = [name for name in shapes if name not in tensors]
    tied = HEAD not in shapes
    unexpected = [
        name
        for name in tensors
        if name not in shapes
        and name.startswith(PARAMETER_PREFIXES)
        and not BUFFER.search(name)
        and not (tied and name == HEAD)
    ]
    if not missing and not unexpected:
        return
    problems = {"missing": sorted(missing), "unexpected": sorted(unexpected)}
    listed = ", ".join(f"{what} {names[:LISTED]}" for what, names in problems.items() if names)
    remedy = "take both from one model"
    if missing == [HEAD]:
        remedy = "set tie_word_embeddings to true if the model has no head of its own"
    raise ValueError(
        f"weights of {folder} do not fit their config.json: {listed}"
        f"{_places(missing, folder)}; {remedy}"
    )


def _places(missing: Sequence[str], folder: Path) -> str:
    """The files that should hold the missing tensors, where an index names them."""
    if not (folder / INDEX_FILE).is_file():
        return ""
    places = _weight_map(folder / INDEX_FILE)
    files = sorted({places[name] for name in missing if name in places})
    if not files:
        return f" ({INDEX_FILE} does not name them)" if missing else ""
    return f" ({INDEX_FILE} places them in {_listed(files)}, which lacks them)"


def _check_form(
    tensors: Mapping[str, StoredTensor], shapes: Mapping[str, Shape], folder: Path
) -> None:
    """Shapes and dtypes."""
    wrong = [
        f"{name} {tensors[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"weights of {folder} do not fit their config.json: of another shape "
            f"{wrong[:LISTED]}; take both from one model"
        )
    for name in shapes:
        if tensors[name].dtype not in FLOATS:
            raise ValueError(
                f"{tensors[name].path} holds {name} as {tensors[name].dtype}; only plain weights "
                f"({', '.join(FLOATS)}) can be trained: use the model's unquantised safetensors"
            )


def folder_for_sglang(folder: Path, config: ModelConfig, *, scratch: Path) -> Path:
    """A folder from which SGLang reads the same weights as this package.

    Where it would misread `folder`, `scratch` becomes a folder of links to the files of the model;
    otherwise the result is `folder`. Raises ValueError as `find_weights`.
    """
    found = find_weights(folder, config)
    if not found.misread_by_sglang:
        return folder
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name not in (*found.left_alone, INDEX_FILE):
            (scratch / path.name).symlink_to(path.resolve())
    if found.moved:
        from safetensors.torch import save_file

        weights = {name: found.tensors[name].read().contiguous() for name in found.moved}
        save_file(weights, scratch / "model-embedding.safetensors", metadata={"format": "pt"})
    return scratch


def _listed(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
