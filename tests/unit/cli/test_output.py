"""A closed or full standard stream changes neither what a command does nor its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import QUICKSTART
from run_support import COMMAND, environment

GONE = ("| true", "<&- >&- 2>&-", "| head -n 1", ">&-", ">/dev/full", "2>&1 | true")


def shell(words: str, ending: str, tmp_path: Path) -> tuple[int, str]:
    """Exit code and standard error of a command in bash, with its streams as `ending` says."""
    done = subprocess.run(
        ["bash", "-c", f"{COMMAND} {words} {ending}; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("ending", GONE)
def test_every_command_ends_as_it_would_with_a_reader(ending: str, tmp_path: Path) -> None:
    rows = [{"prediction": "\\boxed{4}", "gold": "4"}, {"prediction": "5", "gold": "4"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dry_run = (f"train {QUICKSTART} --dry-run", 0) if ending in GONE[:2] else ("train --help", 0)
    for words, code in (
        dry_run,
        ("config --explain", 0),
        (f"train {QUICKSTART} learner.lrr=1", 2),
        ("grade --input in.jsonl --output out.jsonl", 0),
    ):
        exit_code, errors = shell(words, ending, tmp_path)
        assert exit_code == code, (words, ending, errors)
        assert "Traceback" not in errors
        assert "BrokenPipe" not in errors
    graded = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in graded] == [True, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_file_that_is_opened_without_standard_output_gets_no_lines(tmp_path: Path) -> None:
    script = (
        "from dapo_async.tracking.terminal import lasting_streams\n"
        "with lasting_streams():\n"
        "    with open('file', 'w') as file:\n"
        "        assert file.fileno() > 2\n"
        "        print('a line')\n"
    )
    (tmp_path / "script.py").write_text(script)
    subprocess.run(
        ["bash", "-c", f"{sys.executable} script.py <&- >&- 2>&-"],
        cwd=tmp_path,
        env=environment(),
        timeout=60,
        check=True,
    )
    assert (tmp_path / "file").read_text() == ""
