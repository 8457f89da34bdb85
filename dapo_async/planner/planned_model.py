"""The model of a plan, dense or a mixture of experts, from its `config.json`.

In a mixture a token uses `num_experts_per_tok` experts. For its FLOPs it is a dense model with that
many times the inner size of an expert. The cost model calls it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_async.model.config import ModelConfig
from dapo_async.model.cost import weight_bytes
from dapo_async.model.parameters import parameter_shapes
from dapo_async.model.special_tokens import read_json

HALF = 2  # bytes of a bfloat16 number
MIXTURES = {"qwen3_moe": "qwen3", "mixtral": "llama"}  # and the family of their attention


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A dense model, or what one token of a mixture of experts uses."""

    used: ModelConfig  # of a mixture: with the inner size of the experts that a token uses
    num_experts: int = 1
    experts_per_token: int = 1

    @property
    def expert_parameters(self) -> float:
        """One expert of one layer."""
        inner = self.used.intermediate_size / self.experts_per_token
        return 3 * self.used.hidden_size * inner

    @property
    def unused_parameters(self) -> float:
        """The experts that a token does not use, over all layers."""
        unused = self.num_experts - self.experts_per_token
        return unused * self.used.num_layers * self.expert_parameters

    @property
    def num_parameters(self) -> float:
        return sum(map(math.prod, parameter_shapes(self.used).values())) + self.unused_parameters

    @property
    def weights_bytes(self) -> float:
        """All weights that an engine holds."""
        return HALF * self.num_parameters

    def read_bytes(self, batch: int) -> float:
        """The weights that a decode step with `batch` sequences reads.

        If tokens choose their experts independently, 1 − (1 − k / E)^batch of the experts.
        """
        share = self.experts_per_token / self.num_experts
        chosen = self.num_experts * (1 - (1 - share) ** batch)
        extra = max(0.0, chosen - self.experts_per_token) * self.used.num_layers
        return weight_bytes(self.used, num_bytes=HALF) + HALF * extra * self.expert_parameters


def read_model(path: Path) -> PlannedModel:
    """The model of a folder or of a `config.json`. Raises ValueError for another form."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"model.path ({path}) has no config.json; give a model folder or the file")
    try:
        return model_of(read_json(file, "give the config.json of a Hugging Face model"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def model_of(values: Mapping[str, Any]) -> PlannedModel:
    """The model of the content of a `config.json`, dense or a mixture of experts."""
    family = MIXTURES.get(str(values.get("model_type")))
    if family is None:
        return PlannedModel(ModelConfig.from_dict(values))
    experts: Any = values.get("num_experts", values.get("num_local_experts"))
    chosen: Any = values.get("num_experts_per_tok")
    inner: Any = values.get("moe_intermediate_size", values.get("intermediate_size"))
    sizes = (experts, chosen, inner)
    if not all(isinstance(size, int) and size > 0 for size in sizes) or experts < chosen:
        raise ValueError(
            f"num_experts, num_experts_per_tok and moe_intermediate_size {sizes} must be whole "
            "numbers above 0; copy the config.json of the base model"
        )
    if values.get("decoder_sparse_step", 1) != 1 or values.get("mlp_only_layers"):
        raise ValueError(
            "layers without experts are not supported; use a model with experts in all"
        )
    dense = {**values, "model_type": family, "intermediate_size": chosen * inner}
    return PlannedModel(ModelConfig.from_dict(dense), experts, chosen)
