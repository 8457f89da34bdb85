"""The model of a plan, dense or a mixture of experts, from its `config.json`.

Sizes, FLOPs and memory are those of `dapo_async.model`. Mixtral, which the learner does not train,
counts as a Llama with Qwen3-MoE's experts in all layers. The cost model calls it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dapo_async.model.config import ModelConfig
from dapo_async.model.cost import weight_bytes
from dapo_async.model.parameters import parameter_shapes
from dapo_async.model.special_tokens import read_json

HALF = 2  # bytes of a bfloat16 number


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A dense model or a mixture."""

    config: ModelConfig

    @property
    def num_parameters(self) -> float:
        return sum(map(math.prod, parameter_shapes(self.config).values()))

    @property
    def weights_bytes(self) -> float:
        """All weights that an engine holds."""
        return HALF * self.num_parameters

    def read_bytes(self, batch: int) -> float:
        """The weights that a decode step with `batch` sequences reads.

        If tokens choose their experts independently, 1 − (1 − k / E)^batch of the experts.
        """
        config = self.config
        every = float(weight_bytes(config, num_bytes=HALF))
        if not config.mixture_layers:
            return every
        expert = 3 * config.hidden_size * config.expert_size
        unread = (1 - config.experts_per_token / config.num_experts) ** batch * config.num_experts
        return every - HALF * unread * len(config.mixture_layers) * expert


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
    if values.get("model_type") != "mixtral":
        return PlannedModel(ModelConfig.from_dict(values))
    inner = values.get("intermediate_size")
    as_qwen = {**values, "model_type": "qwen3_moe", "moe_intermediate_size": inner}
    return PlannedModel(replace(ModelConfig.from_dict(as_qwen), qk_norm=False))
