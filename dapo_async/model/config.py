"""The shape of a decoder, read from a Hugging Face `config.json`: Qwen2/Qwen2.5, Qwen3 and Llama families."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED_FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of one decoder; the families differ in `qkv_bias` and `qk_norm` only."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads `folder/config.json`. Raises ValueError for a missing file or an unsupported architecture."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(
                f"model folder {folder} has no config.json; give a plain Hugging Face folder (config.json, *.safetensors, tokenizer.json)"
            )
        return cls.from_dict(json.loads(path.read_text()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From the content of a `config.json`. Raises ValueError naming what is supported."""
        family = values.get("model_type", "")
        if family not in SUPPORTED_FAMILIES:
            raise ValueError(f"model_type {family!r} is not supported; supported are {', '.join(SUPPORTED_FAMILIES)}")
        rope = values.get("rope_parameters") or {}
        scaling = rope.get("rope_type") or (values.get("rope_scaling") or {}).get("rope_type", "default")
        if scaling != "default":
            raise ValueError(f"rope scaling {scaling!r} is not supported yet; use a model with default rotary embeddings")
        for switch in ("use_sliding_window", "mlp_bias"):
            if values.get(switch):
                raise ValueError(f"{switch}: true is not supported; use a model without it")
        if values.get("attention_bias") and family != "qwen2":
            raise ValueError(f"attention_bias: true is not supported for {family}; use a model without it")
        if values.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {values['hidden_act']!r} is not supported; supported is silu")
        eos = values.get("eos_token_id")
        heads = values["num_attention_heads"]
        return cls(
            family=family,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            max_positions=values["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0),
            rms_norm_eps=values["rms_norm_eps"],
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )
