"""The shapes that follow from a config are those of the decoder itself."""

from typing import Any

import pytest
import torch

from dapo_async.model import Decoder, ModelConfig
from dapo_async.model import config as model_config
from dapo_async.model.layers import Block
from dapo_async.model.parameters import parameter_shapes

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 3,
    "moe_intermediate_size": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*model_config.FAMILIES])
def test_shapes_of_a_config_are_those_of_its_decoder_in_order(family: str, tied: bool) -> None:
    config = ModelConfig.from_dict(
        {**SIZES, "model_type": family, "tie_word_embeddings": tied},
    )
    assert [*parameter_shapes(config).items()] == shapes_of_decoder(config)


def test_a_family_with_a_layer_of_its_own_is_asked_for_its_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Scaled(Block):
        def __init__(self, config: ModelConfig, layer: int, tp: Any) -> None:
            super().__init__(config, layer, tp)
            self.scale = torch.nn.Parameter(torch.ones(3))

    monkeypatch.setitem(model_config.FAMILIES, "scaled", model_config.Family(block=Scaled))
    config = ModelConfig.from_dict({**SIZES, "model_type": "scaled"})
    shapes = parameter_shapes(config)
    assert shapes["model.layers.1.scale"] == (3,)
    assert [*shapes.items()] == shapes_of_decoder(config)


def shapes_of_decoder(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        state = Decoder(config).state_dict()
    return [(name, tuple(tensor.shape)) for name, tensor in state.items()]
