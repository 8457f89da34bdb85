"""One layer in the form for generation: joined weights, in-place kernels, no modules.

`Decoder.fuse` builds it from a `Block`. A decode step on a CPU is bound by the number of kernels
and by Python around them: modules alone cost a third of a layer on few tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from dapo_async.model.layers import MLP, Attention, Block, RMSNorm, rotate_
from dapo_async.model.linear import Linear, product
from dapo_async.model.mixture import Mixture, Routing


class FusedBlock:
    """The formula of `Block` and `SparseBlock` on one rank, for inference only.

    Its weights are the block's own: later in-place updates take effect here too.
    """

    def __init__(self, block: Block) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._layer, self._head_dim = attention.layer, attention.head_dim
        self._qkv, self._qkv_bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out, self._mixture = attention.o_proj.weight.detach(), None
        if isinstance(mlp, Mixture):
            self._mixture = mlp
        else:
            assert isinstance(mlp, MLP)
            self._gate_up, _ = _joined(mlp.gate_proj, mlp.up_proj)
            self._down = mlp.down_proj.weight.detach()
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._num_heads = [each.out_features // self._head_dim for each in projections]
        self._num_rotated = sum(self._num_heads[:2])
        self._norm_attention = _Norm(block.input_layernorm)
        self._norm_mlp = _Norm(block.post_attention_layernorm)
        self._query_norm, self._key_norm = _norm(attention.q_norm), _norm(attention.k_norm)

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        routing: Routing | None = None,
    ) -> Tensor:
        """See `Block`. Queries, keys and values are views of one product."""
        num_tokens = x.shape[0]
        joined = product(self._norm_attention(x), self._qkv, self._qkv_bias)
        heads = joined.view(num_tokens, -1, self._head_dim)
        query, key, value = heads.split(self._num_heads, dim=1)
        if self._query_norm and self._key_norm:
            query.copy_(self._query_norm(query))
            key.copy_(self._key_norm(key))
        rotate_(heads[:, : self._num_rotated], cos, sin)
        mixed = attention(self._layer, query, key, value)
        x = product(mixed.reshape(num_tokens, -1), self._out).add_(x)
        if self._mixture is not None:
            y: Tensor = self._mixture(self._norm_mlp(x), routing or Routing(), num_tokens)
            return y.add_(x)
        gate, up = product(self._norm_mlp(x), self._gate_up).chunk(2, dim=-1)
        return product(silu(gate).mul_(up), self._down).add_(x)


class _Norm:
    """The formula of `RMSNorm`, on the same weight."""

    def __init__(self, norm: RMSNorm) -> None:
        self._gain, self._eps = norm.weight.detach(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, self._gain.shape, self._gain, self._eps)


def _norm(module: nn.Module) -> _Norm | None:
    return _Norm(module) if isinstance(module, RMSNorm) else None


def _joined(*layers: Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one product that gives the outputs of all layers.

    The layers' parameters become views of them; their names and shapes stay.
    """
    sizes = [layer.out_features for layer in layers]
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers))
    bias = torch.cat(biases) if biases else None
    for index, layer in enumerate(layers):
        layer.weight.data = weight.split(sizes)[index]
        if bias is not None:
            layer.bias.data = bias.split(sizes)[index]
    return weight, bias
