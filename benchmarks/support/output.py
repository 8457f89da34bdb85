"""Tables on the terminal, and the JSON files of the benchmarks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import hardware

from dapo_async.bench.about import commit


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A Markdown table; the names of the columns are the keys of the first row."""
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        cells = (
            f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def write_result(path: Path | None, benchmark: str, **values: Any) -> None:
    """Writes `values` with commit, date and hardware; None: nowhere."""
    if path is None:
        return
    about = {
        "benchmark": benchmark,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, **values}, indent=1) + "\n")
