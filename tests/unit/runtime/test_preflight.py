"""What a run reads is checked in the driver: wrong input is one clear line before the start."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blocked_imports import run_without
from paths import QUICKSTART
from refusals import refusal
from safetensors.torch import load_file, save_file

from dapo_async import config as knobs
from dapo_async.runtime import preflight
from dapo_async.runtime.preflight import check_inputs
from dapo_async.tracking.run_dir import RunDir


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the quickstart's model."""
    return Path(shutil.copytree(knobs.load(QUICKSTART).model.path, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in values.items() if value is not None})
    )


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_unknown_objective_and_what_an_objective_does_not_take_are_refused() -> None:
    assert (
        refusal("algorithm.objective=ppo")
        == "objective ('ppo') is unknown; set one of dapo, gspo, cispo"
    )
    assert "dual_clip (3.0) has no meaning for objective cispo" in refusal(
        "algorithm.objective=cispo", "algorithm.dual_clip=3"
    )


def test_the_untouched_copy_is_accepted(folder: Path) -> None:
    check_inputs(knobs.load(QUICKSTART, [f"model.path={folder}"]))


def test_routing_replay_of_a_dense_model_is_refused() -> None:
    assert "routing_replay=true needs a model with experts" in refusal(
        "learner.routing_replay=true"
    )


def test_a_dry_run_shows_files_and_special_tokens_of_the_model(
    folder: Path,
) -> None:
    config = knobs.load(QUICKSTART, [f"model.path={folder}"])
    tokens = (
        "stop tokens 12 '<eos>' (config.json, generation_config.json, tokenizer_config.json), "
        "3 '3' (generation_config.json)",
        "pad        12 '<eos>' (tokenizer_config.json)",
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [12, 3]}')
    change_config(folder, eos_token_id=12)
    found = check_inputs(config, dry_run=True)
    assert found.model == ("model      qwen3, F32 weights in model.safetensors", *tokens)
    assert check_inputs(config).notes == ()
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    line = "F32 weights in model.safetensors; no part of the model: adapter_model.safetensors"
    found = check_inputs(config, dry_run=True)
    assert (found.model, found.notes) == ((f"model      qwen3, {line}", *tokens), ())
    assert check_inputs(config).notes == (f"model      {line}",)


def test_a_disk_without_space_for_a_checkpoint_is_refused_or_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = knobs.load(QUICKSTART, [f"run_dir={tmp_path / 'run'}", "ray.address=local"])
    asked: list[int] = []

    def too_full(root: Path, num_bytes: int) -> str:
        asked.append(num_bytes)
        return "it is full"

    monkeypatch.setattr(preflight, "too_full", too_full)
    with pytest.raises(ValueError, match="it is full"):
        check_inputs(config)
    assert check_inputs(config, dry_run=True).notes == (
        "could not start on this machine: it is full",
    )
    weights = load_file(Path(config.model.path) / "model.safetensors")
    assert asked == [12 * sum(tensor.numel() for tensor in weights.values())] * 2


def test_stop_tokens_may_be_in_generation_config_alone(folder: Path) -> None:
    change_config(folder, eos_token_id=None)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    check_inputs(knobs.load(QUICKSTART, [f"model.path={folder}"]))
    (folder / "generation_config.json").unlink()
    assert "so a response could never stop; add it" in refusal(f"model.path={folder}")


def test_a_chat_template_that_raises_for_a_system_turn_is_one_line(folder: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ messages[0].content }}"
    )
    (folder / "chat_template.jinja").write_text(template)
    config = [f"model.path={folder}", "data.template=chat"]
    check_inputs(knobs.load(QUICKSTART, config))
    assert refusal(*config, "data.system=hi") == (
        f"the chat template in {folder / 'chat_template.jinja'} fails: System role not supported; "
        "without a system turn it works: set data.system=null"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"hidden_size": None},
            "config.json: hidden_size (missing) must be a whole number of at least 1; copy",
        ),
        (
            {"num_attention_heads": 0},
            "config.json: num_attention_heads (0) must be a whole number of at least 1; copy",
        ),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads (4) must be a multiple of num_key_value_heads (3)",
        ),
        ({"vocab_size": "13"}, "vocab_size ('13') must be a whole number"),
        ({"rms_norm_eps": None}, "rms_norm_eps (missing) must be a positive number"),
        ({"rope_parameters": [1]}, "rope_parameters ([1]) must be an object"),
        ({"eos_token_id": "12"}, "eos_token_id ('12') must be a token id or a list of ids"),
        ({"eos_token_id": 13}, "eos_token_id (13) must be a token id or a list of ids, each from"),
        (
            {"num_hidden_layers": 4},
            "do not fit their config.json: missing ['model.layers.3.input_layernorm.weight', ",
        ),
        (
            {"num_hidden_layers": 2},
            "do not fit their config.json: unexpected ['model.layers.2.input_layernorm.weight', ",
        ),
        (
            {"vocab_size": 14},
            "of another shape ['model.embed_tokens.weight (13, 64) instead of (14, 64)']",
        ),
    ],
)
def test_a_config_json_that_does_not_say_what_is_needed_is_named(
    folder: Path, changes: dict[str, Any], line: str
) -> None:
    change_config(folder, **changes)
    said = refusal(f"model.path={folder}")
    assert line in said
    assert str(folder) in said


@pytest.mark.parametrize("content", [b"{", b"\xff{}", b"[1]"])
def test_a_config_json_that_is_no_json_object_is_named(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert refusal(f"model.path={folder}").startswith(f"{folder / 'config.json'} ")


def test_missing_misshapen_and_broken_weights_are_named(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    assert "missing ['model.norm.weight']; take both from one model" in refusal(
        f"model.path={folder}"
    )
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(65)}))
    assert "of another shape ['model.norm.weight (65,) instead of (64,)']" in refusal(
        f"model.path={folder}"
    )
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert refusal(f"model.path={folder}").startswith(
        f"{folder / 'model.safetensors'} is no readable safetensors file ("
    )
    (folder / "model.safetensors").unlink()
    assert "has no *.safetensors file; pickled weights are never loaded" in refusal(
        f"model.path={folder}"
    )


def test_a_wrong_tensor_parallel_size_names_those_that_work() -> None:
    line = refusal("learner.tensor_parallel=3")
    assert line.startswith(
        "learner.tensor_parallel (3) must divide the model's num_attention_heads 4, "
        "num_key_value_heads 2, intermediate_size "
    )
    assert line.endswith("; set it to one of 1, 2, 4")


def test_a_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert refusal(f"model.path={folder}").startswith(
        f"the tokenizer of {folder} can't be loaded: "
    )


def test_a_tokenizer_of_a_larger_model_is_refused(folder: Path) -> None:
    change_weights(
        folder, lambda weights: weights.update({"model.embed_tokens.weight": torch.zeros(5, 64)})
    )
    change_config(folder, vocab_size=5, eos_token_id=4)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "but vocab_size of the model is 5; take tokenizer and weights from one model" in refusal(
        f"model.path={folder}"
    )


def test_a_data_file_that_is_not_utf_8_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "latin.jsonl"
    file.write_bytes(
        b'{"prompt": "1+1", "answer": "2"}\n' + '{"prompt": "ü", "answer": "2"}\n'.encode("latin-1")
    )
    assert (
        refusal(f"data.heldout={file}")
        == f"line 2 of {file} is not UTF-8 (invalid start byte at byte 12); "
        "convert the file to UTF-8"
    )


def test_more_gpus_than_the_machine_has_are_refused_for_an_own_ray_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert refusal("model.device=cuda") == (
        "the run reserves 2 GPUs (replay 0, learner 1, rollout-0 1, evaluator 0), "
        "this machine has 1 CUDA devices; set model.device=cpu, or model.placement=shared for "
        "one GPU, or ray.address to a cluster that has them"
    )
    shared = ["model.device=cuda", "model.placement=shared", "weights.transport=disk"]
    check_inputs(knobs.load(QUICKSTART, ["ray.address=local", *shared]))
    check_inputs(knobs.load(QUICKSTART, ["model.device=cuda", "ray.address=10.0.0.1:6379"]))


def test_a_run_dir_that_can_not_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(
        ValueError, match=r"notes.txt/run can't be made: .*notes.txt is a file; choose another"
    ):
        RunDir.create(tmp_path / "notes.txt" / "run")
    with pytest.raises(
        ValueError, match=r"run_dir /proc/x can't be made: .*; choose another run_dir"
    ):
        RunDir.create(Path("/proc/x"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_driver_of_a_run_on_cpus_needs_no_torch() -> None:
    script = f"""
from dapo_async.config import load
from dapo_async.runtime.preflight import check_inputs
import dapo_async.runtime.run

check_inputs(load({str(QUICKSTART)!r}, ["ray.address=local"]))
"""
    ran = run_without(["torch", "aiohttp", "transformers", "matplotlib"], script)
    assert (ran.returncode, ran.stderr) == (0, "")
