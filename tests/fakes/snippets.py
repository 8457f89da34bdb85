"""The fenced code blocks of all README.md and of docs/, and how a test runs them.

A comment directly above a block says how it is tested; without one the block is run as it stands.

    <!-- snippet: ray -->                         run by the test that has a finished run
    <!-- snippet: cluster -->                     run by the test that starts Ray nodes
    <!-- snippet: dry-run, REASON -->             every `dapo-async train` is run with --dry-run
    <!-- snippet: covered by PATH[::TEST] -->     that test or script runs it
    <!-- snippet: example, REASON -->             only its syntax is checked

A block whose first line is `# NAME.py` or `# NAME.yaml` is written to that file for the blocks
after it. Blocks without a language, or in `text`, are output and are left alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from paths import ROOT

PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "cluster", "configs")),
    *sorted((ROOT / "docs").glob("*.md")),
)
FENCE = re.compile(
    r"(?:^<!-- snippet: (?P<how>[^>]*?) -->\n)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
FILE = re.compile(r"# (?P<name>[\w.-]+\.(?:py|yaml|sh))$")
LINKED = ("configs", "benchmarks", "cluster", "dapo_async", "tests", "pyproject.toml")


@dataclass(frozen=True, slots=True)
class Snippet:
    """One block of a page; `line` counts from 1."""

    page: Path
    line: int
    language: str
    code: str
    how: str  # run | ray | cluster | dry-run | covered | example
    detail: str = ""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, or None."""
        match = FILE.match(self.code.split("\n")[0])
        return match["name"] if match else None


def snippets(page: Path) -> list[Snippet]:
    """Every block of `page` that has a language other than text, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        if match["language"] in ("", "text"):
            continue
        how, _, detail = re.sub(r"^covered by ", "covered, ", match["how"] or "run").partition(", ")
        assert how in ("run", "ray", "cluster", "dry-run", "covered", "example"), f"{page}: {how}"
        line = text.count("\n", 0, match.start("code")) + 1
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        found.append(Snippet(page, line, match["language"], code, how, detail))
    return found


def workplace(folder: Path) -> Path:
    """A folder that looks like a checkout: commands of the docs run in it and write into it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs").mkdir()
    return folder


def write_file(snippet: Snippet, folder: Path) -> None:
    """Writes a block that is a file."""
    assert snippet.file
    (folder / snippet.file).write_text(snippet.code, encoding="utf-8")


def check_syntax(snippet: Snippet) -> None:
    """Raises if the block can not be read in its language."""
    if snippet.language == "bash":
        subprocess.run(["bash", "-n"], input=snippet.code, text=True, check=True)
    elif snippet.language == "python":
        compile(snippet.code, snippet.where, "exec")
    elif snippet.language == "yaml":
        yaml.safe_load(snippet.code)
    elif snippet.language == "json":
        json.loads(snippet.code)
    else:
        raise AssertionError(f"{snippet.where}: no test knows the language {snippet.language}")


def run(snippet: Snippet, folder: Path, *, timeout_s: float = 300.0) -> None:
    """Runs a bash or Python block in `folder`; fails with its output if it fails."""
    if snippet.language not in ("bash", "python"):
        return
    code = snippet.code
    if snippet.how == "dry-run":
        code = dry(code)
    command = ["bash", "-euo", "pipefail", "-c", code]
    if snippet.language == "python":
        command = [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{snippet.where} ended with {done.returncode}:\n{done.stderr}"


def dry(code: str) -> str:
    """Only the `dapo-async train` commands of `code`, each with --dry-run, with continued lines."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        command = line.partition(" #")[0].strip()
        if match := re.search(r"(PYTHONPATH=\S+ )?dapo-async train .*", command):
            commands.append(f"{match[0]} --dry-run")
    assert commands, "a dry-run block has a dapo-async train command"
    return "\n".join(commands)
