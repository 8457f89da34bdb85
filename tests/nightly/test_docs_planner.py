"""Every command of the docs that plans or simulates a scenario file is run as it stands."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from snippets import PAGES, snippets, workplace

from dapo_async import config as knobs
from dapo_async.cli.main import main

pytestmark = pytest.mark.timeout(900)
LINES = [
    line
    for page in PAGES
    for snippet in snippets(page)
    if snippet.detail == "tests/nightly/test_docs_planner.py"
    for line in snippet.code.splitlines()
]


@pytest.mark.parametrize("line", LINES)
def test_a_documented_plan_is_made(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workplace(tmp_path / "checkout")
    (folder / "docs").symlink_to(Path(__file__).parents[2] / "docs")
    monkeypatch.chdir(folder)
    program, *words = shlex.split(line, comments=True)
    assert program == "dapo-async"
    assert main(words) == 0
    out = capsys.readouterr().out
    assert ("overrides  " in out) == (words[0] == "plan")
    assert ("per million tokens" in out) == ("--cost-per-gpu-hour" in words)
    for option in ("--json", "--html", "--config"):
        if option in words:
            assert (folder / words[words.index(option) + 1]).stat().st_size > 1000
    if "--config" in words:
        knobs.load(folder / words[words.index("--config") + 1], files=False)


def test_the_docs_have_commands_with_every_option() -> None:
    told = " ".join(LINES)
    for option in ("simulate", "--json", "--html", "--config", "--recipe", "--cost-per", "--bench"):
        assert option in told
