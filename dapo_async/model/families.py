"""The supported families of decoders: what tells them apart. A new one is an entry in `FAMILIES`, and where its layer is another, a class here."""

from __future__ import annotations

from dataclasses import dataclass

from dapo_async.model.layers import Block


@dataclass(frozen=True, slots=True)
class Family:
    """Of one `model_type` of Hugging Face; sizes are read from its `config.json`. Embeddings, rotary tables and head are common to all."""

    qkv_bias: bool = False  # biases on the query, key and value projections
    qk_norm: bool = False  # RMS norms over each head's query and key
    refused: tuple[str, ...] = (
        "use_sliding_window",
        "mlp_bias",
        "attention_bias",
    )  # switches of its config that would change the layer
    block: type[Block] = Block


FAMILIES = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True, refused=("use_sliding_window", "mlp_bias")),
    "qwen3": Family(qk_norm=True),
}
