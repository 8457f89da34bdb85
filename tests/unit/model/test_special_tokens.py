"""Stop tokens, begin of text and padding from all files of a model folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from dapo_async.data import load_tokenizer
from dapo_async.model import ModelConfig, export_folder, load_decoder, special_tokens

RANDOM = Path(__file__).parents[3] / "configs" / "base" / "random"  # 256 bytes and <eos>, 256
CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the random base model whose files name no special token."""
    folder = Path(shutil.copytree(RANDOM, tmp_path / "model"))
    change(folder / CONFIG, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    (folder / GENERATION).unlink()
    change(folder / TOKENIZER_CONFIG, eos_token=None, pad_token=None)
    return folder


def change(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "stop"),
    [
        (256, [256, 13], None, {256, 13}),
        (256, None, None, {256}),
        (None, 256, None, {256}),
        (None, [13, 10], None, {13, 10}),
        ([256, 13], 10, None, {256, 13, 10}),
        (None, None, 256, {256}),
        (13, None, 256, {13, 256}),
        (13, [10], 256, {13, 10, 256}),
        ([], [], None, set()),
        ([], [13], None, {13}),
        (0, [0], None, {0}),
        (None, [256, *range(128)], None, {256, *range(128)}),
    ],
)
def test_a_response_stops_at_the_tokens_of_all_files(
    config: Any, generation: Any, tokenizer: int | None, stop: set[int], folder: Path
) -> None:
    change(folder / CONFIG, eos_token_id=config)
    change(folder / GENERATION, eos_token_id=generation)
    if tokenizer is not None:
        change(folder / TOKENIZER_CONFIG, eos_token="<eos>")
    found = ModelConfig.from_folder(folder).eos_token_ids
    assert set(found) == stop
    assert len(found) == len(stop)


def test_every_token_names_its_files(folder: Path) -> None:
    change(folder / CONFIG, eos_token_id=256, bos_token_id=1, pad_token_id=0)
    change(folder / GENERATION, eos_token_id=[256, 13], bos_token_id=2, pad_token_id=0)
    change(folder / TOKENIZER_CONFIG, eos_token="<eos>", pad_token="<eos>")
    tokens = special_tokens(folder)
    assert tokens.stop == {256: (CONFIG, GENERATION, TOKENIZER_CONFIG), 13: (GENERATION,)}
    assert tokens.bos == {1: (CONFIG,), 2: (GENERATION,)}
    assert tokens.pad == {0: (CONFIG, GENERATION), 256: (TOKENIZER_CONFIG,)}


def test_a_nested_text_config_counts(folder: Path) -> None:
    change(folder / CONFIG, eos_token_id=256, text_config={"eos_token_id": [13]})
    assert ModelConfig.from_folder(folder).eos_token_ids == (256, 13)


def test_what_transformers_assumes_of_a_family_counts(folder: Path) -> None:
    values = json.loads((folder / CONFIG).read_text()) | {"model_type": "llama"}
    del values["eos_token_id"]
    values["architectures"] = ["LlamaForCausalLM"]
    (folder / CONFIG).write_text(json.dumps(values))
    assert AutoConfig.from_pretrained(folder).eos_token_id == 2  # SGLang takes it from here
    assert ModelConfig.from_folder(folder).eos_token_ids == (2,)
    change(folder / CONFIG, eos_token_id=None)
    assert ModelConfig.from_folder(folder).eos_token_ids == ()


@pytest.mark.parametrize(
    ("tokenizer_config", "special_map"),
    [
        ({"eos_token": "<eos>"}, None),
        ({"eos_token": {"content": "<eos>", "__type": "AddedToken"}}, None),
        ({}, {"eos_token": "<eos>"}),
        ({}, {"eos_token": {"content": "<eos>", "lstrip": False}}),
        ({"eos_token": "a"}, {"eos_token": "<eos>"}),
        ({"eos_token": "a"}, {"pad_token": "<eos>"}),
        ({"eos_token": "a"}, None),
        (
            {
                "eos_token": "<eos>",
                "added_tokens_decoder": {"256": {"content": "<eos>", "special": True}},
            },
            {"eos_token": "a"},
        ),
        ({}, None),
    ],
)
def test_the_eos_of_the_tokenizer_is_that_of_transformers(
    tokenizer_config: dict[str, Any], special_map: dict[str, Any] | None, folder: Path
) -> None:
    (folder / TOKENIZER_CONFIG).write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config})
    )
    if special_map is not None:
        (folder / MAP).write_text(json.dumps(special_map))
    eos = load_tokenizer(folder).eos_token_id
    assert ModelConfig.from_folder(folder).eos_token_ids == (() if eos is None else (eos,))


@pytest.mark.parametrize("form", ["tokenizer.json", "unigram", "added_tokens.json", "vocab.json"])
def test_the_id_of_a_token_is_found_in_each_kind_of_file(form: str, folder: Path) -> None:
    change(folder / TOKENIZER_CONFIG, eos_token="<end>")
    values = json.loads((folder / "tokenizer.json").read_text())
    if form == "tokenizer.json":
        values["added_tokens"].append({"id": 77, "content": "<end>"})
        (folder / "tokenizer.json").write_text(json.dumps(values))
    elif form == "unigram":
        values["model"]["vocab"] = [["<unk>", 0.0], ["<end>", -1.0]]
        (folder / "tokenizer.json").write_text(json.dumps(values))
    else:
        (folder / "tokenizer.json").unlink()
        (folder / form).write_text('{"<end>": 77}')
    assert ModelConfig.from_folder(folder).eos_token_ids == ((1,) if form == "unigram" else (77,))


WRONG = [257, 5000, -1, True, False, 1.0, 256.5, "256", [256, 257], [[256]], [None], [True], {}]


@pytest.mark.parametrize("name", [CONFIG, GENERATION])
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_ids_outside_the_vocabulary_are_refused(
    name: str, key: str, value: Any, folder: Path
) -> None:
    change(folder / name, **{key: value})
    line = re.escape(f"{folder / name}: {key} ({value!r}) must be a token id or a list of ids, ")
    with pytest.raises(ValueError, match=line):
        ModelConfig.from_folder(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "1", '"eos"', "\x00"])
@pytest.mark.parametrize("name", [GENERATION, TOKENIZER_CONFIG, MAP])
def test_a_broken_file_with_special_tokens_is_named(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(folder / name))) as error:
        ModelConfig.from_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("token", [256, ["<eos>"], {"content": 1}, True])
def test_an_eos_token_that_is_no_text_is_refused(token: Any, folder: Path) -> None:
    change(folder / TOKENIZER_CONFIG, eos_token=token)
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json: eos_token \(.*must be a token's"
    ):
        ModelConfig.from_folder(folder)


def export(base: Path, out: Path) -> None:
    weights = load_decoder(base).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    export_folder(
        shapes,
        lambda names: {name: weights[name] for name in names},
        dtype=torch.float32,
        base=base,
        out=out,
    )


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer"),
    [
        (256, None, False),
        (256, [256, 13], False),
        (13, [10], True),
        (13, None, True),
        (None, None, True),
        (None, 13, False),
    ],
)
def test_an_exported_folder_has_all_stop_tokens(
    config: Any, generation: Any, tokenizer: bool, folder: Path, tmp_path: Path
) -> None:
    change(folder / CONFIG, eos_token_id=config, pad_token_id=7)
    if generation is not None:
        change(folder / GENERATION, eos_token_id=generation, temperature=0.5, do_sample=True)
    if tokenizer:
        change(folder / TOKENIZER_CONFIG, eos_token="<eos>")
    stop = ModelConfig.from_folder(folder).eos_token_ids
    export(folder, tmp_path / "out")
    assert set(ModelConfig.from_folder(tmp_path / "out").eos_token_ids) == set(stop)
    written = tmp_path / "out" / GENERATION
    if not written.exists():  # config.json says it all
        assert (generation, stop) == (None, (256,))
        return
    values = GenerationConfig.from_pretrained(tmp_path / "out")
    ids = values.eos_token_id if isinstance(values.eos_token_id, list) else [values.eos_token_id]
    assert set(ids) == set(stop)
    if generation is None:
        assert values.pad_token_id == 7
    else:
        assert values.temperature == 0.5


def test_an_exported_folder_has_the_chat_templates(folder: Path, tmp_path: Path) -> None:
    change(folder / CONFIG, eos_token_id=256)
    (folder / "chat_template.jinja").write_text("default")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    export(folder, tmp_path / "out")
    templates = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert templates == {"default": "default", "rag": "rag"}
