"""What a learner rank will hold in memory, by part, before it is started (`--dry-run`): sizes of model, mesh and microbatches in, bytes out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dapo_async.model import Decoder, ModelConfig
from dapo_async.model.logprob import CHUNK_NUMBERS, CUDA_CHUNK_NUMBERS
from dapo_async.model.parallel import split_dim

FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the first rank, which has the most; `host` in its machine's memory, the rest on its device (for a rank on CPU the same)."""

    weights: int  # float32 master weights, this rank's parts
    gradients: int  # float32, of the same parts
    moments: int  # AdamW's two, of the same parts
    gathered: int  # weights as the layers compute with them, where that is a copy: of all layers, or what FSDP has gathered at a time
    activations: int  # what the forward pass of the largest microbatch keeps for its backward pass
    recomputed: int  # the one layer whose activations are computed again at a time
    head: int  # logits of one chunk, twice; the head's gradient, and what it is added up and handed on in
    tables: int  # rotary cosines and sines
    snapshot: int  # the weights being published, and those before while they are taken
    host: int  # in the host's memory: a checkpoint as it is copied and written; moments and snapshots where they are not on the device

    @property
    def on_device(self) -> int:
        return sum(size for name, size in self.parts().items() if name != "host")

    def parts(self) -> Mapping[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


def predict_memory(
    model: ModelConfig,
    *,
    num_tokens: int,
    num_targets: int | None = None,
    dp: int = 1,
    tp: int = 1,
    activations: torch.dtype = torch.float32,
    recompute_layers: int = 0,
    offload_optimizer: bool = False,
    cuda: bool = False,
) -> Memory:
    """Of a rank that trains on microbatches of `num_tokens` (T), `num_targets` (N; None: all) of them response tokens."""
    num_targets = num_tokens if num_targets is None else num_targets
    with torch.device("meta"):
        sizes = {
            name: tuple(parameter.shape) for name, parameter in Decoder(model).named_parameters()
        }
    on_tp = {
        name: _part(shape, split_dim(name, tp=tp, num_kv_heads=model.num_kv_heads), tp)
        for name, shape in sizes.items()
    }
    mine = sum(math.prod(_part(shape, 0, dp)) for shape in on_tp.values())
    whole = sum(math.prod(shape) for shape in sizes.values())
    width, alone = activations.itemsize, dp * tp == 1
    recomputed = min(recompute_layers, model.num_layers)
    layer = layer_bytes(model, num_tokens=num_tokens, tp=tp, width=width, cuda=cuda)
    kept = -(-num_tokens // tp) * model.hidden_size * width
    head_rows = -(-model.vocab_size // tp)
    chunk = (
        min(max(1, (CUDA_CHUNK_NUMBERS if cuda else CHUNK_NUMBERS) // head_rows), num_targets)
        * head_rows
    )
    # In float32; in half precision once more for the sum of a chunk, and as it is handed on.
    head_gradient = (
        head_rows * model.hidden_size * (FLOAT32 if width == FLOAT32 else 2 * FLOAT32 + width)
    )
    snapshots, moments = 2 * whole * width, 2 * mine * FLOAT32
    checkpoint = 2 * (
        mine * FLOAT32 + moments
    )  # the copy, and the bytes of the file as they are put together
    return Memory(
        weights=mine * FLOAT32,
        gradients=mine * FLOAT32,
        moments=0 if offload_optimizer else moments,
        gathered=_gathered(on_tp, dp=dp, width=width, alone=alone),
        activations=(model.num_layers - recomputed) * layer
        + recomputed * kept
        + end_bytes(
            model, num_tokens=num_tokens, num_targets=num_targets, tp=tp, width=width, cuda=cuda
        ),
        recomputed=layer if recomputed else 0,
        head=2 * chunk * FLOAT32 + head_gradient,
        tables=2 * model.max_positions * model.head_dim * FLOAT32,
        snapshot=snapshots if alone else 0,
        host=checkpoint + (moments if offload_optimizer else 0) + (0 if alone else snapshots),
    )


def layer_bytes(model: ModelConfig, *, num_tokens: int, tp: int, width: int, cuda: bool) -> int:
    """What one layer keeps for its backward pass; `width` bytes a number.

    Per own token what the two norms keep (`norm_bytes`), the layer's input among it. Per token of the microbatch: both norms' outputs, D each;
    queries and keys after rotation, values, the attention's output and that once more in the order of tokens, with its float32 log-sum per head;
    gate, up, silu(gate) and their product. With norms of heads also what these keep.
    """
    own = -(-num_tokens // tp)
    heads, kv_heads = model.num_heads // tp, max(1, model.num_kv_heads // tp)
    query, key, inner = (
        heads * model.head_dim,
        kv_heads * model.head_dim,
        model.intermediate_size // tp,
    )
    per_token = 2 * model.hidden_size + query + 2 * key + 2 * query + 4 * inner
    of_heads = (
        (heads + kv_heads) * norm_bytes(model.head_dim, width=width, cuda=cuda)
        if model.qk_norm
        else 0
    )
    norms = 2 * norm_bytes(model.hidden_size, width=width, cuda=cuda)
    return own * norms + num_tokens * (per_token * width + heads * FLOAT32 + of_heads)


def norm_bytes(size: int, *, width: int, cuda: bool) -> int:
    """Of one RMS norm: its input and one float32. On a CPU, where no kernel does it at once, input and result before the weight, in float32."""
    return FLOAT32 + (size * width if cuda else 2 * size * FLOAT32)


def end_bytes(
    model: ModelConfig, *, num_tokens: int, num_targets: int, tp: int, width: int, cuda: bool
) -> int:
    """What embeddings, last norm, head and loss keep: the last norm's input; of each target its hidden state and a few float32 numbers."""
    own = -(-num_tokens // tp)
    tables = 2 * num_tokens * model.head_dim * width
    loss = (
        24 * FLOAT32
    )  # ids, index, target, temperature, log Z, entropy, and some fifteen of the loss's own
    return (
        own * norm_bytes(model.hidden_size, width=width, cuda=cuda)
        + tables
        + num_targets * (model.hidden_size * width + loss)
    )


def _gathered(on_tp: Mapping[str, tuple[int, ...]], *, dp: int, width: int, alone: bool) -> int:
    """A rank alone casts all weights where it computes in another precision; FSDP holds what is outside the layers, and two layers at a time."""
    if alone:
        looked_up = (
            "model.embed_tokens.weight" if "lm_head.weight" in on_tp else ""
        )  # rows are cast, not the table
        return (
            0
            if width == FLOAT32
            else sum(math.prod(shape) for name, shape in on_tp.items() if name != looked_up) * width
        )
    outside = sum(math.prod(shape) for name, shape in on_tp.items() if ".layers." not in name)
    layer = sum(math.prod(shape) for name, shape in on_tp.items() if ".layers.0." in name)
    weights, gradients = outside * FLOAT32 + 2 * layer * width, outside * FLOAT32 + layer * width
    return (
        weights + gradients + ((outside + layer) * FLOAT32 if dp > 1 else 0)
    )  # gradients once more as they are added up


def _part(shape: tuple[int, ...], dim: int | None, ranks: int) -> tuple[int, ...]:
    """Of the rank that has the largest share."""
    return shape if dim is None else (*shape[:dim], -(-shape[dim] // ranks), *shape[dim + 1 :])
