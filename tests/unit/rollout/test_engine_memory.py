"""The predicted memory of an engine is that of the native engine's tensors."""

from __future__ import annotations

import pytest
from paths import CONFIGS

from dapo_async.model import ModelConfig, load_decoder
from dapo_async.rollout.memory import predict_engine_memory
from dapo_async.rollout.native.kv_cache import KVCache

FOLDER = CONFIGS / "base" / "quickstart"


def test_prediction_is_what_the_native_engine_allocates() -> None:
    decoder = load_decoder(FOLDER)
    memory = predict_engine_memory(
        decoder.config, num_slots=8, max_len=64, num_bytes=4, tensor_parallel=1
    )
    assert memory.weights == sum(each.nbytes for each in decoder.parameters())
    weight = decoder.head_weight
    cache = KVCache(
        decoder.config, num_slots=8, max_len=64, dtype=weight.dtype, device=weight.device
    )
    assert memory.kv_all_slots == cache.kv.nbytes
    assert memory.kv_per_sequence == 64 * memory.kv_per_token == cache.kv[:, :, :1].nbytes


@pytest.mark.parametrize(("tensor_parallel", "share"), [(1, 1.0), (2, 0.5)])
def test_ranks_of_an_engine_share_weights_and_key_heads(tensor_parallel: int, share: float) -> None:
    model = ModelConfig.from_folder(FOLDER)
    sizes = {"num_slots": 8, "max_len": 64, "num_bytes": 2}
    whole = predict_engine_memory(model, **sizes, tensor_parallel=1)
    part = predict_engine_memory(model, **sizes, tensor_parallel=tensor_parallel)
    assert part.weights == pytest.approx(whole.weights * share, abs=1)
    heads = max(1, model.num_kv_heads // tensor_parallel) / model.num_kv_heads
    assert part.kv_per_token == whole.kv_per_token * heads
