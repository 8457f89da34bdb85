"""The shape of a decoder, read from the Hugging Face `config.json`, and the supported families.

In: a model folder or the content of its `config.json`. Out: a `ModelConfig`. Every user of a model
starts here. A new family is one entry in `FAMILIES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dapo_async.model.mesh import Axis
from dapo_async.model.rotary import Rope

REMEDY = "copy the config.json of the base model"


@dataclass(frozen=True, slots=True)
class Family:
    """How the layers of one Hugging Face `model_type` differ from those of the other families.

    Embeddings, rotary tables and head are common to all families.
    """

    qkv_bias: bool = False  # the query, key and value projections have biases
    qk_norm: bool = False  # each head's query and key pass through an RMS norm
    # Switches of its config.json that would change the layer: a model that sets one is refused.
    refused: tuple[str, ...] = ("use_sliding_window", "mlp_bias", "attention_bias")
    # Builds a layer with another formula, from (config, layer number, tp axis). None: layers.Block.
    block: Callable[[ModelConfig, int, Axis], nn.Module] | None = None


FAMILIES = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True, refused=("use_sliding_window", "mlp_bias")),
    "qwen3": Family(qk_norm=True),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of one decoder."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope: Rope
    rms_norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]

    def check_split(self, tensor_parallel: int) -> None:
        """Raises ValueError if the layers cannot be split over `tensor_parallel` ranks.

        Attention heads and the MLP's inner size must divide evenly. Key-value heads divide evenly,
        or there are fewer heads than ranks and several ranks share one. The vocabulary may be split
        unevenly as long as every rank has a part.
        """
        if self._splits(tensor_parallel):
            return
        listed = ", ".join(f"{name} {size}" for name, size in self._split_sizes().items())
        candidates = range(1, self.num_heads + 1)
        works = ", ".join(str(size) for size in candidates if self._splits(size))
        raise ValueError(
            f"learner.tensor_parallel ({tensor_parallel}) must divide the model's {listed} "
            f"(num_key_value_heads may divide it instead); set it to one of {works}"
        )

    def _split_sizes(self) -> dict[str, int]:
        return {
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
        }

    def _splits(self, ranks: int) -> bool:
        layers = self.num_heads % ranks == self.intermediate_size % ranks == 0
        kv_heads = self.num_kv_heads % ranks == 0 or ranks % self.num_kv_heads == 0
        rows_per_rank = -(-self.vocab_size // ranks)
        last_rank_has_rows = (ranks - 1) * rows_per_rank < self.vocab_size
        return layers and kv_heads and last_rank_has_rows

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads `folder/config.json`.

        Raises ValueError with the file's name if it is missing, broken, or describes an unsupported
        architecture.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(
                f"model folder {folder} has no config.json; give a plain Hugging Face folder "
                "(config.json, *.safetensors, tokenizer.json)"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}); {REMEDY}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, not an object; {REMEDY}")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Builds the config from the content of a `config.json`.

        Raises ValueError for an unsupported architecture or switch, naming what is supported, and
        for a missing or wrong value, naming its key.
        """
        name = values.get("model_type", "")
        if name not in FAMILIES:
            supported = ", ".join(FAMILIES)
            raise ValueError(f"model_type {name!r} is not supported; supported are {supported}")
        family = FAMILIES[name]
        _check_switches(values, name, family)
        heads, hidden_size = _size(values, "num_attention_heads"), _size(values, "hidden_size")
        kv_heads = _size(values, "num_key_value_heads", default=heads)
        head_dim = _size(values, "head_dim", default=hidden_size // heads)
        if heads % kv_heads or head_dim % 2:
            raise ValueError(
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads "
                f"({kv_heads}) and head_dim ({head_dim}) must be even; {REMEDY}"
            )
        return cls(
            family=name,
            vocab_size=_size(values, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_size(values, "intermediate_size"),
            num_layers=_size(values, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=_size(values, "max_position_embeddings"),
            rope=Rope.from_dict(values),
            rms_norm_eps=_number(values, "rms_norm_eps"),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            eos_token_ids=_eos_token_ids(values),
        )


def _check_switches(values: Mapping[str, Any], name: str, family: Family) -> None:
    for switch in family.refused:
        if values.get(switch):
            raise ValueError(
                f"{switch}: {values[switch]!r} is not supported for {name}; use a model without it"
            )
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act {activation!r} is not supported; supported is silu")


def _eos_token_ids(values: Mapping[str, Any]) -> tuple[int, ...]:
    eos = values.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ValueError(f"eos_token_id ({eos!r}) must be a token id or a list of ids; {REMEDY}")
    return tuple(ids)


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if not isinstance(value, int | float) or not value > 0:
        given = "missing" if value is None else repr(value)
        raise ValueError(f"{key} ({given}) must be a positive number; {REMEDY}")
    return value


def _size(values: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    """A whole number of at least 1, or `default` if the key is missing or null."""
    value = values.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or value < 1:
        given = "missing" if value is None else repr(value)
        raise ValueError(f"{key} ({given}) must be a whole number of at least 1; {REMEDY}")
    return value
