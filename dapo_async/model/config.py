"""The shape of a decoder, read from the Hugging Face `config.json`, and the supported families.

In: a model folder or the content of its `config.json`. Out: a `ModelConfig`. Every user of a model
starts here. A new family is one entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dapo_async.model.rotary import Rope
from dapo_async.model.special_tokens import (
    CONFIG,
    SpecialTokens,
    read_json,
    read_special_tokens,
    token_ids,
)

if TYPE_CHECKING:  # preflight reads a config without torch
    from torch import nn

    from dapo_async.model.mesh import Axis

REMEDY = "copy the config.json of the base model"
# Far beyond any model; larger sizes would fill the memory before the weights are compared.
MOST, MOST_LAYERS = 2**27, 4096


@dataclass(frozen=True, slots=True)
class Family:
    """How the layers of one Hugging Face `model_type` differ from those of the other families.

    Embeddings, rotary tables and head are common to all families.
    """

    qkv_bias: bool = False  # the query, key and value projections have biases
    qk_norm: bool = False  # each head's query and key pass through an RMS norm
    # Switches of its config.json that would change the layer: a model that sets one is refused.
    refused: tuple[str, ...] = ("mlp_bias", "attention_bias")
    # What transformers and SGLang assume where config.json lacks the key.
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    mixture: bool = False  # layers have experts in the place of the MLP, see `mixture.py`
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    # Builds a layer with another formula, from (config, layer number, tp axis). None: layers.Block.
    block: Callable[[ModelConfig, int, Axis], nn.Module] | None = None


FAMILIES = {
    "llama": Family(eos_token_id=2, bos_token_id=1),
    "qwen2": Family(qkv_bias=True, refused=("mlp_bias",)),
    "qwen3": Family(qk_norm=True, head_dim=128),
    "qwen3_moe": Family(qk_norm=True, mixture=True),
}
# Sections of a config.json for weights in another form, or for weights in another file.
FOREIGN_WEIGHTS = ("quantization_config", "compression_config", "transformers_weights")
FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")


# What the backward pass of a layer computes again: nothing, its MLP, or all of it.
Recompute = Literal["none", "mlp", "all"]


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
    # Of a mixture of experts; a dense model has none.
    num_experts: int = 0  # per layer that has experts
    experts_per_token: int = 0
    expert_size: int = 0  # the inner size of an expert
    norm_topk: bool = False  # the weights of a token's experts add up to 1
    mixture_layers: tuple[int, ...] = ()  # the layers that have experts

    @property
    def num_dense_layers(self) -> int:
        return self.num_layers - len(self.mixture_layers)

    def check_split(self, tensor_parallel: int) -> None:
        """Raises ValueError if the layers cannot be split over `tensor_parallel` ranks.

        Attention heads, the MLP's inner size and experts must divide evenly. Key-value heads divide
        evenly, or there are fewer heads than ranks and several ranks share one. The vocabulary may
        be split unevenly as long as every rank has a part.
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
        sizes = {
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
        }
        if self.num_dense_layers:
            sizes["intermediate_size"] = self.intermediate_size
        if self.mixture_layers:
            sizes["num_experts"] = self.num_experts
        return sizes

    def _splits(self, ranks: int) -> bool:
        even = {**self._split_sizes(), "num_key_value_heads": 0}
        layers = all(size % ranks == 0 for size in even.values())
        kv_heads = self.num_kv_heads % ranks == 0 or ranks % self.num_kv_heads == 0
        rows_per_rank = -(-self.vocab_size // ranks)
        last_rank_has_rows = (ranks - 1) * rows_per_rank < self.vocab_size
        return layers and kv_heads and last_rank_has_rows

    @classmethod
    def from_folder(cls, folder: Path, *, tokenizer: Path | None = None) -> ModelConfig:
        """Reads `folder/config.json`, and the stop tokens of all files that name them.

        `tokenizer` is the folder of the tokenizer, None for the same. Raises ValueError with the
        file's name if a file is missing, broken, or describes an unsupported architecture.
        """
        path = Path(folder) / CONFIG
        values = _config_json(Path(folder))
        try:
            config = cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return replace(config, eos_token_ids=tuple(special_tokens(folder, tokenizer).stop))

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
        _check_weights_form(values)
        heads, hidden_size = _size(values, "num_attention_heads"), _size(values, "hidden_size")
        kv_heads = _size(values, "num_key_value_heads", default=heads)
        by_family = family.head_dim if "head_dim" not in values else None
        head_dim = _size(values, "head_dim", default=by_family or hidden_size // heads)
        if heads % kv_heads or head_dim % 2:
            raise ValueError(
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads "
                f"({kv_heads}) and head_dim ({head_dim}) must be even; {REMEDY}"
            )
        vocab_size = _size(values, "vocab_size")
        num_layers = _size(values, "num_hidden_layers", most=MOST_LAYERS)
        _check_layer_types(values, num_layers)
        eos = values.get("eos_token_id", family.eos_token_id)
        return cls(
            family=name,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_size(values, "intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=_size(values, "max_position_embeddings"),
            rope=Rope.from_dict(values),
            rms_norm_eps=_number(values, "rms_norm_eps"),
            tie_embeddings=_flag(values, "tie_word_embeddings"),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            eos_token_ids=token_ids(eos, key="eos_token_id", vocab_size=vocab_size),
            **(_experts(values, num_layers) if family.mixture else {}),
        )


def _experts(values: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The fields of a mixture of experts."""
    # transformers 5 writes num_experts under another name.
    key = "num_experts" if "num_experts" in values else "num_local_experts"
    num_experts, top_k = _size(values, key), _size(values, "num_experts_per_tok")
    if top_k > num_experts:
        raise ValueError(
            f"num_experts_per_tok ({top_k}) must be at most {key} ({num_experts}); {REMEDY}"
        )
    step, dense = _size(values, "decoder_sparse_step", default=1), values.get("mlp_only_layers")
    if dense is not None and not (
        isinstance(dense, list) and all(type(layer) is int and layer >= 0 for layer in dense)
    ):
        raise ValueError(f"mlp_only_layers ({dense!r}) must be a list of layer numbers; {REMEDY}")
    every = set(range(step - 1, num_layers, step))
    layers = sorted(every - set(dense or ()))
    if not layers:
        raise ValueError(
            f"no layer has experts (decoder_sparse_step {step}, mlp_only_layers {dense}); use a "
            "dense model"
        )
    return {
        "num_experts": num_experts,
        "experts_per_token": top_k,
        "expert_size": _size(values, "moe_intermediate_size"),
        "norm_topk": _flag(values, "norm_topk_prob"),
        "mixture_layers": tuple(layers),
    }


def special_tokens(folder: Path, tokenizer: Path | None = None) -> SpecialTokens:
    """Stop tokens, begin of text and padding of a model folder, each with its files.

    `tokenizer` is the folder of the tokenizer, None for the same. Raises ValueError as
    `ModelConfig.from_folder`.
    """
    folder = Path(folder)
    values = _config_json(folder)
    family = FAMILIES[values["model_type"]]
    assumed = {"eos_token_id": family.eos_token_id, "bos_token_id": family.bos_token_id}
    return read_special_tokens(
        folder, assumed | values, vocab_size=_size(values, "vocab_size"), tokenizer=tokenizer
    )


def _config_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"model folder {folder} has no config.json; give a plain Hugging Face folder "
            "(config.json, *.safetensors, tokenizer.json)"
        )
    return read_json(path, REMEDY)


def _check_switches(values: Mapping[str, Any], name: str, family: Family) -> None:
    for switch in family.refused:
        if values.get(switch):
            raise ValueError(
                f"{switch}: {values[switch]!r} is not supported for {name}; use a model without it"
            )
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act {activation!r} is not supported; supported is silu")


def _check_weights_form(values: Mapping[str, Any]) -> None:
    for key in FOREIGN_WEIGHTS:
        if values.get(key):
            raise ValueError(
                f"{key} is not supported, because only plain weights can be trained; use the "
                "model's unquantised safetensors"
            )
    for key in ("dtype", "torch_dtype"):
        dtype = values.get(key)
        if dtype is not None and str(dtype).removeprefix("torch.") not in FLOAT_DTYPES:
            raise ValueError(
                f"{key} {dtype!r} is not supported; supported are {', '.join(FLOAT_DTYPES)}"
            )
    architectures = values.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if names and not any("causallm" in name.lower() for name in names):
        raise ValueError(
            f"architectures {names} is no causal language model; use a model for text generation"
        )


def _check_layer_types(values: Mapping[str, Any], num_layers: int) -> None:
    """Only full attention is supported; a sliding window counts where a layer would use it."""
    kinds = values.get("layer_types")
    if kinds is None and values.get("use_sliding_window") and values.get("sliding_window", 4096):
        first = values.get("max_window_layers", 28)
        sliding = isinstance(first, int) and first < num_layers
        kinds = ["sliding_attention" if sliding else "full_attention"] * num_layers
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        count = len(kinds) if isinstance(kinds, list) else repr(kinds)
        raise ValueError(
            f"layer_types ({count}) must have num_hidden_layers ({num_layers}) entries; {REMEDY}"
        )
    if other := [kind for kind in kinds if kind != "full_attention"]:
        raise ValueError(
            f"layers with {other[0]} (layer_types, use_sliding_window) are not supported; "
            "use a model with full attention in all layers"
        )


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} ({value!r}) must be true or false; {REMEDY}")
    return bool(value)


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        given = "missing" if value is None else repr(value)
        raise ValueError(f"{key} ({given}) must be a positive number; {REMEDY}")
    return value


def _size(
    values: Mapping[str, Any], key: str, *, default: int | None = None, most: int = MOST
) -> int:
    """A whole number from 1 to `most`, or `default` if the key is missing or null."""
    value = values.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        given = "missing" if value is None else repr(value)
        raise ValueError(f"{key} ({given}) must be a whole number of at least 1; {REMEDY}")
    if value > most:
        raise ValueError(f"{key} ({value}) must be at most {most}; {REMEDY}")
    return value
