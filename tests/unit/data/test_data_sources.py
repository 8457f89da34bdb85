"""Rows are the same from JSONL, Parquet, folders and saved data sets; errors are one line."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

import datasets
import httpx
import huggingface_hub
import pyarrow
import pytest
from hub_server import hub_server
from pyarrow import parquet

from dapo_async import config as knobs
from dapo_async.config import Source, parse_contamination, parse_source
from dapo_async.data.sources import read_rows

ROWS: list[dict[str, Any]] = [
    {"prompt": f"problem {row}", "answer": str(row), "extra": {"level": row}} for row in range(5)
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(
    path: Path, columns: Sequence[str] = ("prompt", "answer", "extra")
) -> list[dict[str, Any]]:
    return list(read_rows(Source(path=path), columns=columns))


def refusal(path: Path) -> str:
    """The message, in one line."""
    with pytest.raises(ValueError) as error:
        rows_of(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["one.jsonl", "one.parquet"])
def test_a_file_and_a_folder_give_their_rows_in_the_order_of_the_names(
    tmp_path: Path, name: str
) -> None:
    file = write(tmp_path / name)
    assert rows_of(file) == ROWS
    suffix = file.suffix
    write(tmp_path / "folder" / f"b{suffix}", ROWS[3:])
    write(tmp_path / "folder" / "a" / f"0{suffix}", ROWS[:3])
    (tmp_path / "folder" / "README.md").write_text("about")
    assert rows_of(tmp_path / "folder") == ROWS


def test_a_saved_data_set_gives_its_rows_and_needs_the_name_of_a_split(
    tmp_path: Path,
) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    assert rows_of(tmp_path / "one") == ROWS
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "two"))
    assert refusal(tmp_path / "two") == (
        f"data folder {tmp_path}/two holds the splits test, train; "
        f"give one of them, such as {tmp_path}/two/test"
    )
    assert rows_of(tmp_path / "two" / "train") == ROWS
    (tmp_path / "one" / "state.json").write_text("{")
    assert "one is no readable folder of datasets.save_to_disk (" in refusal(tmp_path / "one")


def test_only_the_wanted_columns_of_a_table_are_read(tmp_path: Path) -> None:
    file = write(tmp_path / "one.parquet")
    assert rows_of(file, columns=("prompt", "extra.level"))[4] == {
        "prompt": "problem 4",
        "extra.level": 4,
    }
    assert rows_of(file, columns=("prompt", "extra.colour"))[4] == {
        "prompt": "problem 4",
        "extra": {"level": 4},
    }
    assert rows_of(file, columns=("prompt", "gold"))[4] == {"prompt": "problem 4"}
    assert rows_of(file, columns=("gold",))[4] == {}


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {},
            "has no *.parquet, no *.jsonl and nothing of datasets.save_to_disk; give another",
        ),
        (
            {"a.jsonl": ROWS, "b.parquet": ROWS},
            "holds Parquet and JSONL files, which must not be mixed; give one file, or",
        ),
        (
            {"train-0.parquet": ROWS, "test-0.parquet": ROWS},
            "holds the splits test, train, which must not be mixed; give one file, or",
        ),
    ],
)
def test_a_folder_that_is_no_data_set_is_one_line(
    tmp_path: Path, files: dict[str, list[dict[str, Any]]], line: str
) -> None:
    (tmp_path / "set").mkdir()
    for name, rows in files.items():
        write(tmp_path / "set" / name, rows)
    assert line in refusal(tmp_path / "set")


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    assert refusal(tmp_path / "broken.parquet").startswith(
        f"data file {tmp_path}/broken.parquet is no readable Parquet file ("
    )


def test_a_pickle_in_a_folder_is_never_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a.jsonl")
    (tmp_path / "set" / "a.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert rows_of(tmp_path / "set") == ROWS


@pytest.mark.parametrize(
    ("text", "source", "name"),
    [
        ("/a/gold.jsonl", Source(path=Path("/a/gold.jsonl")), "gold.jsonl"),
        ("/a/gsm8k/test.jsonl", Source(path=Path("/a/gsm8k/test.jsonl")), "gsm8k/test.jsonl"),
        ("gsm8k=/a/x", Source(preset="gsm8k", path=Path("/a/x")), "gsm8k"),
        ("/a=b/x", Source(path=Path("/a=b/x")), "x"),
        ("hub:aime24", Source(hub="aime24"), "aime24"),
        ("hub:openai/gsm8k", Source(hub="openai/gsm8k"), "openai/gsm8k"),
        (
            "gsm8k=hub:openai/gsm8k/main@v1/x:train[:9]",
            Source(
                preset="gsm8k",
                hub="openai/gsm8k",
                subset="main",
                revision="v1/x",
                split="train[:9]",
            ),
            "gsm8k",
        ),
    ],
)
def test_the_grammar_of_a_source(text: str, source: Source, name: str) -> None:
    parsed = parse_source(text)
    assert (parsed, parsed.name) == (source, name)
    assert text.endswith(parsed.where)


def test_a_list_of_sources_and_a_hub_name_that_is_none() -> None:
    sources = [Source(path=Path("/a")), Source(hub="b")]
    assert parse_contamination("drop, /a, hub:b ,") == ("drop", sources)
    assert parse_contamination("off") == ("off", [])
    with pytest.raises(
        ValueError, match=re.escape("hub:a b is no name of the hub; write hub:OWNER/NAME")
    ):
        parse_source("hub:a b")


def test_sources_in_a_config_resolve_as_paths_do_and_read_back(tmp_path: Path) -> None:
    for name in ("t.jsonl", "h.jsonl", "e.jsonl"):
        write(tmp_path / "data" / name)
    (tmp_path / "run.yaml").write_text(
        "model: {path: Qwen/Qwen2.5-32B}\n"
        "data: {train: gsm8k=data/t.jsonl, heldout: hub:openai/gsm8k/main:test,\n"
        "  contamination: 'warn, amc23=data/e.jsonl, ./data/h.jsonl, hub:aime24'}\n"
    )
    config = knobs.load(tmp_path / "run.yaml")
    assert config.model.path == "hub:Qwen/Qwen2.5-32B"
    assert config.data.train == f"gsm8k={tmp_path}/data/t.jsonl"
    assert config.data.heldout == "hub:openai/gsm8k/main:test"
    assert (
        config.data.contamination
        == f"warn,amc23={tmp_path}/data/e.jsonl,{tmp_path}/data/h.jsonl,hub:aime24"
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "saved.yaml").write_text(knobs.to_yaml(config))
    assert knobs.load(tmp_path / "elsewhere" / "saved.yaml") == config
    (tmp_path / "Qwen" / "Qwen2.5-32B").mkdir(parents=True)
    assert knobs.load(tmp_path / "run.yaml").model.path == f"{tmp_path}/Qwen/Qwen2.5-32B"
    with pytest.raises(ValueError, match=r"data.contamination \(/nowhere\) does not exist"):
        knobs.load(tmp_path / "run.yaml", ["data.contamination=warn,/nowhere"])


def test_a_data_set_of_the_hub_is_read_by_name_subset_split_and_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def load_dataset(*names: str, **options: Any) -> datasets.Dataset:
        asked.append((*names, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "dataset_info",
        lambda self, name, **options: asked.append((name, options)),
    )
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert (
        list(read_rows(parse_source("hub:a/b/main@v1:test"), columns=("prompt", "answer", "extra")))
        == ROWS
    )
    assert asked == [
        ("a/b", {"revision": "v1", "timeout": 20.0}),
        ("a/b", "main", {"split": "test", "revision": "v1"}),
    ]


@pytest.mark.parametrize("source", ["hub:nobody/nothing", "hub:nobody/nothing/x@y:test"])
def test_a_hub_that_can_not_be_reached_is_one_line(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dataset_info(self: object, name: str, **options: Any) -> Never:
        raise httpx.ConnectError("no network\nand more about it")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"{source} can't be read from the Hugging Face hub: the hub can't be reached "
            "(no network); check the network"
        ),
    ) as error:
        list(read_rows(parse_source(source), columns=()))
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(
        "set HF_HUB_OFFLINE=1 to use an earlier download, or give a local file"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gated", "its owner gives access on request (HTTP 403); ask for access on the page of"),
        ("unknown", "the hub has none of this name, or a private one (HTTP 401); correct the name"),
        ("revision", "it has no revision v1 (HTTP 404); correct the revision, or leave it out"),
        ("forbidden", "the token may not read it (HTTP 403); give the token the permission to"),
        ("busy", "the hub got too many requests (HTTP 429); wait some minutes, or set HF_TOKEN"),
    ],
)
def test_each_answer_of_the_hub_has_its_own_remedy(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server({}) as url:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        with pytest.raises(ValueError, match="from the Hugging Face hub") as error:
            list(read_rows(parse_source(f"hub:me/{name}@v1"), columns=()))
    line = str(error.value)
    assert expected in line
    assert line.endswith(", or give a local file")
    assert ("HF_HUB_OFFLINE=1" in line) == (name == "busy")


def test_unknown_split_of_the_hub_is_named_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(*names: str, **options: Any) -> Never:
        raise ValueError("Unknown split \"tst\". Should be one of ['train', 'test'].")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **options: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="from the Hugging Face hub") as error:
        list(read_rows(parse_source("hub:a/b:tst"), columns=()))
    assert str(error.value).endswith(
        "Should be one of ['train', 'test']; correct its subset and split, or give a local file"
    )


def test_reading_jsonl_imports_neither_datasets_nor_pyarrow(tmp_path: Path) -> None:
    file = write(tmp_path / "one.jsonl")
    code = f"""
import sys
from collections.abc import Sequence
from pathlib import Path
from dapo_async.data import load_prompts
class Tokenizer:
    def __call__(self, text): return {{"input_ids": [[1] for _ in text]}}
load_prompts(Path({str(file)!r}), tokenizer=Tokenizer(), max_prompt_tokens=9)
sys.exit(bool(sys.modules.keys() & {{"datasets", "pyarrow", "huggingface_hub", "torch"}}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
