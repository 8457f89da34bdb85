"""FLOPs and bytes of a decoder, from its sizes alone; imports no torch.

A multiply-add is 2 FLOPs. Counted are the dense products and the causal attention, each token once:
a prompt that siblings share counts once, and nothing that is computed again counts. Norms, rotary
embeddings, softmax and sampling are left out, because they are below 1 % of a real model.

Attention is counted in pairs: a token that attends to k tokens, itself included, makes k pairs. One
pair costs 4 · heads · head_dim FLOPs per layer: the score and the weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dapo_async.model.config import ModelConfig, Recompute
from dapo_async.model.parameters import parameter_shapes

# Attention works on every sequence with its whole prompt. In a microbatch of the learner these are
# at most so many times its tokens, which bounds its memory.
MOST_ATTENDED = 2
BACKWARD = 2  # times the forward pass: gradients of the inputs and of the weights
Siblings = tuple[int, Sequence[int]]  # tokens of a prompt, and of each of its responses


def causal_pairs(length: int, *, before: int = 0) -> int:
    """Pairs of the tokens `before + 1 … length` of one sequence, each with its past and itself."""
    return (length * (length + 1) - before * (before + 1)) // 2


def token_flops(config: ModelConfig) -> int:
    """The products of all layers, for one token. Without the head, and with the experts that the
    token uses."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * query + 2 * key)  # query and output; key and value
    return 2 * (config.num_layers * attention + _mlp_products(config))


def _mlp_products(config: ModelConfig) -> int:
    """Of a token in all layers: the MLP, or the router and the experts that the token uses."""
    dense = 3 * config.hidden_size * config.intermediate_size
    router = config.hidden_size * config.num_experts
    experts = config.experts_per_token * 3 * config.hidden_size * config.expert_size
    return config.num_dense_layers * dense + len(config.mixture_layers) * (router + experts)


def head_flops(config: ModelConfig) -> int:
    """The logits of one token."""
    return 2 * config.hidden_size * config.vocab_size


def pair_flops(config: ModelConfig) -> int:
    """One attention pair, over all layers."""
    return 4 * config.num_layers * config.num_heads * config.head_dim


def forward_flops(config: ModelConfig, *, tokens: int, pairs: int, predicted: int) -> int:
    """A forward pass of `tokens` tokens with `pairs` attention pairs and `predicted` logits."""
    layers = tokens * token_flops(config) + pairs * pair_flops(config)
    return layers + predicted * head_flops(config)


def train_flops(config: ModelConfig, groups: Sequence[Siblings]) -> int:
    """Forward and backward pass of one minibatch, three times the forward pass.

    A group is `(prompt tokens, tokens of each response)`. Its prompt is computed once. The last
    token of a response predicts nothing and is not computed. Logits exist for response tokens only.
    """
    tokens, pairs = _counted(groups)
    predicted = sum(sum(responses) for _, responses in groups)
    forward = forward_flops(config, tokens=tokens, pairs=pairs, predicted=predicted)
    return (1 + BACKWARD) * forward


def recomputed_flops(config: ModelConfig, groups: Sequence[Siblings], form: Recompute) -> int:
    """What the backward pass of the same minibatch computes again.

    Not the last product of a dense MLP: nothing needs its output, so torch stops before it.
    """
    if form == "none":
        return 0
    tokens, pairs = _counted(groups)
    left_out = config.num_dense_layers * config.hidden_size * config.intermediate_size
    if form == "mlp":
        return 2 * tokens * (_mlp_products(config) - left_out)
    return tokens * (token_flops(config) - 2 * left_out) + pairs * pair_flops(config)


def _counted(groups: Sequence[Siblings]) -> tuple[int, int]:
    """Tokens of the layers, and attention pairs."""
    tokens = pairs = 0
    for prompt, responses in groups:
        tokens += prompt + sum(max(0, response - 1) for response in responses)
        pairs += causal_pairs(prompt)
        pairs += sum(causal_pairs(prompt + each - 1, before=prompt) for each in responses if each)
    return tokens, pairs


def prefill_flops(config: ModelConfig, lengths: Sequence[int]) -> int:
    """Reading prompts of these lengths, with the logits of each last token."""
    pairs = sum(map(causal_pairs, lengths))
    return forward_flops(config, tokens=sum(lengths), pairs=pairs, predicted=len(lengths))


def decode_flops(config: ModelConfig, batch: int, context: float) -> float:
    """One decode step of `batch` sequences that attend to `context` tokens each on average."""
    one = token_flops(config) + head_flops(config) + context * pair_flops(config)
    return batch * one


def kv_bytes(config: ModelConfig, *, num_bytes: int) -> int:
    """Keys and values of one token, over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * num_bytes


def weight_bytes(config: ModelConfig, *, num_bytes: int) -> int:
    """The weights that a decode step reads: all, without the embedding if it is not the head."""
    shapes = parameter_shapes(config)
    skipped = "" if config.tie_embeddings else "model.embed_tokens.weight"
    return num_bytes * sum(math.prod(shape) for name, shape in shapes.items() if name != skipped)


def decode_bytes(config: ModelConfig, batch: int, context: float, *, num_bytes: int = 2) -> float:
    """What one decode step reads: the weights once, and keys and values of every sequence.

    `num_bytes` of a number; 2 for bfloat16.
    """
    cache = batch * context * kv_bytes(config, num_bytes=num_bytes)
    return weight_bytes(config, num_bytes=num_bytes) + cache
