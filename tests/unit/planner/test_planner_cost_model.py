"""Rates from a model's config and a GPU's name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dapo_async.model.cost import recomputed_flops, train_flops
from dapo_async.planner.cost_model import (
    Efficiency,
    Training,
    engine_speed,
    fewest_learner_gpus,
    learner_form,
    learner_speed,
    publish_times,
    rank_bytes,
)
from dapo_async.planner.hardware import Gpu, find_gpu
from dapo_async.planner.planned_model import PlannedModel, model_of, read_model
from dapo_async.planner.settings import read_scenario
from dapo_async.planner.sweep import find_plan

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
SIMPLE = Efficiency(minibatch_s=0.0)
WORK = Training(
    prompt_tokens=200, response_tokens=3000, longest_tokens=8000, group_size=16, groups=64
)


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
    work = Training(
        prompt_tokens=0,
        response_tokens=context,
        longest_tokens=context,
        group_size=1,
        groups=1,
        recompute="none",  # an MFU counts nothing twice
    )
    speed = learner_speed(SMALL, H100, work, gpus=1, efficiency=Efficiency(mfu=mfu))
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


def test_published_mfu_counts_attention_by_the_hidden_size() -> None:
    """prime-rl, 64k tokens: 12 · layers · hidden · context, not halved for the causal mask.

    That equals the causal count where heads · head_dim is twice the hidden size, as in Qwen3-0.6B.
    In Qwen3-4B it is 1.6 times the hidden size, so the published count is 18 % higher.
    """
    for model, published, ratio in ((SMALL, 2.612e10, 1.0), (MIDDLE, 9.67e10, 1.178)):
        config = model.config
        attention = 12 * config.num_layers * config.hidden_size * 65_536
        assert 6 * model.num_parameters + attention == pytest.approx(published, rel=0.002)
        counted = train_flops(config, [(0, [65_536])]) / 65_536
        assert published / counted == pytest.approx(ratio, rel=0.003)


def test_a_compute_bound_learner_twice_as_large_is_twice_as_fast() -> None:
    def token_s(gpus: int, response: int = 1000) -> float:
        work = replace(WORK, response_tokens=response, microbatch_tokens=100_000)
        return learner_speed(MIDDLE, H100, work, gpus=gpus, efficiency=USUAL).token_s

    assert token_s(2) == pytest.approx(2 * token_s(4))
    assert token_s(8, 8000) > 1.1 * token_s(8, 1000), "attention grows with the response"


def test_many_gpus_are_limited_by_the_exchange_of_parameters() -> None:
    """Each pass gathers 8 bytes per parameter, and every rank has at least one pass."""

    def minibatch_s(gpus: int, tensor_parallel: int = 1) -> float:
        work = replace(WORK, recompute="none", zero_stage=3)
        speed = learner_speed(
            MIDDLE, H100, work, gpus=gpus, tensor_parallel=tensor_parallel, efficiency=SIMPLE
        )
        return speed.token_s * work.tokens

    one_pass = 255 / 256 * 8 * MIDDLE.num_parameters / 25e9
    assert minibatch_s(256) == pytest.approx(one_pass, rel=1e-6)
    assert minibatch_s(512) == pytest.approx(one_pass, rel=0.01), "more GPUs change nothing"
    assert minibatch_s(8) > 4 * minibatch_s(256)
    assert minibatch_s(8, 8) > minibatch_s(8), "tensor parallelism exchanges tokens"


def test_auto_is_the_fastest_form_that_fits_and_a_given_one_stays() -> None:
    def form(gpus: int, work: Training = WORK, model: PlannedModel = MIDDLE) -> tuple[str, int]:
        return learner_form(model, H100, work, gpus=gpus, tensor_parallel=1, efficiency=USUAL)

    assert [form(gpus) for gpus in (1, 2, 4, 8)] == [
        ("all", 3),  # does not fit either
        ("all", 2),
        ("all", 1),
        ("mlp", 2),
    ]
    small = replace(WORK, longest_tokens=4000, microbatch_tokens=4096)
    assert form(8, small) == ("none", 1)
    assert form(8, replace(WORK, recompute="none", zero_stage=3)) == ("none", 3)
    assert form(8, replace(WORK, zero_stage=3)) == ("mlp", 3)


@pytest.mark.parametrize("recompute", ["mlp", "all"])
def test_what_is_computed_again_takes_its_time(recompute: Any) -> None:
    def token_s(recompute: Any) -> float:
        work = replace(WORK, recompute=recompute)
        return learner_speed(MIDDLE, H100, work, gpus=1, efficiency=SIMPLE).token_s

    once = train_flops(MIDDLE.config, [WORK.siblings])
    again = recomputed_flops(MIDDLE.config, [WORK.siblings], recompute)
    assert token_s(recompute) / token_s("none") == pytest.approx(1 + again / once)
    assert again / once > 0.1


def test_a_further_forward_pass_takes_a_third_of_a_training_pass() -> None:
    plain = replace(WORK, recompute="none")
    once, more = (
        learner_speed(MIDDLE, H100, work, gpus=1, efficiency=SIMPLE).token_s
        for work in (plain, replace(plain, forwards=0.75))
    )
    assert more / once == pytest.approx(1 + 0.75 / 3)


@pytest.mark.parametrize(
    ("stage", "per_pass", "once"), [(3, 2 + 2 + 4, 0), (2, 4, 2), (1, 0, 2 + 4)]
)
def test_lower_zero_stages_exchange_less_in_many_passes(
    stage: int, per_pass: int, once: int
) -> None:
    """Bytes per parameter, where the link is so slow that nothing else takes time."""
    slow = replace(H100, link_bytes_per_s=1.0)
    work = replace(WORK, zero_stage=stage)
    speed = learner_speed(MIDDLE, slow, work, gpus=2, efficiency=replace(SIMPLE, link=1.0))
    passes = -(-work.tokens // 2 // work.microbatch_tokens)
    assert passes == 100
    moved = MIDDLE.num_parameters / 2 * (passes * per_pass + once)
    assert speed.token_s * work.tokens == pytest.approx(moved, rel=1e-6)


def test_the_optimizer_and_launches_are_the_fixed_time_of_a_minibatch() -> None:
    speed = learner_speed(MIDDLE, H100, WORK, gpus=8, efficiency=USUAL)
    optimizer_s = 32 * MIDDLE.num_parameters / 8 / 3.35e12
    assert speed.fixed_s == pytest.approx(0.2 + optimizer_s)


@pytest.mark.parametrize("disk", [False, True])
def test_a_publish_takes_the_time_of_its_bytes(disk: bool) -> None:
    seconds, pause_s = publish_times(MIDDLE, disk=disk, efficiency=USUAL)
    once_s = MIDDLE.weights_bytes / (2e9 if disk else 8.4e9)
    assert pause_s == pytest.approx(once_s), "an engine stands still while it receives or reads"
    assert seconds == pytest.approx(36 * 0.14 + (2 if disk else 1) * once_s), (
        "a disk is also written"
    )


def test_memory_sets_the_fewest_gpus_of_the_learner() -> None:
    fewest = fewest_learner_gpus(MIDDLE, H100, WORK, efficiency=USUAL)
    assert fewest == 2
    assert rank_bytes(MIDDLE, WORK, gpus=1, tensor_parallel=1) > 0.85 * 80e9
    assert 16 * MIDDLE.num_parameters / 2 < rank_bytes(MIDDLE, WORK, gpus=2, tensor_parallel=1)
    longer = replace(WORK, longest_tokens=200_000, recompute="none")
    with pytest.raises(ValueError, match="does not fit a H100 with microbatches of 200200 tokens"):
        fewest_learner_gpus(MIDDLE, H100, longer, efficiency=USUAL)
    assert fewest_learner_gpus(
        MIXTURE, H100, WORK, efficiency=USUAL
    ) > 16 * MIXTURE.num_parameters / (0.85 * 80e9)


def test_tensor_parallel_ranks_hold_fewer_activations() -> None:
    split, whole = (rank_bytes(MIDDLE, WORK, gpus=8, tensor_parallel=ranks) for ranks in (8, 1))
    assert split < 0.7 * whole


LONG = replace(
    WORK, longest_tokens=60_000, microbatch_tokens=60_200, recompute="none", zero_stage=3
)


def test_context_parallel_ranks_share_the_activations_of_long_responses() -> None:
    whole, half, quarter = (
        rank_bytes(MIDDLE, LONG, gpus=8, tensor_parallel=1, context_parallel=ranks)
        for ranks in (1, 2, 4)
    )
    assert half - quarter == pytest.approx((whole - half) / 2, rel=0.1)
    assert quarter < 0.4 * whole
    with pytest.raises(ValueError, match=r"raise learner\.context_parallel or"):
        fewest_learner_gpus(MIDDLE, H100, LONG, efficiency=USUAL)
    assert fewest_learner_gpus(MIDDLE, H100, LONG, context_parallel=8, efficiency=USUAL) % 8 == 0


def test_context_parallel_ranks_exchange_heads_and_more_parameters() -> None:
    def token_s(gpus: int, context_parallel: int, work: Training = LONG) -> float:
        return learner_speed(
            MIDDLE, H100, work, gpus=gpus, context_parallel=context_parallel, efficiency=SIMPLE
        ).token_s

    # Per layer and token: 16 query heads and 4 of keys to the other rank, and back, twice.
    moved = 2 * 36 * 2 * (16 + 4) * 128 * 2
    assert token_s(8, 2) - token_s(8, 1) == pytest.approx(moved / 8 / 450e9 / 0.6, rel=1e-6)
    # Over the network a pass exchanges the same parameters for fewer tokens of a rank.
    assert token_s(256, 4, replace(LONG, groups=1024)) > 1.2 * token_s(
        256, 1, replace(LONG, groups=1024)
    )


def test_a_gb200_exchanges_by_its_link_within_a_rack_and_has_machines_of_four() -> None:
    gpu = find_gpu("GB200")
    assert (gpu.node_gpus, gpu.link_gpus, H100.node_gpus, H100.link_gpus) == (4, 72, 8, 8)
    work = replace(LONG, groups=64)

    def gather_s(gpu: Gpu, gpus: int) -> float:
        few = replace(USUAL, mfu=1.0)
        fast = replace(gpu, network_bytes_per_s=1e18, link_bytes_per_s=1e18)
        slow, quick = (
            learner_speed(MIDDLE, each, work, gpus=gpus, efficiency=few).token_s
            for each in (gpu, fast)
        )
        return slow - quick

    assert gather_s(replace(gpu, link_gpus=8), 64) > gather_s(gpu, 64)
    assert gather_s(gpu, 72) == gather_s(replace(gpu, network_bytes_per_s=1.0), 72)


def test_a_file_describes_another_gpu(tmp_path: Path) -> None:
    file = tmp_path / "gpus.yaml"
    file.write_text("{MI300X: {tflops: 1307, tb_per_s: 5.3, memory_gb: 192, link_gb_per_s: 448}}")
    gpu = find_gpu("MI300X", file)
    assert (gpu.peak.flops_per_s, gpu.memory_bytes) == (1307e12, 192e9)
    assert (gpu.network_bytes_per_s, gpu.node_gpus, gpu.link_gpus) == (50e9, 8, 8)
    assert find_gpu("H100", file) == H100
    file.write_text(
        "{A: {tflops: 1, tb_per_s: 1, memory_gb: 1, link_gb_per_s: 1, node_gpus: 4, link_gpus: 64}}"
    )
    assert (find_gpu("A", file).node_gpus, find_gpu("A", file).link_gpus) == (4, 64)
    file.write_text("{MI300X: {tflops: 1307, tb_per_s: 5.3, memory_gb: 192, link_gb_per_s: 448}}")
    values = scenario_values(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    values["model"] = {"path": "config.json", "gpu": "MI300X", "hardware": "gpus.yaml"}
    scenario, _ = read_scenario(values, folder=tmp_path)
    assert scenario.engine.step_s[1] == pytest.approx(0.002 + MIDDLE.read_bytes(1) / 5.3e12 / 0.6)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{MI300X: {tflops: 1307}}", "MI300X must have tflops, tb_per_s"),
        ("[1]", "must hold GPUs by name"),
        (
            "{A: {tflops: x, tb_per_s: 1, memory_gb: 1, link_gb_per_s: 1}}",
            "A.tflops \\('x'\\) must",
        ),
        ("{", "is not valid YAML"),
        (None, "can't be read"),
    ],
)
def test_a_wrong_hardware_file_is_refused_in_one_line(
    content: str | None, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "gpus.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=says) as raised:
        find_gpu("MI300X", file)
    assert "\n" not in str(raised.value)


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
    assert not cluster.rates.learner_fits(gpus=1, tensor_parallel=1)
    assert cluster.rates.learner_fits(gpus=2, tensor_parallel=1)
    assert scenario.publish_s == pytest.approx(36 * 0.14 + MIDDLE.weights_bytes / 8.4e9)
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
        ({"transport": "rdma"}, "model.transport \\('rdma'\\) must be one of broadcast, disk"),
        ({"recompute": 3}, "model.recompute \\(3\\) must be auto or one of none, mlp, all"),
        ({"zero_stage": True}, "model.zero_stage \\(True\\) must be auto or one of 1, 2, 3"),
        ({"microbatch_tokens": 0}, "model.microbatch_tokens \\(0\\) must be a whole number"),
        ({"sync_gb_per_s": 0}, "model.sync_gb_per_s \\(0\\) must be above 0"),
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


@pytest.mark.parametrize("section", ["engine", "learner"])
def test_a_section_that_holds_no_keys_is_refused_with_a_model_too(
    section: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    with pytest.raises(ValueError, match=rf"{section} \(5\) must be a section of keys"):
        read_scenario({**scenario_values(tmp_path), section: 5})


def test_a_learner_that_the_model_cannot_be_split_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    values = scenario_values(tmp_path)
    values["plan"] = {"gpus": 8, "tensor_parallel": [3]}
    with pytest.raises(ValueError, match=r"learner\.tensor_parallel \(3\) must divide") as raised:
        find_plan(*read_scenario(values))
    assert "\n" not in str(raised.value)


def test_a_model_that_does_not_fit_its_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="weights \\(61 GB\\) do not fit an engine of 1 L40S"):
        engine_speed(MIXTURE, find_gpu("L40S"), gpus=1, slots=8, efficiency=USUAL)
    with pytest.raises(ValueError, match=r"engine\.gpus \(3\) must divide the model's 32"):
        engine_speed(MIDDLE, H100, gpus=3, slots=8, efficiency=USUAL)


def test_a_mixture_may_have_dense_layers_and_not_fewer_experts_than_a_token_uses() -> None:
    mixed = model_of({**QWEN3_30B_A3B, "mlp_only_layers": [0]})
    layer = 128 * 3 * 2048 * 768 + 128 * 2048  # experts and router
    assert MIXTURE.num_parameters - mixed.num_parameters == layer - 3 * 2048 * 6144
    with pytest.raises(ValueError, match=r"num_experts_per_tok \(8\) must be at most num_experts"):
        model_of({**QWEN3_30B_A3B, "num_experts": 4})


def test_mixtral_has_its_published_number_of_parameters() -> None:
    values = {
        **QWEN3,
        "model_type": "mixtral",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
    assert model_of(values).num_parameters / 1e9 == pytest.approx(46.70, rel=0.001)


def test_a_model_is_read_from_its_folder_or_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    assert read_model(tmp_path) == read_model(tmp_path / "config.json") == MIXTURE
