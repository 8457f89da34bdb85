"""Predicts the memory of an engine before it is started (`--dry-run`).

In: the shape of a model and the sizes of an engine. Out: bytes per device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dapo_async.model import ModelConfig
from dapo_async.model.parameters import parameter_shapes


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on each device of one engine."""

    weights: int
    kv_per_token: int  # keys and values of one token, over all layers
    kv_per_sequence: int  # of the longest sequence: prompt and response
    kv_all_slots: int  # if every slot held the longest sequence


def predict_engine_memory(
    model: ModelConfig, *, num_slots: int, max_len: int, num_bytes: int, tensor_parallel: int
) -> EngineMemory:
    """`num_bytes`: of one number in weights, keys and values.

    Weights: 1/tensor_parallel of all parameters. Keys and values of a token: 2 × layers × heads ×
    head size, where a device holds its share of the key heads, at least one.
    """
    parameters = sum(map(math.prod, parameter_shapes(model).values()))
    heads = max(1, model.num_kv_heads // tensor_parallel)
    per_token = 2 * model.num_layers * heads * model.head_dim * num_bytes
    return EngineMemory(
        weights=-(-parameters * num_bytes // tensor_parallel),
        kv_per_token=per_token,
        kv_per_sequence=per_token * max_len,
        kv_all_slots=per_token * max_len * num_slots,
    )
