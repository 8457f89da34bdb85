"""`dapo-async grade`: rows come in, the same rows leave with verdicts; errors are one line."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dapo_async.cli.main import main


def graded(
    tmp_path: Path, rows: Sequence[Mapping[str, Any]], *options: str
) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the rows of the output."""
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
    rows: list[dict[str, Any]] = [
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


@pytest.mark.parametrize("verifier", ["math", "marker"])
def test_a_row_may_have_the_prompt_that_opened_the_thinking(tmp_path: Path, verifier: str) -> None:
    said = {"math": r"first try \boxed{4}", "marker": "first try #### 4"}[verifier]
    prompts: list[tuple[Any, bool]] = [
        ("Q", True),
        (None, True),
        ("Q<think>\n", False),
        ([{"role": "user", "content": "Q"}], True),
        ([{"role": "user", "content": "Q<think>"}], False),
        ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>"}], False),
    ]
    rows = [{"prompt": prompt, "prediction": said, "gold": "4"} for prompt, _ in prompts]
    code, out = graded(tmp_path, rows, "--verifier", verifier)
    assert code == 0
    assert [row["correct"] for row in out] == [expected for _, expected in prompts]
    assert [row["prompt"] for row in out] == [prompt for prompt, _ in prompts]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not valid JSON"),
        (
            '{"prediction": "3", "gold": "3", "prompt": {}}',
            "prompt (dict) must be a text or a list of chat messages",
        ),
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
def test_a_wrong_row_is_one_line_with_its_number_and_the_output_is_unchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, says: str
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
        (["--input", "in.jsonl", "--output", "hard.jsonl"], "must not be the --input"),
        (["--input", "in.jsonl", "--output", "soft.jsonl"], "must not be the --input"),
        (["--input", "out.jsonl.partial", "--output", "out.jsonl"], "must not be the --input"),
        (["--input", "in.jsonl", "--output", "no/such/out.jsonl"], "can't be used"),
        (["--input", "in.jsonl", "--output", "in.jsonl"], "must not be the --input"),
        (
            ["--input", "in.jsonl", "--output", "out.jsonl", "--timeout-s", "0"],
            "--timeout-s (0) must be positive",
        ),
        (
            ["--input", "in.jsonl", "--output", "out.jsonl", "--timeout-s", "inf"],
            "--timeout-s (inf) must be positive and at most 86400 (a day)",
        ),
        (
            ["--input", "in.jsonl", "--output", "out.jsonl", "seed=1"],
            "dapo-async grade does not take seed=1; leave it out",
        ),
        (["--input", "in.jsonl"], "--output"),
    ],
)
def test_files_and_options_that_cannot_be_used_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
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


OWN_VERIFIERS = """
from dapo_async.reward import Verdict

def judge(response, gold):
    return Verdict(correct=0.5 if response else 0.0, extracted=response or None, reason="half")

def breaks(response, gold):
    return Verdict(correct=1 / (len(response) - 3), extracted=response, reason="odd")

def says_true(response, gold):
    return True

def dies(response, gold):
    return Verdict(correct=False, extracted=None, reason="failed")
"""


@pytest.fixture
def own_verifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module `own_verifiers` that can be imported."""
    (tmp_path / "own_verifiers.py").write_text(OWN_VERIFIERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_verifiers", None)


def test_rows_are_judged_by_the_verifier_that_is_named(
    tmp_path: Path, own_verifiers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prediction": "#### 3", "gold": "3"}, {"prediction": "", "gold": "3"}]
    code, out = graded(tmp_path, rows, "--verifier", "marker")
    assert (code, [row["correct"] for row in out]) == (0, [True, False])
    assert capsys.readouterr().out == "2 rows: 1 correct, 1 no_answer; accuracy 0.5000\n"
    code, out = graded(tmp_path, rows, "--verifier", "own_verifiers:judge")
    assert (code, [row["correct"] for row in out]) == (0, [0.5, 0.0])
    assert capsys.readouterr().out == "2 rows: 2 half; accuracy 0.2500\n"


def test_a_row_over_which_the_verifier_died_makes_the_exit_code_1(
    tmp_path: Path, own_verifiers: None
) -> None:
    code, out = graded(
        tmp_path, [{"prediction": "", "gold": "3"}], "--verifier", "own_verifiers:dies"
    )
    assert (code, out[0]["reason"]) == (1, "failed")


@pytest.mark.parametrize(
    ("verifier", "says"),
    [
        ("maths", "--verifier 'maths' is unknown; did you mean 'math'?"),
        ("own_verifiers:absent", "--verifier ('own_verifiers:absent') must be module:function"),
        ("own_verifiers:breaks", "own_verifiers:breaks raised ZeroDivisionError: "),
        ("own_verifiers:breaks", "own_verifiers.py:8); correct the function"),
        ("own_verifiers:says_true", "own_verifiers:says_true returned bool, must return"),
        ("exact", "extraction needs --verifier math, but the verifier is exact; leave it out"),
    ],
)
def test_a_verifier_that_cannot_be_used_is_one_line_and_nothing_is_written(
    tmp_path: Path,
    own_verifiers: None,
    capsys: pytest.CaptureFixture[str],
    verifier: str,
    says: str,
) -> None:
    row = {"prediction": "abc", "gold": "3"} | (
        {"extraction": "any"} if verifier == "exact" else {}
    )
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["grade", *files, "--verifier", verifier]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert says in said
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_link_stays_a_link_and_a_pipe_is_written_directly(tmp_path: Path) -> None:
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
        assert json.loads(read.result(timeout=60)) == row
    assert (tmp_path / "pipe").is_fifo()
