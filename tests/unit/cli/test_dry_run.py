"""A dry run: devices of each side, credits against slots, memory and what is left of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import constants
from paths import CONFIGS, QUICKSTART

from dapo_async import config as knobs
from dapo_async.cli import dry_run
from dapo_async.cli.dry_run import Device, dry_run_lines

GPU_RECIPE = CONFIGS / "dapo_qwen2.5_7b_math.yaml"
QWEN_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "eos_token_id": 151645,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with the config of a 7B model, and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    return f"model.path={tmp_path}"


def printed(file: Path, *overrides: str) -> list[str]:
    config = knobs.load(file, ["ray.address=local", *overrides])
    return list(dry_run_lines(config, Path("runs/x"), first_step=0))


def one(lines: list[str], part: str) -> str:
    (line,) = [line for line in lines if part in line]
    return line


def test_gpus_of_each_side_add_up(model: str) -> None:
    config = knobs.load(GPU_RECIPE, [model])
    line = one(printed(GPU_RECIPE, model), " GPUs: ")
    learner = config.learner.data_parallel * config.learner.tensor_parallel
    rollout = config.rollout.num_workers * config.rollout.tensor_parallel
    assert f"{learner} for the learner" in line
    assert f"{rollout} for rollout" in line
    assert int(line.split()[0]) == learner + rollout + config.gpus_of_evaluator


def test_context_parallel_ranks_are_named_and_hold_a_part_of_the_activations(model: str) -> None:
    file, fixed = CONFIGS / "dapo_qwen2.5_7b_20k.yaml", "learner.recompute=none"
    lines = printed(file, model)
    assert "(data_parallel 1 x context_parallel 8 x tensor_parallel 1)" in one(lines, " GPUs: ")
    assert one(lines, "learner-7 ").endswith("dp 1 x cp 8 x tp 1")
    shared, alone = (
        float(re.findall(r"activations ([\d,.]+)", " ".join(each))[0].replace(",", ""))
        for each in (
            printed(file, model, fixed),
            printed(file, model, fixed, "learner.context_parallel=1", "learner.data_parallel=8"),
        )
    )
    assert shared < alone / 6


def test_memory_of_an_engine_names_what_is_left_of_the_gpu(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "_own_gpu", lambda: Device("a test GPU", 80 * 10**9))
    lines = printed(
        GPU_RECIPE,
        model,
        "rollout.tensor_parallel=1",
        "rollout.num_slots=64",
        "data.max_prompt_tokens=1024",
        "rollout.max_response_tokens=3072",
        "reward.overlong_cache_tokens=1024",
    )
    # 7.6 billion parameters of 2 bytes; 2 x 28 layers x 4 heads x 128 x 2 bytes per token.
    assert "14.2 GiB of weights, and 224.0 MiB of keys and values per sequence of 4096 tokens" in (
        one(lines, "each engine would hold")
    )
    assert one(lines, "an engine with all slots: ") == (
        "an engine with all slots: 38.9 GiB left of the 67.1 GiB usable on a test GPU"
    )
    assert one(lines, "room for") == (
        "an engine has room for 241 sequences of the longest length on a test GPU"
    )


def test_choice_of_recomputation_is_printed_with_the_memory_it_follows_from(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "_own_gpu", lambda: Device("a test GPU", 48 * 10**9))
    assert one(printed(GPU_RECIPE, model), "learner: ") == (
        "learner: recompute mlp, zero_stage 1, microbatch_tokens 16384 (chosen by memory): "
        "30.68 GiB of the 38.00 GiB that a learner rank should fill at most"
    )
    monkeypatch.setattr(dry_run, "_own_gpu", lambda: None)
    line = one(printed(GPU_RECIPE, model), "learner (on a GPU of 80 GB): ")
    assert "recompute none, zero_stage 1" in line


def test_gpu_that_would_be_large_enough_is_named_on_a_machine_without_one(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "_own_gpu", lambda: None)
    lines = printed(GPU_RECIPE, model, "rollout.tensor_parallel=1", "rollout.num_slots=16")
    assert "would need a GPU with 40 GB or more" in one(lines, "an engine with all slots")


def test_gpu_that_is_too_small_is_named_with_what_is_missing(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "_own_gpu", lambda: Device("a small GPU", 16 * 10**9))
    lines = printed(GPU_RECIPE, model, "rollout.tensor_parallel=1")
    assert "too much for the 13.4 GiB usable on a small GPU" in one(lines, "an engine with all")
    assert one(lines, "room for").startswith("an engine has room for 0 sequences")


def test_on_a_shared_gpu_the_larger_turn_has_to_fit_and_not_both(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "_own_gpu", lambda: Device("a test GPU", 180 * 10**9))
    recipe = CONFIGS / "gsm8k_0.5b_1gpu.yaml"
    lines = printed(recipe, model)
    assert "take turns on the same GPUs: 1 x one rank and one engine" in one(lines, "take turns")
    # 7.6 billion parameters: 12 bytes for weights and moments, 4 for those of the start of a step,
    # the copy that is published and the one for files, of 2 each.
    assert one(lines, "host memory of each pair").startswith(
        "host memory of each pair of rank and engine: 141.9 GiB while the engine generates, "
        "14.2 GiB while the rank trains"
    )
    needed = one(lines, "which needs more than the other's: ")
    assert needed.startswith("the learner's turn, ")
    slots = printed(recipe, model, "rollout.num_slots=4000")
    assert one(slots, "which needs more than the other's: ").startswith("the engine's turn, ")


def test_credits_are_compared_with_slots() -> None:
    assert one(printed(QUICKSTART), "sequences in flight") == (
        "enough credits: up to 1536 sequences in flight for the 128 slots of all engines"
    )
    few = one(printed(QUICKSTART, "rollout.num_slots=2000"), "sequences in flight")
    assert few.startswith("credits allow 1536 sequences in flight")


def test_run_on_cpus_is_compared_with_the_memory_that_is_free() -> None:
    assert "free" in one(printed(QUICKSTART), "learner and engines together would need")


def test_model_of_the_hub_that_can_not_be_asked_leaves_the_memory_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    gone = template.replace(constants.ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", gone)
    line = one(printed(GPU_RECIPE), "memory is not known")
    assert "can't be read from the Hugging Face hub" in line
