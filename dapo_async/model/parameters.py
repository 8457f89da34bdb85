"""Names and shapes of a decoder's parameters, from its config.

In: a `ModelConfig`. Out: what `Decoder(config).state_dict()` holds, in the same order. The checks
at the start of a run use it, because it needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from dapo_async.model.config import FAMILIES, ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The shape of each parameter, by its Hugging Face name, in the order of the state dict.

    Experts are stacked; `expert_names.folder_shapes` has them one by one.
    """
    if FAMILIES[config.family].block is not None:  # only the layer itself knows its parameters
        return _shapes_of_decoder(config)
    embedding = (config.vocab_size, config.hidden_size)
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": embedding}
    kinds = {sparse: dict(_layer_shapes(config, sparse=sparse)) for sparse in (False, True)}
    for number in range(config.num_layers):
        layer = kinds[number in config.mixture_layers]
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = embedding
    return shapes


def _layer_shapes(config: ModelConfig, *, sparse: bool) -> Iterator[tuple[str, Shape]]:
    """One `layers.Block`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for name, size in (("q", query), ("k", kv), ("v", kv)):
        yield f"self_attn.{name}_proj.weight", (size, hidden)
        if config.qkv_bias:
            yield f"self_attn.{name}_proj.bias", (size,)
    yield "self_attn.o_proj.weight", (hidden, query)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (config.head_dim,)
        yield "self_attn.k_norm.weight", (config.head_dim,)
    if sparse:
        yield "mlp.gate.weight", (config.num_experts, hidden)
        rows = config.num_experts * 2 * config.expert_size
        yield "mlp.experts.gate_up_proj", (rows, hidden)
        yield "mlp.experts.down_proj", (config.num_experts * hidden, config.expert_size)
    else:
        yield "mlp.gate_proj.weight", (inner, hidden)
        yield "mlp.up_proj.weight", (inner, hidden)
        yield "mlp.down_proj.weight", (hidden, inner)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def _shapes_of_decoder(config: ModelConfig) -> dict[str, Shape]:
    import torch

    from dapo_async.model.decoder import Decoder

    with torch.device("meta"):
        state = Decoder(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
