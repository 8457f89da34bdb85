"""`dapo-async grade`: rows in, the same rows with their verdicts out; what is no such row is one line."""

import json

import pytest

from dapo_async.cli import main


def graded(tmp_path, rows, *options):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = main(["grade", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), *options])
    return code, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_rows_pass_through_with_their_verdicts(tmp_path, capsys):
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
        ('{"prediction": null, "gold": "3"}', "has no text in prediction (NoneType)"),
        ('{"prediction": "3", "gold": " "}', "gold is empty"),
        ('{"prediction": "3", "gold": "3", "extraction": "all"}', "extraction ('all') must be one of marker, any, none"),
    ],
)
def test_what_is_no_row_is_one_line_that_names_its_line(tmp_path, capsys, line, says):
    (tmp_path / "in.jsonl").write_text('{"prediction": "3", "gold": "3"}\n\n' + line + "\n")
    assert main(["grade", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("dapo-async: line 3 of ")
    assert says in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--input", "absent.jsonl", "--output", "out.jsonl"], "absent.jsonl can't be used: No such file"),
        (["--input", "in.jsonl", "--output", "no/such/out.jsonl"], "can't be used"),
        (["--input", "in.jsonl", "--output", "in.jsonl"], "must be another file"),
        (["--input", "in.jsonl", "--output", "out.jsonl", "--timeout-s", "0"], "--timeout-s (0) must be positive"),
        (["--input", "in.jsonl", "--output", "out.jsonl", "--timeout-s", "inf"], "--timeout-s (inf) must be positive and at most 86400, a day"),
        (["--input", "in.jsonl", "--output", "out.jsonl", "seed=1"], "grade takes no overrides"),
        (["--input", "in.jsonl"], "--output"),
    ],
)
def test_files_and_options_that_can_not_be_used_are_one_line(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prediction": "3", "gold": "3"}\n')
    assert main(["grade", *arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert says in said
