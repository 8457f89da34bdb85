"""The shape of a decoder, read from the Hugging Face `config.json` of one of the supported families (families.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_async.model.families import FAMILIES
from dapo_async.model.rotary import Rope


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
        """Raises ValueError where the layers do not split over so many ranks; the vocabulary does as long as each has a share.

        Heads of keys and values are split, or, where there are fewer of them than ranks, whole on each.
        """
        listed = ", ".join(f"{name} {size}" for name, size in self._split_sizes().items())
        if not self._splits(tensor_parallel):
            works = ", ".join(
                str(size) for size in range(1, self.num_heads + 1) if self._splits(size)
            )
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
        kv_heads = self.num_kv_heads % ranks == 0 or ranks % self.num_kv_heads == 0
        vocabulary = (ranks - 1) * -(
            -self.vocab_size // ranks
        ) < self.vocab_size  # every rank has a share
        return (
            self.num_heads % ranks == self.intermediate_size % ranks == 0
            and kv_heads
            and vocabulary
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads `folder/config.json`. Raises ValueError, naming the file, for one that is missing or broken and for an unsupported architecture."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(
                f"model folder {folder} has no config.json; give a plain Hugging Face folder (config.json, *.safetensors, tokenizer.json)"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is not valid JSON ({error}); copy the config.json of the base model"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(
                f"{path} holds a {type(values).__name__}, not an object; copy the config.json of the base model"
            )
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From the content of a `config.json`. Raises ValueError naming what is supported, or the key that is missing or no number."""
        family = values.get("model_type", "")
        if family not in FAMILIES:
            raise ValueError(
                f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}"
            )
        known = FAMILIES[family]
        for switch in known.refused:
            if values.get(switch):
                raise ValueError(
                    f"{switch}: {values[switch]!r} is not supported for {family}; use a model without it"
                )
        if values.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"hidden_act {values['hidden_act']!r} is not supported; supported is silu"
            )
        heads, hidden_size = _size(values, "num_attention_heads"), _size(values, "hidden_size")
        kv_heads = _size(values, "num_key_value_heads", default=heads)
        head_dim = _size(values, "head_dim", default=hidden_size // heads)
        if heads % kv_heads or head_dim % 2:
            raise ValueError(
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads}) and head_dim ({head_dim}) even; "
                "copy the config.json of the base model"
            )
        eos = values.get("eos_token_id")
        eos_token_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(isinstance(token_id, int) for token_id in eos_token_ids):
            raise ValueError(
                f"eos_token_id ({eos!r}) must be a token's number or a list of such; copy the config.json of the base model"
            )
        return cls(
            family=family,
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
            qkv_bias=known.qkv_bias,
            qk_norm=known.qk_norm,
            eos_token_ids=tuple(eos_token_ids),
        )


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if not isinstance(value, int | float) or not value > 0:
        raise ValueError(
            f"{key} ({'missing' if value is None else repr(value)}) must be a positive number; copy the config.json of the base model"
        )
    return value


def _size(values: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    """A whole number of at least 1; where the key is missing or null, the default."""
    value = values.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or value < 1:
        given = "missing" if value is None else repr(value)
        raise ValueError(
            f"{key} ({given}) must be a whole number of at least 1; copy the config.json of the base model"
        )
    return value
