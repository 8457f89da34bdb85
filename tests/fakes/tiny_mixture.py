"""A tiny Qwen3-MoE of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "eos_token_id": 3,
    "moe_intermediate_size": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
}


def hugging_face(folder: Path, *, stacked: bool = False, **changed: Any) -> Any:
    """A model with large weights: its routers are decided, and logits differ."""
    torch.manual_seed(1)
    config = Qwen3MoeConfig(**{**SIZES, **changed})
    config._experts_implementation = "eager"
    make: Any = AutoModelForCausalLM.from_config
    model = make(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_original_format=not stacked)
    return model
