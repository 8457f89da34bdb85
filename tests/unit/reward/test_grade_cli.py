"""`dapo-async grade`: rows in, the same rows with their verdicts out; what is no such row is one line."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dapo_async.cli.main import main


def graded(tmp_path, rows, *options):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = main(
        [
            "grade",
            "--input",
            str(tmp_path / "in.jsonl"),
            "--output",
            str(tmp_path / "out.jsonl"),
            *options,
        ]
    )
    return code, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_rows_pass_through_with_their_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": 7, "prediction": "Answer: 34", "gold": "34", "tags": ["a"]},
        {"prediction": "I think 34", "gold": "34"},
        {"prediction": "I think 34", "gold": "34", "extraction": "any"},
        {"prediction": "34.0", "gold": 34, "extraction": "none"},
        {"prediction": r"\boxed{x+1}", "gold": "1+x"},
        {"prediction": "Answer: 1 2 3 4", "gold": "1234", "reason": "from before"},
    ]
    code, out = graded(tmp_path, rows)
    assert code == 0
    assert out[0] == {**rows[0], "correct": True, "extracted": "34", "reason": "correct"}
    assert [(row["correct"], row["extracted"], row["reason"]) for row in out[1:]] == [
        (False, None, "no_answer"),
        (True, "34", "correct"),
        (True, "34.0", "correct"),
        (True, "x+1", "correct"),
        (False, "1 2 3 4", "wrong"),
    ]
    assert capsys.readouterr().out == "6 rows: 4 correct, 1 no_answer, 1 wrong; accuracy 0.6667\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list"),
        ('{"gold": "3"}', "has no text in prediction (missing)"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"prediction": "3", "gold": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"prediction": null, "gold": "3"}', "has no text in prediction (NoneType)"),
        ('{"prediction": "3", "gold": " "}', "gold is empty"),
        (
            '{"prediction": "3", "gold": "3", "extraction": "all"}',
            "extraction ('all') must be one of marker, any, none",
        ),
    ],
)
def test_what_is_no_row_is_one_line_that_names_its_line_and_the_output_stays_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line, says
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prediction": "3", "gold": "3"}\n\n' + line + "\n")
    (tmp_path / "out.jsonl").write_text("from before\n")
    assert (
        main(
            [
                "grade",
                "--input",
                str(tmp_path / "in.jsonl"),
                "--output",
                str(tmp_path / "out.jsonl"),
            ]
        )
        == 2
    )
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("dapo-async: line 3 of ")
    assert says in said
    assert (tmp_path / "out.jsonl").read_text() == "from before\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--input", "absent.jsonl", "--output", "out.jsonl"],
            "absent.jsonl can't be used: No such file",
        ),
        (
            ["--input", "absent.jsonl", "--output", "before.jsonl"],
            "absent.jsonl can't be used: No such file",
        ),
        (["--input", "in.jsonl", "--output", "."], "can't be used"),
        (["--input", "in.jsonl", "--output", "hard.jsonl"], "must be another file"),
        (["--input", "in.jsonl", "--output", "soft.jsonl"], "must be another file"),
        (["--input", "out.jsonl.partial", "--output", "out.jsonl"], "must be another file"),
        (["--input", "in.jsonl", "--output", "no/such/out.jsonl"], "can't be used"),
        (["--input", "in.jsonl", "--output", "in.jsonl"], "must be another file"),
        (
            ["--input", "in.jsonl", "--output", "out.jsonl", "--timeout-s", "0"],
            "--timeout-s (0) must be positive",
        ),
        (
            ["--input", "in.jsonl", "--output", "out.jsonl", "--timeout-s", "inf"],
            "--timeout-s (inf) must be positive and at most 86400, a day",
        ),
        (["--input", "in.jsonl", "--output", "out.jsonl", "seed=1"], "grade takes no overrides"),
        (["--input", "in.jsonl"], "--output"),
    ],
)
def test_files_and_options_that_can_not_be_used_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments,
    says,
) -> None:
    monkeypatch.chdir(tmp_path)
    row = '{"prediction": "3", "gold": "3"}\n'
    for name in ("in.jsonl", "before.jsonl", "out.jsonl.partial"):
        (tmp_path / name).write_text(row)
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "in.jsonl")
    (tmp_path / "soft.jsonl").symlink_to("in.jsonl")
    assert main(["grade", *arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert says in said
    assert [
        (tmp_path / name).read_text() for name in ("in.jsonl", "before.jsonl", "hard.jsonl")
    ] == [row] * 3
    assert (
        "out.jsonl.partial" not in arguments or (tmp_path / "out.jsonl.partial").read_text() == row
    )


def test_an_output_that_is_a_link_stays_one_and_a_pipe_is_written_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out.jsonl").symlink_to("real/out.jsonl")
    code, (row,) = graded(tmp_path, [{"prediction": "Answer: 3", "gold": "3"}])
    assert (code, row["reason"]) == (0, "correct")
    assert (tmp_path / "out.jsonl").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["out.jsonl"]
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit((tmp_path / "pipe").read_text)
        assert (
            main(
                ["grade", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "pipe")]
            )
            == 0
        )
        assert json.loads(read.result(timeout=20)) == row
    assert (tmp_path / "pipe").is_fifo()
