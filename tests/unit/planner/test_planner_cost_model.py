"""Rates from a model's config and a GPU's name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dapo_async.planner.cost_model import (
    Efficiency,
    PlannedModel,
    engine_speed,
    fewest_learner_gpus,
    find_gpu,
    learner_speed,
    model_of,
    read_model,
)
from dapo_async.planner.settings import read_scenario

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40_960,
    "head_dim": 128,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
QWEN3_06B = {
    **QWEN3,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 3072,
}
QWEN3_4B = {
    **QWEN3,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 9728,
}
QWEN3_30B_A3B = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
SMALL, MIDDLE, MIXTURE = map(model_of, (QWEN3_06B, QWEN3_4B, QWEN3_30B_A3B))
H100, USUAL = find_gpu("H100"), Efficiency()


@pytest.mark.parametrize(
    ("model", "billions"), [(SMALL, 0.596), (MIDDLE, 4.022), (MIXTURE, 30.53)], ids=str
)
def test_the_number_of_parameters_is_the_published_one(
    model: PlannedModel, billions: float
) -> None:
    assert model.num_parameters / 1e9 == pytest.approx(billions, rel=0.001)


@pytest.mark.parametrize(
    ("context", "mfu", "tokens_per_s"), [(16_384, 0.111, 11_900), (65_536, 0.268, 10_150)]
)
def test_training_at_a_published_mfu_has_the_published_rate(
    context: int, mfu: float, tokens_per_s: float
) -> None:
    """prime-rl, Qwen3-0.6B on one H100."""
    speed = learner_speed(
        SMALL,
        H100,
        gpus=1,
        prompt_tokens=0,
        response_tokens=context,
        group_size=1,
        efficiency=Efficiency(mfu=mfu),
    )
    assert 1 / speed.token_s == pytest.approx(tokens_per_s, rel=0.01)


def test_a_mixture_reads_the_experts_that_its_batch_chose() -> None:
    one, all_weights = MIXTURE.read_bytes(1), MIXTURE.weights_bytes
    assert one / 2e9 == pytest.approx(3.03, rel=0.01)  # active, without the embedding
    assert one < MIXTURE.read_bytes(8) < MIXTURE.read_bytes(64) < all_weights
    embedding = 2 * 151_936 * 2048
    assert MIXTURE.read_bytes(4096) == pytest.approx(all_weights - embedding, rel=1e-4)
    assert MIDDLE.read_bytes(1) == MIDDLE.read_bytes(64) == MIDDLE.weights_bytes


def test_a_decode_step_reads_weights_and_kv_at_the_reached_bandwidth() -> None:
    efficiency = Efficiency(step_s=0.0)
    speed = engine_speed(MIDDLE, H100, gpus=1, slots=64, efficiency=efficiency)
    reached = 3.35e12 * 0.6
    assert speed.step_s[1] == pytest.approx(2 * 4.022e9 / reached, rel=0.001)
    assert speed.context_s == pytest.approx(2 * 36 * 8 * 128 * 2 / reached)
    assert speed.kv_tokens == pytest.approx((80e9 * 0.88 - 8.045e9) / 147_456, rel=0.001)


def test_a_large_batch_is_bound_by_its_flops() -> None:
    speed = engine_speed(MIDDLE, H100, gpus=1, slots=1024, efficiency=Efficiency(step_s=0.0))
    assert speed.step_s[64] == speed.step_s[1]
    assert speed.step_s[1024] == pytest.approx(2 * speed.step_s[512])
    assert speed.step_s[1024] > 2 * speed.step_s[1]


@pytest.mark.parametrize("model", [MIDDLE, MIXTURE], ids=["dense", "mixture"])
def test_more_gpus_per_engine_and_better_hardware_are_faster(model: PlannedModel) -> None:
    def step_s(gpu: str, gpus: int) -> float:
        speed = engine_speed(model, find_gpu(gpu), gpus=gpus, slots=64, efficiency=USUAL)
        return speed.step_s[64] + speed.context_s * 64 * 4000

    assert step_s("H100", 4) < step_s("H100", 2)
    assert step_s("H200", 2) < step_s("H100", 2) < step_s("A100", 2)


def test_a_learner_twice_as_large_is_twice_as_fast() -> None:
    def token_s(gpus: int, response: int) -> float:
        return learner_speed(
            MIDDLE,
            H100,
            gpus=gpus,
            prompt_tokens=200,
            response_tokens=response,
            group_size=8,
            efficiency=USUAL,
        ).token_s

    assert token_s(8, 1000) == pytest.approx(2 * token_s(16, 1000))
    assert token_s(8, 8000) > 1.1 * token_s(8, 1000), "attention grows with the response"


def test_memory_sets_the_fewest_gpus_of_the_learner() -> None:
    assert fewest_learner_gpus(MIDDLE, H100, USUAL) == 2  # 64.4 GB, 56 GB of each GPU
    assert fewest_learner_gpus(MIXTURE, H100, USUAL) == 9


def scenario_values(path: Path, **engine: Any) -> dict[str, Any]:
    return {
        "engines": 4,
        "model": {"path": str(path), "gpu": "H100"},
        "engine": {"slots": 64, **engine},
        "learner": {"gpus": 4},
        "lengths": {"mean": 1000, "max": 4000},
        "replay": {"groups_per_step": 16},
        "plan": {"gpus": 8},
    }


def test_a_scenario_with_a_model_needs_no_rates_and_keeps_measured_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    scenario, cluster = read_scenario(scenario_values(tmp_path))
    assert scenario.engine == engine_speed(MIDDLE, H100, gpus=1, slots=64, efficiency=USUAL)
    assert cluster.fewest_learner_gpus == 2
    measured, _ = read_scenario(scenario_values(tmp_path / "config.json", prefill_s=3e-5))
    assert measured.engine == replace(scenario.engine, prefill_s=3e-5)
    assert measured.train_s == scenario.train_s


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpu": "H9000"}, "model.gpu \\('H9000'\\) is not known; give one of GB200"),
        ({"path": "/none"}, "has no config.json"),
        ({"mfu": 0}, "model.mfu \\(0\\) must be above 0"),
        ({"flops": 3}, "unknown key model.flops"),
    ],
)
def test_a_wrong_model_section_is_refused_in_one_line(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    values = scenario_values(tmp_path)
    values["model"].update(changes)
    with pytest.raises(ValueError, match=says):
        read_scenario(values)


def test_a_model_that_does_not_fit_its_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="weights \\(61 GB\\) do not fit an engine of 1 L40S"):
        engine_speed(MIXTURE, find_gpu("L40S"), gpus=1, slots=8, efficiency=USUAL)
    with pytest.raises(ValueError, match=r"engine\.gpus \(3\) must divide the model's 32"):
        engine_speed(MIDDLE, H100, gpus=3, slots=8, efficiency=USUAL)


def test_a_mixture_with_dense_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="layers without experts"):
        model_of({**QWEN3_30B_A3B, "mlp_only_layers": [0]})
    with pytest.raises(ValueError, match="must be whole numbers above 0"):
        model_of({**QWEN3_30B_A3B, "num_experts": 4})


def test_a_model_is_read_from_its_folder_or_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    assert read_model(tmp_path) == read_model(tmp_path / "config.json") == MIXTURE
