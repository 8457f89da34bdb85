"""Which files of a folder are the model, against what transformers loads from the same folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from dapo_async.model import ModelConfig, find_weights, folder_for_sglang, load_decoder

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
INDEX = "model.safetensors.index.json"
NUM_SHARDS = 4


def make_folder(folder: Path, *, tied: bool = True, shards: int = NUM_SHARDS) -> Path:
    """A small random model, by default in four shards with an index."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=3,
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "whole")
    weights = load_file(folder / "whole" / "model.safetensors")
    (folder / "config.json").write_text((folder / "whole" / "config.json").read_text())
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    places: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        save(folder / file, {name: weights[name] for name in mine})
        places |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def save(path: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, path, metadata={"format": "pt"})


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def change_config(folder: Path, **changes: Any) -> None:
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(values))


def change_file(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save(path, weights)


def assert_as_transformers(folder: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in load_decoder(folder).state_dict().items():
        torch.testing.assert_close(tensor, expected[name].float(), atol=0, rtol=0, msg=name)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        load_decoder(folder)
    line = str(error.value)
    assert "\n" not in line
    return line


NEIGHBOURS: dict[str, dict[str, Tensor]] = {
    "model-00001-of-00009.safetensors": {EMBEDDING: torch.zeros(61, 32)},
    "adapter_model.safetensors": {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)
    },
    "value_head.safetensors": {"v_head.summary.weight": torch.ones(1, 32)},
    "consolidated.safetensors": {"tok_embeddings.weight": torch.ones(61, 32)},
    "consolidated.00.safetensors": {EMBEDDING: torch.zeros(61, 32)},
    "optimizer.safetensors": {NORM: torch.zeros(32)},
    "model.fp16.safetensors": {NORM: torch.zeros(32, dtype=torch.float16)},
    "mtp.safetensors": {NORM: torch.zeros(32)},
}


@pytest.mark.parametrize("shards", [1, NUM_SHARDS])
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_neighbours_of_the_model_are_left_alone(
    neighbour: str, shards: int, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, shards=shards)
    save(folder / neighbour, NEIGHBOURS[neighbour])
    assert_as_transformers(folder)
    found = find_weights(folder, ModelConfig.from_folder(folder))
    assert found.left_alone == (neighbour,)
    assert found.summary.endswith(f"no part of the model: {neighbour}")
    assert len(found.paths) == shards


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.pt", "training_args.bin"],
)
def test_pickles_beside_the_model_are_never_opened(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / name).write_bytes(b"not a pickle")
    assert_as_transformers(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.rotary_emb.inv_freq",
        "v_head.summary.weight",
        "score.weight",
    ],
)
def test_buffers_and_foreign_heads_in_the_files_are_ignored(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    path = folder / "model-00002-of-00004.safetensors"
    change_file(path, lambda weights: weights.update({name: torch.ones(4)}))
    assert_as_transformers(folder)  # the index does not name the tensor
    change_index(folder, lambda index: index["weight_map"].update({name: path.name}))
    assert_as_transformers(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.input_layernorm.weight",  # of a deeper model
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.mlp.up_proj.weight_scale_inv",
        "lm_head.bias",
    ],
)
def test_parameters_that_the_config_does_not_have_are_refused(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    path = folder / "model-00002-of-00004.safetensors"
    change_file(path, lambda weights: weights.update({name: torch.ones(4)}))
    assert f"do not fit their config.json: unexpected ['{name}']" in refusal(folder)


def test_the_index_decides_over_a_single_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    shards = find_weights(folder, ModelConfig.from_folder(folder)).paths
    save(folder / "model.safetensors", {EMBEDDING: torch.zeros(61, 32)})
    found = find_weights(folder, ModelConfig.from_folder(folder))
    assert (found.paths, found.left_alone) == (shards, ("model.safetensors",))
    assert load_decoder(folder).model.embed_tokens.weight.abs().sum() > 0


@pytest.mark.parametrize("number", range(1, NUM_SHARDS + 1))
def test_a_missing_shard_is_named(number: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    name = f"model-{number:05d}-of-00004.safetensors"
    (folder / name).unlink()
    assert f"lacks {name} of the 4 files that {INDEX} names; copy" in refusal(folder)
    (folder / name).symlink_to(folder / "blob")  # as the hub's cache leaves it
    assert f"lacks {name} of the 4 files" in refusal(folder)


def test_shards_without_their_index_name_the_index(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / INDEX).unlink()
    line = refusal(folder)
    assert "model-00001-of-00004.safetensors" in line
    assert f"no {INDEX}" in line


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "consolidated.safetensors"])
def test_a_folder_without_a_whole_model_says_what_it_has(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, shards=1)
    (folder / "model.safetensors").rename(folder / name)
    assert f"has {name} but neither model.safetensors nor {INDEX}" in refusal(folder)


def test_pickled_weights_alone_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, shards=1)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no *.safetensors file; pickled weights are never loaded" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": 1}'],
)
def test_a_broken_index_is_named(content: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / INDEX).write_text(content)
    assert refusal(folder).startswith(f"{folder / INDEX} ")


@pytest.mark.parametrize(
    "place",
    ["../model.safetensors", "/etc/passwd", "whole/model.safetensors", "..", ".", "", None, 1],
)
def test_an_index_may_not_leave_the_folder(place: object, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    change_index(folder, lambda index: index["weight_map"].update({NORM: place}))
    line = refusal(folder)
    assert line.startswith(f"{folder / INDEX} places {NORM} in {place!r}")


def test_an_index_of_pickles_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    change_index(folder, lambda index: index["weight_map"].update({NORM: "model.bin"}))
    assert "model.bin, which is no safetensors file; pickled weights are never" in refusal(folder)


def test_a_tensor_that_its_shard_lacks_is_named_with_the_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    place = json.loads((folder / INDEX).read_text())["weight_map"][NORM]
    change_file(folder / place, lambda weights: weights.pop(NORM))
    line = refusal(folder)
    assert f"missing ['{NORM}'] ({INDEX} places them in {place}, which lacks them)" in line


def test_a_tensor_in_another_shard_than_the_index_says_is_found(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(file for file in places.values() if file != places[NORM])
    change_index(folder, lambda index: index["weight_map"].update({NORM: other}))
    assert_as_transformers(folder)
    change_index(folder, lambda index: index["weight_map"].pop(NORM))
    assert_as_transformers(folder)


def test_a_tensor_in_two_files_of_the_index_must_be_equal(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    norm = load_file(folder / places[NORM])[NORM]
    other = next(file for file in places.values() if file != places[NORM])
    change_file(folder / other, lambda weights: weights.update({NORM: norm}))
    assert_as_transformers(folder)
    change_file(folder / other, lambda weights: weights.update({NORM: norm + 1}))
    line = refusal(folder)
    assert f"both hold {NORM}, with other values" in line
    assert places[NORM] in line
    assert other in line


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"", "copy it again"),
        (b"not weights", "copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
    ],
)
def test_a_broken_file_is_named(content: bytes, remedy: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    path = folder / "model-00003-of-00004.safetensors"
    path.write_bytes(content)
    line = refusal(folder)
    assert line.startswith(f"{path} is no readable safetensors file (")
    assert remedy in line


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    path = folder / "model-00003-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert refusal(folder).startswith(f"{path} is no readable safetensors file (")


def test_a_tied_head_in_the_files_must_equal_the_embedding(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, shards=1)
    path = folder / "model.safetensors"
    change_file(path, lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))
    assert_as_transformers(folder)
    change_file(path, lambda weights: weights.update({HEAD: weights[EMBEDDING] + 1}))
    line = refusal(folder)
    assert "(tie_word_embeddings true), but lm_head.weight in model.safetensors differs" in line
    assert line.endswith("set tie_word_embeddings to false")
    change_config(folder, tie_word_embeddings=False)
    assert_as_transformers(folder)


def test_a_tied_head_alone_serves_as_the_embedding(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, shards=1)
    path = folder / "model.safetensors"
    change_file(path, lambda weights: weights.update({HEAD: weights.pop(EMBEDDING)}))
    assert_as_transformers(folder)


def test_a_head_that_is_neither_tied_nor_stored_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, shards=1)
    change_config(folder, tie_word_embeddings=False)
    line = refusal(folder)
    assert "missing ['lm_head.weight']" in line
    assert "set tie_word_embeddings to true if the model has no head of its own" in line


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_files_may_have_another_dtype_than_the_config(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, shards=1)
    path = folder / "model.safetensors"
    weights = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save(path, weights)
    change_config(folder, dtype="float32")
    torch.testing.assert_close(
        load_decoder(folder).model.norm.weight, weights[NORM].float(), atol=0, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32])
def test_quantised_tensors_are_refused_with_their_file(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, shards=1)
    path = folder / "model.safetensors"
    change_file(path, lambda weights: weights.update({NORM: torch.ones(32).to(dtype)}))
    assert refusal(folder).startswith(f"{path} holds {NORM} as ")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is not supported"),
        ({"compression_config": {"format": "x"}}, "compression_config is not supported"),
        ({"transformers_weights": "x.safetensors"}, "transformers_weights is not supported"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"torch_dtype": "int8", "dtype": None}, "torch_dtype 'int8' is not supported"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "no causal language model"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings ('false') must be true or false"),
        ({"vocab_size": 10**30}, f"vocab_size ({10**30}) must be at most 134217728; copy"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers (1000000000) must be at most 4096; copy"),
        ({"num_hidden_layers": True}, "num_hidden_layers (True) must be a whole number"),
        ({"layer_types": ["full_attention"]}, "layer_types (1) must have num_hidden_layers (2)"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layers with sliding_attention (layer_types, use_sliding_window) are not supported",
        ),
        (
            {
                "layer_types": None,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            "layers with sliding_attention (layer_types, use_sliding_window) are not supported",
        ),
        ({"head_dim": 16}, "of another shape ['model.layers.0.self_attn.q_proj.weight (32, 32)"),
        ({"num_key_value_heads": 4}, "of another shape ['model.layers.0.self_attn.k_proj.weight"),
        ({"intermediate_size": 64}, "of another shape ['model.layers.0.mlp.gate_proj.weight"),
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "rope_scaling ({'rope_type': 'linear', 'factor': 2.0}) and rope_parameters (",
        ),
    ],
)
def test_a_config_that_contradicts_the_weights_or_itself_is_refused(
    changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path)
    change_config(folder, **changes)
    assert line in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": None},
        {"dtype": None, "torch_dtype": "float32"},
        {"dtype": "float32", "torch_dtype": "bfloat16"},
        {"quantization_config": None},
        {"layer_types": None, "use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": 8},  # use_sliding_window is false
        {"rope_parameters": None, "rope_theta": 500.0},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 7.0},  # rope_parameters has another one, and counts
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0},
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 100.0,
                "original_max_position_embeddings": 16,
            },
            "original_max_position_embeddings": 32,
        },
        {"num_key_value_heads": 2, "head_dim": 8},
        {"architectures": None},
    ],
)
def test_what_a_config_says_in_several_places_is_read_as_transformers_does(
    changes: dict[str, Any], tmp_path: Path, seeded: torch.Generator
) -> None:
    folder = make_folder(tmp_path)
    change_config(folder, **changes)
    assert_as_transformers(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    rope = load_decoder(folder).config.rope
    torch.testing.assert_close(rope.frequencies(8), theirs.inv_freq, atol=0, rtol=1e-6)


def files_that_sglang_reads(folder: Path) -> dict[str, Tensor]:
    """As DefaultModelLoader of SGLang 0.5.21: every safetensors file, or those of the index."""
    paths = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        named = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        paths = [path for path in paths if path.name in named]
    weights: dict[str, Tensor] = {}
    for path in paths:
        weights |= load_file(path)
    return weights


@pytest.mark.parametrize("shards", [1, NUM_SHARDS])
@pytest.mark.parametrize("neighbour", [None, *NEIGHBOURS])
def test_sglang_reads_the_weights_of_the_learner(
    neighbour: str | None, shards: int, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, shards=shards)
    if neighbour:
        save(folder / neighbour, NEIGHBOURS[neighbour])
    config = ModelConfig.from_folder(folder)
    served = folder_for_sglang(folder, config, scratch=tmp_path / "scratch")
    assert (served == folder) == (neighbour is None or shards > 1)
    weights = files_that_sglang_reads(served)
    assert weights.keys() == load_decoder(folder).state_dict().keys()
    for name, tensor in load_decoder(folder).state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=0, rtol=0, msg=name)


def test_sglang_gets_an_embedding_that_is_stored_as_the_head(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    place = json.loads((folder / INDEX).read_text())["weight_map"][EMBEDDING]
    change_file(folder / place, lambda weights: weights.update({HEAD: weights.pop(EMBEDDING)}))
    config = ModelConfig.from_folder(folder)
    for _ in range(2):  # a server may be started again
        served = folder_for_sglang(folder, config, scratch=tmp_path / "scratch")
    weights = files_that_sglang_reads(served)
    torch.testing.assert_close(weights[EMBEDDING], load_decoder(folder).state_dict()[EMBEDDING])
    assert (served / "config.json").read_text() == (folder / "config.json").read_text()


def test_the_message_lists_few_names(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert re.search(r"lacks (\S+, ){2}\S+ and 1 more of the 4 files", refusal(folder))
