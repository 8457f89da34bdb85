"""Predicts the memory of a learner rank, by part, before it is started.

In: sizes of the model, the mesh and the microbatches. Out: bytes. `train --dry-run` and the planner
call it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch

from dapo_async.model.config import ModelConfig, Recompute
from dapo_async.model.gather import BUCKET_ELEMENTS
from dapo_async.model.head_split import HeadSplit
from dapo_async.model.logprob import CHUNK_NUMBERS, CUDA_CHUNK_NUMBERS
from dapo_async.model.parallel import split_dim
from dapo_async.model.parameters import Shape, parameter_shapes

FLOAT32 = 4  # bytes
FORMS: tuple[Recompute, ...] = ("none", "mlp", "all")
STAGES = (1, 2, 3)
INDEX = 8


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of the first rank, which needs the most.

    `written` and `host` are in its machine's memory, the rest on its device (on a CPU the same).
    """

    weights: int  # float32 master weights, this rank's parts
    gradients: int  # float32, of the same parts
    moments: int  # AdamW's two, of the same parts
    start_weights: int  # float32, of the same parts: the weights at the start of a step
    reference: int  # float32, of the same parts: the reference policy of a KL term
    gathered: int  # copies of weights that the layers compute with: cast, or gathered by FSDP
    activations: int  # what the forward pass of the largest microbatch keeps for the backward pass
    recomputed: int  # activations of the one layer, or MLP, that is being computed again
    head: int  # two buffers for a chunk of logits, and the gradient of the head
    tables: int  # rotary cosines and sines
    # The copy of this rank's parts that is published; what several ranks bring together beside it.
    snapshot: int
    written: int  # whole weights of the first rank, in host memory while files of them are written
    host: int  # a checkpoint being written; moments and kept weights that are not on the device

    @property
    def on_device(self) -> int:
        return sum(size for name, size in self.parts().items() if name not in ("written", "host"))

    @property
    def asleep(self) -> int:
        """What moves to host memory while engines have the device (`model.placement=shared`)."""
        kept = self.weights + self.moments + self.start_weights + self.reference
        return kept + self.tables + self.snapshot + self.written

    def parts(self) -> Mapping[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Pass:
    """The sizes that determine the activations of one forward pass."""

    model: ModelConfig
    num_tokens: int  # T, of the microbatch
    num_attended: int  # S, the same with a shared prompt counted for each of its sequences
    num_targets: int  # N, response tokens
    cp: int
    tp: int
    width: int  # bytes of a number in the activations
    cuda: bool

    @property
    def slice_tokens(self) -> int:
        """The tokens of the ranks of one `tp` axis, everywhere but in attention."""
        return -(-self.num_tokens // self.cp)

    @property
    def own_tokens(self) -> int:
        """The tokens of this rank between two matrix products."""
        return -(-self.slice_tokens // self.tp)

    @property
    def own_targets(self) -> int:
        """The response tokens that one rank scores at most."""
        return min(self.num_targets, self.slice_tokens)

    def norm_bytes(self, size: int) -> int:
        """Kept per token by one RMS norm: its input and one float32.

        On a CPU without a fused kernel: input and unscaled result, both in float32.
        """
        return FLOAT32 + (size * self.width if self.cuda else 2 * size * FLOAT32)

    def layer_bytes(self, *, keeps_mlp: bool = True, sparse: bool = False) -> int:
        """What one layer keeps for its backward pass; without `keeps_mlp` the MLP keeps its input.

        `sparse`: a layer with experts.

        Per own token: what the two norms keep, which includes the layer's input. Per token of the
        slice: the outputs of both norms, D each; the output of attention in token order; gate, up,
        silu(gate) and their product. With norms of heads: what these keep. The rest is kept in
        attention (`attention_bytes`).
        """
        model = self.model
        heads, kv_heads = self.heads
        per_token = model.hidden_size + heads * model.head_dim
        head_norms = (heads + kv_heads) * self.norm_bytes(model.head_dim) if model.qk_norm else 0
        norms = 2 * self.norm_bytes(model.hidden_size)
        token_bytes = self.slice_tokens * (per_token * self.width + head_norms)
        mlp = self.mlp_bytes(sparse=sparse) if keeps_mlp else self.input_bytes()
        return self.own_tokens * norms + token_bytes + self.attention_bytes() + mlp

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key-value heads of a rank outside of attention."""
        return self.model.num_heads // self.tp, max(1, self.model.num_kv_heads // self.tp)

    def attention_bytes(self) -> int:
        """What the attention of one layer keeps, with the heads that a rank has there.

        Per attended token: keys after rotation and values. Per query, which on a CPU is an attended
        token: the rotated query, the output of attention and its float32 log-sum per head. With
        several `cp` ranks on a GPU, queries are a part of what was received: with shared prompts
        its keys and values are kept besides those of the attended tokens.
        """
        split = HeadSplit.of(*self.heads, self.cp)
        query, key = split.queries * self.model.head_dim, split.keys * self.model.head_dim
        num_queries = self.num_tokens if self.cuda else self.num_attended
        num_keys = self.num_attended
        if self.cp > 1 and self.cuda and self.num_attended > self.num_tokens:
            num_keys += self.num_tokens
        per_query = 2 * query * self.width + split.queries * FLOAT32
        return num_keys * 2 * key * self.width + num_queries * per_query

    def mlp_bytes(self, *, sparse: bool = False) -> int:
        """What the MLP of one layer keeps: its input, gate, up, silu(gate) and their product.

        `sparse`, with experts: per token its input and of the router four numbers per expert; per
        pair of token and expert besides the input of the expert, its weighted product and weight,
        and two indices. Pairs are taken to be spread evenly over the ranks.
        """
        model = self.model
        if not sparse:
            inner = model.intermediate_size // self.tp
            return self.slice_tokens * (model.hidden_size + 4 * inner) * self.width
        router = model.num_experts * (self.width + 3 * FLOAT32)
        tokens = self.slice_tokens * (model.hidden_size * self.width + router)
        pair = (model.hidden_size + 5 * model.expert_size + 1) * self.width + 2 * INDEX
        pairs = self.slice_tokens * model.experts_per_token
        # The order and the places of all pairs, the rest of this rank's.
        return tokens + -(-pairs // self.tp) * pair + pairs * 2 * INDEX

    @property
    def largest_mlp_bytes(self) -> int:
        sparse, dense = self.model.mixture_layers, self.model.num_dense_layers
        return max(self.mlp_bytes() if dense else 0, self.mlp_bytes(sparse=True) if sparse else 0)

    def layers_bytes(self, recompute: Recompute) -> int:
        """What all layers keep for the backward pass."""
        if recompute == "all":
            return self.model.num_layers * self.input_bytes()
        keeps = recompute == "none"
        dense = self.model.num_dense_layers * self.layer_bytes(keeps_mlp=keeps)
        num_sparse = len(self.model.mixture_layers)
        return dense + num_sparse * self.layer_bytes(keeps_mlp=keeps, sparse=True)

    def recomputed_bytes(self, recompute: Recompute) -> int:
        """What the one layer, or MLP, keeps that is being computed again."""
        if recompute == "all":
            return self.layer_bytes(keeps_mlp=False) - self.input_bytes() + self.largest_mlp_bytes
        return self.largest_mlp_bytes if recompute == "mlp" else 0

    def input_bytes(self) -> int:
        """The input of one layer or MLP, which is all that it keeps if it is computed again."""
        return self.own_tokens * self.model.hidden_size * self.width

    def end_bytes(self) -> int:
        """What embeddings, last norm, head and loss keep.

        The input of the last norm; the hidden state per target that this rank scores; per target 24
        float32 numbers: ids, index, target, temperature, log Z, entropy, and some fifteen of the
        loss.
        """
        model = self.model
        tables = 2 * self.slice_tokens * model.head_dim * self.width
        scored = self.own_targets * model.hidden_size * self.width
        norm = self.own_tokens * self.norm_bytes(model.hidden_size)
        return norm + tables + scored + self.num_targets * 24 * FLOAT32

    def head_bytes(self) -> int:
        """Two chunks of logits and the gradient of the head.

        The gradient is in float32; in half precision there are also the sum of a chunk in float32
        and the result in half precision.
        """
        rows = -(-self.model.vocab_size // self.tp)
        numbers = CUDA_CHUNK_NUMBERS if self.cuda else CHUNK_NUMBERS
        chunk = min(max(1, numbers // rows), self.own_targets) * rows
        gradient_width = FLOAT32 if self.width == FLOAT32 else 2 * FLOAT32 + self.width
        return 2 * chunk * FLOAT32 + rows * self.model.hidden_size * gradient_width


def forms_by_speed(
    recompute: Recompute | Literal["auto"] = "auto", zero_stage: int | Literal["auto"] = "auto"
) -> list[tuple[Recompute, int]]:
    """What `auto` may stand for, from the fastest form to the one that needs the least memory.

    Computing again costs a sixth (`mlp`) to a quarter (`all`) of a pass, a higher ZeRO stage only
    what communication does not hide:

        recompute none with ZeRO stage 1, 2, 3; then mlp with 1, 2, 3; then all with 1, 2, 3
    """
    forms = FORMS if recompute == "auto" else (recompute,)
    return [*product(forms, STAGES if zero_stage == "auto" else (zero_stage,))]


def predict_memory(
    model: ModelConfig,
    *,
    num_tokens: int,
    num_attended: int | None = None,
    num_targets: int | None = None,
    dp: int = 1,
    cp: int = 1,
    tp: int = 1,
    activations: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    zero_stage: int = 3,
    offload_optimizer: bool = False,
    keeps_start_weights: bool = False,
    keeps_reference: bool = False,
    cuda: bool = False,
) -> RankMemory:
    """The memory of a rank that trains on microbatches of `num_tokens`, shared by `cp` ranks.

    `num_attended` (None: equal): the same with a shared prompt counted for each of its sequences.
    `num_targets` (None: all): response tokens. `keeps_start_weights`: the step has several
    minibatches, and later ones need the logprobs of its start. `keeps_reference`: the loss has a KL
    term. `zero_stage`: see `parallel.begin_pass`.
    """
    forward = Pass(
        model=model,
        num_tokens=num_tokens,
        num_attended=num_tokens if num_attended is None else num_attended,
        num_targets=num_tokens if num_targets is None else num_targets,
        cp=cp,
        tp=tp,
        width=activations.itemsize,
        cuda=cuda,
    )
    shapes = parameter_shapes(model)
    on_tp = {
        name: _part(shape, split_dim(name, tp=tp, num_kv_heads=model.num_kv_heads), tp)
        for name, shape in shapes.items()
    }
    shards = dp * cp
    own = sum(math.prod(_part(shape, 0, shards)) for shape in on_tp.values()) * FLOAT32
    whole, alone = sum(math.prod(shape) for shape in shapes.values()), shards * tp == 1
    moments = 2 * own
    checkpoint = 2 * (own + moments)  # the copy, and the bytes of the file being assembled
    start_weights = own if keeps_start_weights else 0
    reference = own if keeps_reference else 0
    offloaded = moments + start_weights + reference if offload_optimizer else 0
    return RankMemory(
        weights=own,
        gradients=own,
        moments=0 if offload_optimizer else moments,
        start_weights=0 if offload_optimizer else start_weights,
        reference=0 if offload_optimizer else reference,
        gathered=_gathered(
            on_tp, shards=shards, width=forward.width, alone=alone, zero_stage=zero_stage
        ),
        activations=forward.layers_bytes(recompute) + forward.end_bytes(),
        recomputed=forward.recomputed_bytes(recompute),
        head=forward.head_bytes(),
        tables=2 * model.max_positions * model.head_dim * FLOAT32,
        snapshot=(own // FLOAT32 + (0 if alone else _brought_together(shapes))) * forward.width,
        written=whole * forward.width,
        host=checkpoint + offloaded,
    )


def _gathered(
    on_tp: Mapping[str, Shape], *, shards: int, width: int, alone: bool, zero_stage: int
) -> int:
    """Copies of weights for the computation, and gradients before they are summed over `shards`.

    A single rank casts all weights if it computes in another precision. FSDP gathers the weights
    outside the layers, and two layers, the largest, at a time; with a `zero_stage` below 3 all
    layers stay. With stage 1 the gradients of all layers add up in float32 before they are summed.
    """
    if alone:
        # Of an embedding that is not the head too, only the looked-up rows are cast.
        skipped = "model.embed_tokens.weight" if "lm_head.weight" in on_tp else ""
        cast = sum(math.prod(shape) for name, shape in on_tp.items() if name != skipped)
        return 0 if width == FLOAT32 else cast * width
    outside = sum(math.prod(shape) for name, shape in on_tp.items() if ".layers." not in name)
    by_layer: dict[str, int] = {}
    for name, shape in on_tp.items():
        if ".layers." in name:
            number = name.split(".")[2]
            by_layer[number] = by_layer.get(number, 0) + math.prod(shape)
    layer = max(by_layer.values())
    layers = sum(by_layer.values())
    weights = outside * FLOAT32 + (2 * layer if zero_stage == 3 else layers) * width
    gradients = outside * FLOAT32 + layer * width
    if zero_stage == 1:
        gradients += layers * FLOAT32
    # A copy of gradients while they are sent.
    summed = (outside + layer) * FLOAT32 if shards > 1 else 0
    return weights + gradients + summed


def _brought_together(shapes: Mapping[str, Shape]) -> int:
    """Numbers that a publish needs besides the copy: the largest unit of whole weights, and a piece
    as it is sent and received; see `shard_copy.py`."""
    whole, layers = 0, dict[str, int]()
    for name, shape in shapes.items():
        whole += math.prod(shape)
        run = name.split(".")[2] if ".layers." in name else name
        layers[run] = layers.get(run, 0) + math.prod(shape)
    piece = min(whole, BUCKET_ELEMENTS)
    return max(*layers.values(), piece) + 2 * piece


def _part(shape: Shape, dim: int | None, ranks: int) -> Shape:
    """The part of the rank with the largest share."""
    return shape if dim is None else (*shape[:dim], -(-shape[dim] // ranks), *shape[dim + 1 :])
