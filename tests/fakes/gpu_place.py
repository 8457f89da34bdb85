"""Where the tests marked `gpu` run, and how large their models are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dapo_async.model import Decoder, ModelConfig


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tests run, and how large their models are."""

    device: str
    sizes: dict[str, Any]  # of a Hugging Face config, without its family
    length: int  # of the longest sequence

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def half(self) -> torch.dtype:
        """The dtype of activations."""
        return torch.bfloat16

    def decoder(self, family: str = "qwen3", *, seed: int = 1) -> Decoder:
        """Random float32 weights on the device; the tokens' distributions are not near uniform."""
        torch.manual_seed(seed)
        tied = {"tie_word_embeddings": family == "qwen2"}
        config = ModelConfig.from_dict({**self.sizes, **tied, "model_type": family})
        decoder = Decoder(config)
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=2.0 * parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return decoder.to(self.device)


SMALL = Place(
    "cpu",
    {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
    },
    length=24,
)
LARGE = Place(
    "cuda",
    {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
    },
    length=700,
)


def distance(values: Tensor, expected: Tensor) -> float:
    """‖values − expected‖ / ‖expected‖."""
    values, expected = values.double().cpu(), expected.double().cpu()
    return float((values - expected).norm() / expected.norm())
