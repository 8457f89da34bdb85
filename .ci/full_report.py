"""Writes the outcomes of `.ci/full` to `.ci/full.md`: one row per test, with the commit it ran on.

python .ci/full_report.py REPORT COMMIT     REPORT: pytest's junit XML

A test that did not run this time keeps its row, until no file has a test of that name any more.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / ".ci" / "full.md"
HEAD = "# Last results of `.ci/full`\n\n| test | outcome | seconds | commit | date, machine |\n"
ROW = re.compile(r"^\| `(?P<name>[^`]+)` \|.*$", re.MULTILINE)


def known_rows() -> dict[str, str]:
    """By test, in the order of the page: rows of tests that are still there."""
    text = PAGE.read_text() if PAGE.exists() else ""
    return {row["name"]: row[0] for row in ROW.finditer(text) if is_there(row["name"])}


def is_there(name: str) -> bool:
    module, _, test = name.partition("::")
    files = [*ROOT.glob(f"tests/nightly/{module}.py"), *ROOT.glob(f"tests/chaos/{module}.py")]
    return any(f"def {test.partition('[')[0]}(" in file.read_text() for file in files)


def main() -> None:
    report, commit = sys.argv[1:]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    rows = known_rows()
    for case in ElementTree.parse(report).iter("testcase"):
        module = case.attrib["classname"].rpartition(".")[2]
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name, outcome = f"{module}::{case.attrib['name']}", bad[0] if bad else "passed"
        seconds, day = float(case.attrib["time"]), time.strftime("%Y-%m-%d")
        rows[name] = f"| `{name}` | {outcome} | {seconds:.0f} | {commit} | {day}, {machine} |"
    table = "\n".join(rows[name] for name in sorted(rows))
    PAGE.write_text(f"{HEAD}|---|---|---:|---|---|\n{table}\n")
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
