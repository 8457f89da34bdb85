"""Names of experts: stacked in the decoder, one by one in folders, on engines and in manifests.

    decoder                                    folder and engines
    mlp.experts.gate_up_proj [E · 2I, D]       mlp.experts.0.gate_proj.weight [I, D]
                                               mlp.experts.0.up_proj.weight [I, D]     …
    mlp.experts.down_proj [E · D, I]           mlp.experts.0.down_proj.weight [D, I]   …

Every other parameter has one name everywhere. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapo_async.model.config import ModelConfig
from dapo_async.model.parameters import Shape, parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

GATE_UP, DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a folder as rows of a parameter of the decoder."""

    name: str  # in the folder
    first_row: int  # in the parameter
    shape: Shape

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.shape[0])


def pieces(name: str, shape: Shape, config: ModelConfig) -> Iterator[Piece]:
    """The tensors of a folder that the parameter `name` of this whole shape consists of."""
    stem, _, part = name.rpartition(".")
    if not name.endswith((GATE_UP, DOWN)):
        yield Piece(name, 0, shape)
        return
    modules = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    rows = shape[0] // config.num_experts // len(modules)
    for number in range(config.num_experts * len(modules)):
        expert, module = divmod(number, len(modules))
        piece = f"{stem}.{expert}.{modules[module]}.weight"
        yield Piece(piece, number * rows, (rows, *shape[1:]))


def folder_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The shape of each tensor of a Hugging Face folder, by name."""
    return {
        piece.name: piece.shape
        for name, shape in parameter_shapes(config).items()
        for piece in pieces(name, shape, config)
    }


def one_by_one(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Whole weights of a decoder under the names of folders and engines, as views."""
    if not config.num_experts:
        return dict(weights)
    return {
        piece.name: tensor[piece.rows]
        for name, tensor in weights.items()
        for piece in pieces(name, tuple(tensor.shape), config)
    }
