"""The decoder: embeddings, the layers of its family, and the head.

Parameters have their Hugging Face names and orientation. The decoder works on packed tokens `[T]`;
only the attention strategy knows the sequences (`PackedAttention`, or the engine's KV cache).
"""

from __future__ import annotations

from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from dapo_async.model.attention import take_rows
from dapo_async.model.config import FAMILIES, ModelConfig, Recompute
from dapo_async.model.context_parallel import ExchangedAttention, own_tokens, whole_scores
from dapo_async.model.fused import FusedBlock
from dapo_async.model.layers import Attention, Block, RMSNorm, SparseBlock
from dapo_async.model.linear import Linear, float_matmul, product
from dapo_async.model.logprob import token_logprobs
from dapo_async.model.mesh import ALONE, Axis
from dapo_async.model.mixture import Routing
from dapo_async.model.tensor_parallel import gather_tokens, local, scatter_tokens


def _is_own(block: nn.Module) -> TypeGuard[Block]:
    return type(block) in (Block, SparseBlock)


class Embedding(nn.Embedding):
    """The embedding of this rank's share of the vocabulary.

    Returns the embeddings of this rank's tokens: each rank looks up the tokens in its share, and
    the results are summed over the ranks.
    """

    def __init__(self, config: ModelConfig, tp: Axis) -> None:
        self.tp, self.share = tp, tp.share(config.vocab_size)
        super().__init__(config.vocab_size, config.hidden_size)

    def reset_parameters(self) -> None:
        """See `Linear.reset_parameters`."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, token_ids: Tensor) -> Tensor:
        weight = local(self.weight)
        if self.tp.size == 1:
            return embedding(token_ids, weight)
        mine = (token_ids >= self.share.start) & (token_ids < self.share.stop)
        rows = (token_ids - self.share.start).masked_fill(~mine, 0)
        return scatter_tokens(embedding(rows, weight) * mine[:, None], self.tp)


class Backbone(nn.Module):
    """Everything below the head. Its name in the state dict is `model`, as in Hugging Face's."""

    def __init__(self, config: ModelConfig, tp: Axis) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config, tp)
        dense = FAMILIES[config.family].block or Block
        kinds = [
            SparseBlock if layer in config.mixture_layers else dense
            for layer in range(config.num_layers)
        ]
        self.layers = nn.ModuleList(kind(config, layer, tp) for layer, kind in enumerate(kinds))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model on packed tokens.

    With a `tp` axis it is this rank's part of one, after `shard_decoder` has split its parameters.
    With a `cp` axis it computes a slice of the tokens (`context_parallel.py`).
    """

    rope_cos: Tensor  # [max_positions, 1, head_dim], float32
    rope_sin: Tensor  # the same shape, with the first half negated as `rotate` expects

    def __init__(self, config: ModelConfig, tp: Axis = ALONE, cp: Axis = ALONE) -> None:
        super().__init__()
        self.config, self.tp, self.cp = config, tp, cp
        self.activations: torch.dtype | None = None  # None: the dtype of the weights
        self.model = Backbone(config, tp)
        self.head_kernels = False  # whether the head takes `fused_head.py`; see `kernels.py`
        self._blocks: list[FusedBlock | nn.Module] = []  # the layers after `fuse`
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if torch.get_default_device().type == "meta":  # see `Linear.reset_parameters`
            cos = sin = torch.empty(config.max_positions, 1, config.head_dim)
        else:
            cos, sin = config.rope.tables(config.head_dim, config.max_positions)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """`[V, D]`, or this rank's rows of it. A tied head uses the weight of the embedding."""
        tied = self.config.tie_embeddings
        return local(self.model.embed_tokens.weight if tied else self.lm_head.weight)

    def fuse(self) -> None:
        """Takes the form for inference only: larger products, fewer kernels (`FusedBlock`).

        Call it once; later in-place updates of the weights stay visible. A family's own kind of
        block stays as it is.
        """
        assert self.tp.size == self.cp.size == 1
        assert self.activations is None
        self._blocks = [FusedBlock(each) if _is_own(each) else each for each in self.model.layers]

    def recompute(self, form: Recompute, *, num_layers: int | None = None) -> None:
        """Turns on activation checkpointing in the first `num_layers` layers (None: all). Call it
        once.

        `all`: these layers keep only their input for the backward pass and compute the rest again.
        `mlp`: only their MLPs do. A family's own kind of layer without an `mlp` is taken whole.
        """
        if form == "none":
            return
        for block in [*self.model.layers][:num_layers]:
            part = getattr(block, "mlp", block) if form == "mlp" else block
            part.forward = partial(
                checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False
            )

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        routing: Routing | None = None,
    ) -> Tensor:
        """Hidden states `[T, D]` after the last norm, of packed `token_ids [T]` at `positions [T]`.

        Every rank of the `tp` axis gets the same. With a `cp` axis all its ranks give all tokens,
        and each gets the hidden states of its slice. `routing` of a model with experts: gives them,
        or tells afterwards which were used, in this rank's slice.
        """
        if self.cp.size > 1:
            attention = ExchangedAttention(attention, self.cp, num_tokens=len(token_ids))
            token_ids, positions = own_tokens(token_ids, self.cp), own_tokens(positions, self.cp)
            if routing is not None:
                routing.take_slice(self.cp)
        x = self.model.embed_tokens(token_ids)
        x = x if self.activations is None else x.to(self.activations)
        cos, sin = self.rope_cos[positions].to(x.dtype), self.rope_sin[positions].to(x.dtype)
        for layer, block in enumerate(self._blocks or self.model.layers):
            extra = (routing,) if layer in self.config.mixture_layers else ()
            x = block(x, cos, sin, attention, *extra)
        return gather_tokens(self.model.norm(x), self.tp, len(token_ids))

    def score(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        *,
        predictors: Tensor,
        targets: Tensor,
        temperatures: Tensor,
        own: Tensor | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies, float32 `[N]`, of log-softmax(logits / temperature).

        `targets [N]` are token ids; `predictors [N]` are the positions of the tokens whose hidden
        states predict them; `own`: `own_targets` of this rank, needed with a `cp` axis. All ranks
        of the mesh call it; ranks of one `cp` and `tp` axis get the same.
        """
        hidden = Decoder.forward(self, token_ids, positions, attention, routing)
        num_targets = len(targets)
        if own is not None:
            first = self.cp.rank * len(hidden)
            predictors, targets, temperatures = (
                predictors[own] - first,
                targets[own],
                temperatures[own],
            )
        hidden = take_rows(hidden, predictors)
        weight = self.head_weight.to(hidden.dtype)
        start = self.model.embed_tokens.share.start
        scores = token_logprobs(
            hidden,
            weight,
            targets,
            temperatures,
            tp=self.tp,
            vocab_start=start,
            fused=self.head_kernels,
        )
        if own is None:
            return scores
        logprobs, entropies = whole_scores(
            torch.stack(scores, -1), own, num_targets, self.cp
        ).unbind(-1)
        return logprobs, entropies

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, V]` in float32 for any dtype of the weights.

        ScaleRL measured what a float32 head gains: pass rate 0.52 → 0.61.
        """
        weight = self.head_weight
        if weight.is_cuda:
            return float_matmul(hidden, weight.t())
        return product(hidden.float(), weight.float())
