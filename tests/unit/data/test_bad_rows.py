"""A bad row is named by file and row, or counted; it never reaches a library."""

import datetime
import gzip
import json
import os
import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from byte_tokenizer import BYTES
from pyarrow import parquet

from dapo_async.config import Source, parse_source
from dapo_async.data import PromptSet, load_fingerprints, load_prompts
from dapo_async.data.sources import read_rows

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
GOOD: dict[str, Any] = {"prompt": "x", "answer": "1"}


def load(path: Path, **knobs: Any) -> PromptSet:
    return load_prompts(path, tokenizer=BYTES, max_prompt_tokens=100, **knobs)


def refusal(path: Path, **knobs: Any) -> str:
    """The message, in one line."""
    with pytest.raises(ValueError) as error:
        load(path, **knobs)
    assert "\n" not in str(error.value)
    assert type(error.value) is ValueError
    return str(error.value)


def jsonl(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file = folder / name
    file.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))
    return file


def table(folder: Path, name: str = "rows.parquet", **columns: Any) -> Path:
    file = folder / name
    parquet.write_table(pyarrow.table(columns), file)
    return file


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("3", "3"),
        ("3.0", "3"),
        ("-3.0", "-3"),
        ("2.50", "2.5"),
        ("0.1", "0.1"),
        ("-0.0", "0"),
        ("1e20", "100000000000000000000"),
        ("1E-7", "0.0000001"),
        ("1e23", "100000000000000000000000"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("3.14159265358979323846", "3.14159265358979323846"),
        ("12345678901234567.0", "12345678901234567"),
        ("0e-400", "0"),
        ('"3.0"', "3.0"),
        ('" 1e20 "', " 1e20 "),
        ('"nan"', "nan"),
        ('"[1, 2]"', "[1, 2]"),
        ('"{1, 2}"', "{1, 2}"),
        ('"\\ud83d\\ude00"', "😀"),
    ],
)
def test_a_number_in_json_keeps_its_value_and_all_digits(
    tmp_path: Path, answer: str, text: str
) -> None:
    file = jsonl(tmp_path, f'{{"prompt": "x", "answer": {answer}}}')
    assert [prompt.answer for prompt in load(file).prompts] == [text]


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pyarrow.array([3.0, None, 72.0]), ["3", "72"]),
        (pyarrow.array([3.0, 2.5, float("nan")]), ["3", "2.5"]),
        (pyarrow.array([0.1, 3.0, None], pyarrow.float32()), ["0.1", "3"]),
        (pyarrow.array([0.5, 1e20, float("inf")]), ["0.5", "1" + "0" * 20]),
        (pyarrow.array([2**63 - 1, -(2**63)]), ["9223372036854775807", "-9223372036854775808"]),
        (pyarrow.array([2**64 - 1], pyarrow.uint64()), ["18446744073709551615"]),
        (pyarrow.array([Decimal("3.00"), Decimal("2.50")]), ["3", "2.5"]),
        (pyarrow.array([Decimal("12345678901234567890.12")]), ["12345678901234567890.12"]),
        (pyarrow.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pyarrow.array(["a", None, "b"], pyarrow.large_string()), ["a", "b"]),
    ],
)
def test_a_number_in_a_table_keeps_its_value_and_all_digits(
    tmp_path: Path, column: Any, texts: list[str]
) -> None:
    file = table(tmp_path, prompt=[f"x{row}" for row in range(len(column))], answer=column)
    assert [prompt.answer for prompt in load(file).prompts] == texts


BROKEN = "1 with half a character (a lone surrogate) (row 2)"


@pytest.mark.parametrize(
    ("row", "left_out"),
    [
        ('{"prompt": "q \\ud83d 1", "answer": "1"}', BROKEN),
        ('{"prompt": "q \\ude00 1", "answer": "1"}', BROKEN),
        ('{"prompt": "q", "answer": "\\ud83d"}', BROKEN),
        ('{"prompt": "q", "answer": "1", "data_source": "\\udfff"}', BROKEN),
        ('{"prompt": [{"role": "user", "content": "\\ud83d"}], "answer": "1"}', BROKEN),
        (
            '{"prompt": [{"role": "system", "content": "\\ud83d"}, '
            '{"role": "user", "content": "x"}], "answer": "1"}',
            BROKEN,
        ),
        ('{"prompt": "a\\u0000b", "answer": "1"}', "1 with a NUL character (row 2)"),
        ('{"prompt": "a", "answer": "1\\u0000"}', "1 with a NUL character (row 2)"),
        ('{"prompt": " \\t\\r\\n\\u00a0\\u3000", "answer": "1"}', "1 empty (row 2)"),
        ('{"prompt": "\\u200b\\ufeff", "answer": "1"}', "1 empty (row 2)"),
        ('{"prompt": "a", "answer": "\\u2003"}', "1 empty (row 2)"),
        pytest.param(
            json.dumps({"prompt": "a", "answer": "1" * 20_001}),
            "1 with an answer of more than 20,000 characters (row 2)",
            id="long answer",
        ),
        ('{"prompt": [], "answer": "1"}', "1 empty (row 2)"),
        ('{"prompt": [{"role": "user", "content": null}], "answer": "1"}', "1 empty (row 2)"),
        ('{"prompt": "a", "answer": -Infinity}', "1 empty (row 2)"),
        ('{"prompt": "a", "answer": 1e-400}', "1 empty (row 2)"),  # only a float makes it 0
        ('{"prompt": "a", "answer": -0.1e-999999999999999999999}', "1 empty (row 2)"),
        ('{"prompt": "a", "answer": 1e999999999999999999999}', "1 empty (row 2)"),
        ('{"prompt": "a", "reward_model": null}', "1 empty (row 2)"),
    ],
)
def test_a_row_without_usable_text_is_left_out_and_counted(
    tmp_path: Path, row: str, left_out: str
) -> None:
    loaded = load(jsonl(tmp_path, GOOD, row, GOOD))
    assert [prompt.row for prompt in loaded.prompts] == [0, 2]
    assert str(loaded.left_out) == left_out


def test_control_characters_are_kept_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "\frac{1}{2}", "answer": "1"}, {"prompt": "a\tb\r\nc", "answer": "1"}]
    loaded = load(jsonl(tmp_path, GOOD, *rows))
    assert len(loaded.prompts) == 3
    assert loaded.summary.endswith("left out: none; kept: 1 with control characters (row 2)")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": True, "answer": "1"}, "column 'prompt' in row 2 of {} holds a bool; write"),
        ({"prompt": "x", "answer": False}, "column 'answer' in row 2 of {} holds a bool; write"),
        (
            {"prompt": {"en": "x", "zh": "y"}, "answer": "1"},
            "holds a dict; write text or a number, or set data.prompt_key to one of "
            "prompt.en, prompt.zh",
        ),
        (
            {"prompt": ["x"], "answer": "1"},
            "column 'prompt' in row 2 of {} holds a list; write text or a number, "
            "or set data.prompt_key to prompt.0",
        ),
        (
            {"prompt": "x", "answer": ["1", "2"]},
            "column 'answer' in row 2 of {} holds a list; write text or a number, "
            "or set data.answer_key to answer.0",
        ),
        (
            {"prompt": "x", "answer": '["1"]'},
            "holds a list as JSON text; write text or a number, or set data.answer_key to answer.0",
        ),
        (
            {"prompt": "x", "answer": '{"value": 1}'},
            "holds a dict as JSON text; write text or a number, or set data.answer_key to "
            "answer.value",
        ),
        ({"prompt": "x", "answer": []}, "or set data.answer_key to another column"),
        (
            {"prompt": "x", "answer": "1", "data_source": ["a"]},
            "column 'data_source' in row 2 of {} holds a list; write text or a number",
        ),
        ('{"prompt": "x"', "line 2 of {} is not valid JSON ("),
        ('{"prompt": "x", "answer": "1"', "line 2 of {} is not valid JSON ("),
        ('{"prompt": "x\n"}', "line 2 of {} is not valid JSON ("),
        ("\0\0\0", "line 2 of {} is not valid JSON ("),
        ("'prompt'", "line 2 of {} is not valid JSON ("),
        ("[1]", "line 2 of {} holds a list; write one JSON object per line"),
        ('"text"', "line 2 of {} holds a str; write one JSON object per line"),
        ("null", "line 2 of {} holds a NoneType; write one JSON object per line"),
        (
            '{"prompt": "x", "prompt": "y", "answer": "1"}',
            "line 2 of {} has the key 'prompt' twice in one object; keep one",
        ),
        (
            '{"prompt": "x", "reward_model": {"ground_truth": 1, "ground_truth": 2}}',
            "line 2 of {} has the key 'ground_truth' twice in one object; keep one",
        ),
        ('{"a":' * 100_000, "line 2 of {} is not valid JSON (maximum recursion depth"),
        ({"prompt": "x"}, "row 2 of {} has no column 'answer'; set data.answer_key to one of"),
        ({}, "row 2 of {} has no column 'prompt'; the row has no text: remove it"),
    ],
)
def test_a_row_of_the_wrong_type_is_named(tmp_path: Path, row: object, message: str) -> None:
    file = jsonl(tmp_path, GOOD, row)
    assert message.format(file) in refusal(file)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pyarrow.array([True, False]), "bool"),
        (pyarrow.array([datetime.date(2024, 1, 2)] * 2), "date"),
        (pyarrow.array([datetime.datetime(2024, 1, 2)] * 2), "datetime"),
        (pyarrow.array([datetime.timedelta(1)] * 2), "timedelta"),
        (pyarrow.array([b"1", b"2"]), "bytes"),
        (pyarrow.array([[1], [2]]), "list"),
        (pyarrow.array([{"a": None}] * 2), "dict"),
    ],
)
def test_a_column_of_the_wrong_type_is_named(tmp_path: Path, column: Any, kind: str) -> None:
    file = table(tmp_path, prompt=["x", "y"], answer=column)
    assert f"column 'answer' in row 1 of {file} holds a {kind}; write" in refusal(file)


def test_text_in_a_table_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, pyarrow.array([b"x", b"\xed\xa0\xbd"]).buffers()
    )
    file = table(
        tmp_path,
        prompt=["x"] * 5000 + ["y", "z"],
        answer=pyarrow.chunked_array([pyarrow.array(["1"] * 5000), bad]),
    )
    assert f"column 'answer' in row 5002 of {file} is not UTF-8 (" in refusal(file)


def test_a_date_that_python_can_not_hold_is_named(tmp_path: Path) -> None:
    column = pyarrow.array([0, 2**40], pyarrow.int64()).cast(pyarrow.timestamp("s"))
    file = table(tmp_path, prompt=["x", "y"], answer=column)
    assert f"column 'answer' in row 2 of {file} can't be read (" in refusal(file)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b'{"prompt": "x", "answer": 1}\r\n\r\n{"prompt": "y", "answer": 2}\r\n', 2),
        (b'{"prompt": "x", "answer": 1}\r{"prompt": "y", "answer": 2}', 2),
        (b'\xef\xbb\xbf{"prompt": "x", "answer": 1}\n \t\n{"prompt": "y", "answer": 2}', 2),
        (b'\xef\xbb\xbf\n{"prompt": "x", "answer": 1}', 1),
        (b'[{"prompt": "x", "answer": 1}, {"prompt": "y", "answer": 2}]', 2),
        (
            b'\xef\xbb\xbf[\n {"prompt": "x",\n "answer": 1}\n,\n\n'
            b'{"prompt": "y", "answer": 2}\n]\n',
            2,
        ),
        (b'{"prompt": "x", "answer": 1}\n' * 3 + b"\n\n", 3),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows"])
def test_every_form_of_json_gives_its_rows(
    tmp_path: Path, content: bytes, rows: int, name: str
) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert len(load(file).prompts) == rows


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_packed_file_is_known_by_its_first_bytes(tmp_path: Path, codec: str) -> None:
    content = b"".join(b'{"prompt": "x%d", "answer": %d}\n' % (row, row) for row in range(9999))
    file = tmp_path / "rows.jsonl"
    with pyarrow.CompressedOutputStream(str(file), codec) as out:
        out.write(content)
    assert [prompt.answer for prompt in load(file).prompts] == [str(row) for row in range(9999)]
    file.write_bytes(file.read_bytes()[:-20])
    assert "rows.jsonl can't be unpacked (" in refusal(file)


def test_two_packed_members_in_one_file_are_both_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.json.gz"
    file.write_bytes(gzip.compress(b'{"prompt": "x", "answer": 1}\n') * 2)
    assert len(load(file).prompts) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "has no usable prompt; it has no rows: give a file with rows"),
        ("a.jsonl", b"\n \r\n", "it has no rows"),
        ("a.json", b"[]", "it has no rows"),
        ("a.json", b"[\n]", "it has no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "it has no rows"),
        ("a.json", b"[1, 2]", "line 1 of {} holds a list; write one JSON object per line"),
        ("a.json", b'[{"prompt": 1}, 2]', "item 2 of the array in {} holds a int; write only"),
        ("a.json", b"[\n1,\n2]", "item 1 of the array in {} holds a int; write only objects"),
        ("a.json", b'[{"prompt": "x"},\n', "data file {} is not valid JSON ("),
        ("a.json", b'{\n "data": []}', "line 1 of {} is not valid JSON ("),
        ("a.jsonl", b'{"prompt": "caf\xe9"}\n', "line 1 of {} is not UTF-8 ("),
        ("a.json", b'[{"prompt":\n "caf\xe9"}]', "data file {} is not UTF-8 ("),
        ("a.jsonl", '{"prompt": "x"}'.encode("utf-16"), "line 1 of {} is not UTF-8 ("),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "data file {} can't be unpacked ("),
        ("a.jsonl.gz", b"\x1f\x8bgarbage", "data file {} can't be unpacked ("),
        ("a.jsonl.xz", b"\xfd7zXZ\0\0", "is packed with bzip2 or xz; unpack it, or pack"),
        ("a.jsonl.bz2", b"BZh91AY", "is packed with bzip2 or xz; unpack it, or pack it"),
        ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "a number of 5000 digits; write it as"),
        ("a.jsonl", LFS, "data file {} is a pointer of Git LFS, not the file itself; fetch the"),
        ("a.parquet", LFS, "data file {} is a pointer of Git LFS, not the file itself; fetch the"),
        ("a.jsonl", b"PK\3\4data", "data file {} is a zip archive; unpack it, or pack it with"),
        (
            "a.parquet.gz",
            gzip.compress(b"PAR1data", mtime=0),
            "holds a packed Parquet file; unpack it",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0),
            "is packed twice; unpack it once",
        ),
        ("a.arrow", b"ARROW1\0\0", "data file {} is an Arrow file; convert it to Parquet or JSONL"),
        ("a.pkl", b"\x80\4\x95", "is a pickle, and nothing is unpickled; convert it to Parquet"),
        ("a.parquet", b"SQLite format 3\0", "data file {} is a SQLite database; convert it to"),
        ("a.parquet", b"", "data file {} is no readable Parquet file ("),
        ("a.parquet", b"PAR1PAR1", "data file {} is no readable Parquet file ("),
        ("a.data", b"PAR1xxxx", "data file {} is no readable Parquet file ("),
        ("a.parquet", b'{"prompt": "x"}', "data file {} is no readable Parquet file ("),
    ],
)
def test_a_file_that_is_no_data_set_is_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    assert message.format(file) in refusal(file)


def test_a_path_that_is_no_regular_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        assert refusal(path) == (
            f"data file {path} is neither a file nor a folder, and data is read more than once; "
            "write it to a file"
        )


def test_a_broken_link_in_a_folder_is_named(tmp_path: Path) -> None:
    jsonl(tmp_path, GOOD, name="a.jsonl")
    link = tmp_path / "b.jsonl"
    link.symlink_to("/nowhere/b.jsonl")
    line = (
        f"data file {link} is a link to /nowhere/b.jsonl, which does not exist; "
        "correct the link, or remove it"
    )
    assert refusal(tmp_path) == refusal(tmp_path / "*.jsonl") == line
    link.rename(tmp_path / "b.txt")  # no data file by its name
    assert len(load(tmp_path).prompts) == 1


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    jsonl(tmp_path / "data", GOOD, name="a.jsonl")
    jsonl(tmp_path / "elsewhere", GOOD, GOOD, name="b.jsonl")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "more" / "circle").symlink_to(tmp_path / "data")
    assert len(load(tmp_path / "data").prompts) == 3


def test_a_column_with_dots_in_its_name_is_read_from_a_table(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"prompt": ["x"], "reward_model.ground_truth": ["5"]}
    file = table(tmp_path, **columns)
    assert [prompt.answer for prompt in load(file).prompts] == ["5"]
    columns = {"a.b": ["x"], "c.d.e": ["5"], "c": [1]}
    file = table(tmp_path, **columns)
    loaded = load(file, prompt_key="a.b", answer_key="c.d.e")
    assert [(prompt.text, prompt.answer) for prompt in loaded.prompts] == [("x", "5")]


def test_a_table_without_rows_or_with_a_foreign_name_is_read_as_a_table(tmp_path: Path) -> None:
    empty = table(tmp_path, prompt=pyarrow.array([], pyarrow.string()))
    assert "it has no rows" in refusal(empty)
    parquet.write_table(pyarrow.table({}), tmp_path / "none.parquet")
    assert "it has no rows" in refusal(tmp_path / "none.parquet")
    whole = table(tmp_path, "data.snappy", prompt=["x"], answer=["1"])
    assert len(load(whole).prompts) == 1


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    columns = [pyarrow.array([text]) for text in ("x", "y", "1")]
    twice = pyarrow.table(columns, names=["prompt", "prompt", "answer"])
    parquet.write_table(twice, tmp_path / "rows.parquet")
    assert "has two columns of one name (it reads prompt, prompt, answer)" in refusal(
        tmp_path / "rows.parquet"
    )
    harmless = pyarrow.table([*columns, columns[0]], names=["prompt", "extra", "answer", "extra"])
    parquet.write_table(harmless, tmp_path / "rows.parquet")
    assert len(load(tmp_path / "rows.parquet").prompts) == 1


def test_a_huge_line_is_left_out_as_overlong(tmp_path: Path) -> None:
    huge = {"prompt": "x" * 3_000_000, "answer": "1"}
    assert str(load(jsonl(tmp_path, GOOD, huge)).left_out) == "1 over-long (row 2)"


def test_rows_of_a_folder_are_named_with_their_file(tmp_path: Path) -> None:
    jsonl(tmp_path, GOOD, {"prompt": "x", "answer": ""}, name="a.jsonl")
    jsonl(tmp_path, GOOD, GOOD, {"prompt": "", "answer": "1"}, name="b.jsonl.gz")
    loaded = load(tmp_path)
    assert [prompt.row for prompt in loaded.prompts] == [0, 2, 3]
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    assert str(loaded.left_out) == f"2 empty (row 2 of {a}, row 3 of {b})"
    jsonl(tmp_path, GOOD, {"prompt": "x"}, name="c.jsonl")
    assert refusal(tmp_path).startswith(f"row 2 of {tmp_path}/c.jsonl has no column 'answer'; set")


def test_shards_of_different_schemas_are_read_and_a_missing_column_is_named(
    tmp_path: Path,
) -> None:
    table(tmp_path, "0.parquet", prompt=["a"], answer=[1], extra=[1])
    table(tmp_path, "1.parquet", answer=["2"], prompt=["b"])
    table(tmp_path, "2.parquet", prompt=["c"], reward_model=[{"ground_truth": 3.0}])
    assert [prompt.answer for prompt in load(tmp_path).prompts] == ["1", "2", "3"]
    table(tmp_path, "3.parquet", prompt=["c"], gold=[{"value": 3.0}], chat=[["x"]])
    assert refusal(tmp_path) == (
        f"row 1 of {tmp_path}/3.parquet has no column 'answer'; "
        "set data.answer_key to one of prompt, gold.value, chat.0"
    )


def test_a_pattern_names_the_files_of_one_split(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "test-0"):
        table(tmp_path, f"{name}.parquet", prompt=[name], answer=["1"])
    texts = [prompt.text for prompt in load(tmp_path / "train-*.parquet").prompts]
    assert texts == ["train-0", "train-1"]
    assert "valid-*.parquet does not exist; give the path" in refusal(tmp_path / "valid-*.parquet")
    jsonl(tmp_path, GOOD, name="train.jsonl")
    assert "matches files of different formats" in refusal(tmp_path / "train*")


def test_hidden_files_of_a_folder_are_skipped(tmp_path: Path) -> None:
    jsonl(tmp_path, GOOD)
    (tmp_path / "._rows.jsonl").write_bytes(b"\0\5\26\7")
    (tmp_path / ".cache").mkdir()
    jsonl(tmp_path / ".cache", GOOD)
    assert len(load(tmp_path).prompts) == 1


def test_a_folder_with_only_json_names_a_file(tmp_path: Path) -> None:
    jsonl(tmp_path, GOOD, name="data.json")
    assert refusal(tmp_path).endswith(f"give a file, such as {tmp_path}/data.json")


@pytest.mark.parametrize("kind", ["jsonl", "gzip", "parquet"])
def test_no_damage_to_a_file_is_more_than_one_line(tmp_path: Path, kind: str) -> None:
    rows = [
        {"prompt": f"What is {row}?", "answer": row, "reward_model": {"a": 1}} for row in range(50)
    ]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        whole = (tmp_path / "rows.parquet").read_bytes()
    else:
        whole = jsonl(tmp_path, *rows).read_bytes()
        whole = gzip.compress(whole) if kind == "gzip" else whole
    generator = random.Random(0)
    file = tmp_path / f"damaged.{kind}"
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        file.write_bytes(
            damaged[: generator.choice([len(damaged), generator.randrange(len(damaged))])]
        )
        try:
            load(file)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017 (either is right)
            assert str(file) in str(error)  # noqa: PT017


def test_evaluation_problems_are_checked_in_the_same_way(tmp_path: Path) -> None:
    file = jsonl(tmp_path, GOOD, {"prompt": ["x"], "answer": "1"})
    with pytest.raises(ValueError, match=re.escape(f"column 'prompt' in row 2 of {file} holds")):
        load_fingerprints(Source(path=file))
    good = jsonl(tmp_path, {"prompt": "Find X.", "answer": None}, '{"prompt": "\\ud83d"}')
    assert load_fingerprints(parse_source(str(good))) == {"findx"}


def test_rows_of_a_map_column_are_objects(tmp_path: Path) -> None:
    gold = pyarrow.array(
        [[("ground_truth", "7")]], pyarrow.map_(pyarrow.string(), pyarrow.string())
    )
    file = table(tmp_path, prompt=["x"], reward_model=gold)
    assert [prompt.answer for prompt in load(file).prompts] == ["7"]
    columns = ["prompt", "reward_model"]
    assert next(read_rows(Source(path=file), columns=columns))["reward_model"] == {
        "ground_truth": "7"
    }
