"""Logprobs and gradients of tiny random models of each family, against transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dapo_async.model import (
    Decoder,
    ModelConfig,
    PackedAttention,
    export_folder,
    load_decoder,
    token_logprobs,
)
from dapo_async.model import config as model_config
from dapo_async.model.config import Family
from dapo_async.model.layers import Attention, Block

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "eos_token_id": 3,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=False),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
}


def hugging_face(family: str, folder: Path) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    # Moves every norm and bias away from its neutral value, so that a missing one shows.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def oracle_logprobs(model: Any, sequences: Sequence[Tensor], temperature: float) -> Tensor:
    logprobs = []
    for ids in sequences:
        logits = model(ids[None]).logits[0, :-1].float() / temperature
        logprobs.append(logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1))
    return torch.cat(logprobs)


def own_logprobs(
    decoder: Decoder, sequences: Sequence[Tensor], temperature: float, chunk_tokens: int = 1024
) -> tuple[Tensor, Tensor]:
    attention = PackedAttention([len(ids) for ids in sequences])
    hidden = decoder(torch.cat([*sequences]), attention.positions, attention)
    keep = torch.cat([torch.arange(len(ids)) < len(ids) - 1 for ids in sequences])
    targets = torch.cat([ids[1:] for ids in sequences])
    return token_logprobs(
        hidden[keep],
        decoder.head_weight,
        targets,
        torch.full(targets.shape, temperature),
        chunk_tokens=chunk_tokens,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk_tokens", [1024, 5])
def test_packed_logprobs_and_gradients_equal_transformers(
    family: str, chunk_tokens: int, tmp_path: Path, seeded: torch.Generator
) -> None:
    model = hugging_face(family, tmp_path)
    decoder = load_decoder(tmp_path)
    sequences = [
        torch.randint(0, 61, (length,), generator=seeded) for length in (4, 7, 7, 7, 2, 11)
    ]
    expected = oracle_logprobs(model, sequences, 0.7)
    logprobs, _ = own_logprobs(decoder, sequences, 0.7, chunk_tokens)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    weights = torch.randn(expected.shape, generator=seeded)
    (expected * weights).sum().backward()
    (logprobs * weights).sum().backward()
    gradients = dict(model.named_parameters())
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-4, msg=name
        )


def test_entropy_is_that_of_the_tempered_distribution(
    tmp_path: Path, seeded: torch.Generator
) -> None:
    model = hugging_face("qwen3", tmp_path)
    ids = torch.randint(0, 61, (9,), generator=seeded)
    _, entropies = own_logprobs(load_decoder(tmp_path), [ids], 0.7)
    expected = torch.distributions.Categorical(
        logits=model(ids[None]).logits[0, :-1] / 0.7
    ).entropy()
    torch.testing.assert_close(entropies, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("file_bytes", [2**30, 3000])  # one file, and many with an index
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_folder_loads_in_transformers_with_equal_logits(
    family: str, file_bytes: int, tmp_path: Path, seeded: torch.Generator
) -> None:
    hugging_face(family, tmp_path / "base")
    decoder = load_decoder(tmp_path / "base")
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.1)
    weights = decoder.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    asked: list[list[str]] = []

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        asked.append(list(names))
        return {name: weights[name] for name in names}

    export_folder(
        shapes,
        read,
        dtype=torch.float32,
        base=tmp_path / "base",
        out=tmp_path / "out",
        file_bytes=file_bytes,
    )
    assert [name for names in asked for name in names] == list(weights)
    assert all(
        len(names) == 1 or sum(weights[name].nbytes for name in names) <= file_bytes
        for names in asked
    )
    assert (
        (tmp_path / "out" / "model.safetensors").exists() == (len(asked) == 1) == (file_bytes > 1e6)
    )
    ids = torch.randint(0, 61, (9,), generator=seeded)
    attention = PackedAttention([9])
    own = decoder.logits(decoder(ids, attention.positions, attention))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids[None]).logits[0]
    torch.testing.assert_close(own, theirs, atol=1e-5, rtol=0)


SCALINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 2.0}),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "yarn": ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    "yarn with its numbers": (
        "qwen3",
        {
            "rope_type": "yarn",
            "factor": 3.0,
            "original_max_position_embeddings": 20,
            "beta_fast": 8,
            "beta_slow": 2,
            "attention_factor": 1.3,
            "truncate": False,
        },
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_rotary_embeddings_equal_transformers_beyond_the_original_context(
    name: str, tmp_path: Path, seeded: torch.Generator
) -> None:
    family, parameters = SCALINGS[name]
    kind: Any = type(FAMILIES[family])
    config = kind(**SIZES, rope_parameters={"rope_theta": 500.0, **parameters})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 61, (60,), generator=seeded)
    decoder = load_decoder(tmp_path)
    torch.testing.assert_close(
        own_logprobs(decoder, [ids], 1.0)[0], oracle_logprobs(model, [ids], 1.0), atol=1e-5, rtol=0
    )
    ((inverse, magnitude), (cos, _)) = (
        (model.model.rotary_emb.inv_freq, model.model.rotary_emb.attention_scaling),
        decoder.config.rope.tables(8, 2),
    )
    torch.testing.assert_close(decoder.config.rope.frequencies(8), inverse, atol=0, rtol=1e-6)
    assert float(cos[0, 0, 0]) == pytest.approx(magnitude)
    values = json.loads((tmp_path / "config.json").read_text())
    old = {**values, "rope_theta": 500.0, "rope_scaling": parameters}  # as transformers 4 wrote it
    del old["rope_parameters"]
    assert ModelConfig.from_dict(old).rope == decoder.config.rope


@pytest.mark.parametrize(
    ("rope", "line"),
    [
        (
            {"rope_type": "longrope"},
            "rope scaling 'longrope' is not supported; supported are default, linear, llama3, yarn",
        ),
        ({"rope_type": "yarn"}, "factor (missing) must be a positive number"),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1},
            "low_freq_factor (4) must be below high_freq_factor (1)",
        ),
        ({"rope_type": "yarn", "factor": 4, "mscale": 1.0}, "yarn with mscale is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor (0.5) is not supported"),
    ],
)
def test_unsupported_rotary_embeddings_are_refused_in_one_line(
    rope: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        ModelConfig.from_dict({**FAMILIES["llama"].to_dict(), "rope_parameters": rope})


class Halved(Block):
    """Granite's layer: half of what it computes is added."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        x = x + 0.5 * self.self_attn(self.input_layernorm(x), cos, sin, attention)
        y: Tensor = x + 0.5 * self.mlp(self.post_attention_layernorm(x))
        return y


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (MistralConfig(**SIZES, sliding_window=None), Family(refused=("sliding_window",))),
        (
            GraniteConfig(**SIZES, residual_multiplier=0.5, attention_multiplier=8**-0.5),
            Family(block=Halved),
        ),
    ],
    ids=["as Llama", "a layer of its own"],
)
def test_a_new_family_is_an_entry_with_its_own_layer_class_if_needed(
    config: PreTrainedConfig,
    family: Family,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seeded: torch.Generator,
) -> None:
    monkeypatch.setitem(model_config.FAMILIES, config.model_type, family)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 61, (20,), generator=seeded)
    decoder, expected = load_decoder(tmp_path), oracle_logprobs(model, [ids], 1.0)
    torch.testing.assert_close(own_logprobs(decoder, [ids], 1.0)[0], expected, atol=1e-5, rtol=0)
    decoder.requires_grad_(False).fuse()
    torch.testing.assert_close(own_logprobs(decoder, [ids], 1.0)[0], expected, atol=1e-5, rtol=0)


def test_unknown_architecture_names_what_is_supported() -> None:
    with pytest.raises(
        ValueError, match="'gpt2' is not supported; supported are llama, qwen2, qwen3"
    ):
        ModelConfig.from_dict({"model_type": "gpt2"})


def test_weights_that_do_not_fit_their_config_are_named(tmp_path: Path) -> None:
    hugging_face("llama", tmp_path)
    config = (
        (tmp_path / "config.json")
        .read_text()
        .replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"missing \['model.layers.2.input_layernorm.weight'"):
        load_decoder(tmp_path)
