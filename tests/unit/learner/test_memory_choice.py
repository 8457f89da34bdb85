"""What `auto` means for a learner: recomputation, ZeRO stage and tokens of a pass, by memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from paths import CONFIGS, QUICKSTART

from dapo_async import config as knobs
from dapo_async.config import Config
from dapo_async.learner.memory_choice import MemoryChoice, choose_by_memory, rank_budget
from dapo_async.model import ModelConfig
from dapo_async.planner.cost_model import Efficiency, Training, learner_form
from dapo_async.planner.hardware import find_gpu
from dapo_async.planner.planned_model import PlannedModel

SIZES = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
SEVEN_B = ModelConfig.from_dict(
    {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **SIZES,
    }
)
GB = 10**9


def chosen(gigabytes: float, *overrides: str) -> MemoryChoice:
    config = knobs.load(CONFIGS / "dapo_qwen2.5_7b_math.yaml", [*AUTO, *overrides])
    return choose_by_memory(config, SEVEN_B, device_bytes=int(gigabytes * GB))


AUTO = (
    "learner.recompute=auto",
    "learner.microbatch_tokens=auto",
    "learner.zero_stage=auto",
    "data.max_prompt_tokens=1024",
    "rollout.max_response_tokens=3072",
    "reward.overlong_cache_tokens=1024",
)


def triple(choice: MemoryChoice) -> tuple[str, int | str, int | str]:
    learner = choice.learner
    return learner.recompute, learner.zero_stage, learner.microbatch_tokens


def test_less_memory_takes_ever_slower_choices_and_each_fits() -> None:
    """The learner of the 7B recipe, 8 x 4 ranks, on ever smaller GPUs."""
    expected = {
        180: ("none", 1, 65_536),
        96: ("none", 1, 32_768),
        80: ("none", 1, 16_384),
        48: ("mlp", 1, 16_384),
        32: ("mlp", 2, 16_384),
        24: ("all", 2, 16_384),
        20: ("all", 3, 16_384),
        16: ("all", 3, 4096),
    }
    choices = {size: chosen(size) for size in expected}
    assert {size: triple(choice) for size, choice in choices.items()} == expected
    for choice in choices.values():
        assert choice.memory.on_device <= choice.budget
    none = chosen(12)
    assert triple(none) == ("all", 3, 1024)
    assert none.memory.on_device > none.budget


@pytest.mark.parametrize("gigabytes", [80, 48, 32, 24, 20])
def test_the_planner_expects_the_form_that_the_learner_chooses(gigabytes: int) -> None:
    config = knobs.load(CONFIGS / "dapo_qwen2.5_7b_math.yaml", [*AUTO])
    gpu = replace(find_gpu("H100"), memory_bytes=gigabytes * GB)
    work = Training(
        prompt_tokens=config.data.max_prompt_tokens,
        response_tokens=1000,
        longest_tokens=config.rollout.max_response_tokens,
        group_size=config.replay.group_size,
        groups=32,
        several_minibatches=True,
    )
    form = learner_form(
        PlannedModel(SEVEN_B), gpu, work, gpus=32, tensor_parallel=4, efficiency=Efficiency()
    )
    assert form == triple(chosen(gigabytes))[:2]


def test_what_is_given_stays_though_it_does_not_fit() -> None:
    choice = chosen(24, "learner.recompute=none", "learner.zero_stage=1")
    assert triple(choice)[:2] == ("none", 1)
    whole = chosen(
        24, "learner.recompute=none", "learner.zero_stage=1", "learner.microbatch_tokens=8192"
    )
    assert triple(whole) == ("none", 1, 8192)
    assert "(given): " in whole.line
    assert " is more than the " in whole.line


def test_a_shared_gpu_counts_half_and_ranks_of_a_cpu_share_the_machine() -> None:
    config = knobs.load(CONFIGS / "gsm8k_0.5b_1gpu.yaml")
    assert rank_budget(config, 100) == 85
    ranks = ["learner.data_parallel=2", "learner.tensor_parallel=2"]
    assert rank_budget(knobs.load(QUICKSTART, ranks), 800) == 100


def test_a_small_model_on_a_cpu_is_trained_as_before() -> None:
    config: Config = knobs.load(QUICKSTART)
    model = ModelConfig.from_folder(CONFIGS / "base" / "quickstart")
    choice = choose_by_memory(config, model, device_bytes=16 * GB)
    assert triple(choice) == ("none", 1, 16_384)
    assert choice.line.startswith("recompute none, microbatch_tokens 16384 (chosen by memory): 0.")


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_dtype_of_the_sum_of_gradients_is_a_knob(kind: str) -> None:
    config = knobs.load(QUICKSTART, [f"learner.reduce_dtype={kind}"])
    assert config.learner.reduce_dtype == kind
