"""What the studies share.

Each run has its own process. The results are a table over seeds, all curves as JSON, and a plot.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import hardware

from dapo_async.bench.about import commit

LAST = 4  # a table's accuracy is the mean over so many last evaluations
Run = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """`measure` is called with each of `jobs(quick)`.

    Runs with equal `keys` and different seeds are one row of the table.
    """

    name: str
    doc: str
    quick: str  # what --quick does
    keys: tuple[str, ...]
    jobs: Callable[[bool], list[tuple[Any, ...]]]
    measure: Callable[..., Run]
    order: Callable[[Run], Any]
    row: Callable[[list[Run]], dict[str, str]]
    draw: Callable[[list[Run], Path], None]

    def main(self) -> None:
        parser = argparse.ArgumentParser(description=self.doc.splitlines()[0])
        parser.add_argument(
            "--json",
            type=Path,
            metavar="OUT",
            help="also write every curve there, and a picture beside it",
        )
        parser.add_argument("--quick", action="store_true", help=self.quick)
        parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
        options = parser.parse_args()
        jobs, runs = self.jobs(options.quick), []
        with ProcessPoolExecutor(
            options.processes, mp_context=multiprocessing.get_context("spawn")
        ) as pool:
            for future in as_completed([pool.submit(self.measure, *job) for job in jobs]):
                runs.append(future.result())
                name = ", ".join(f"{key} {runs[-1][key]}" for key in (*self.keys, "seed"))
                print(
                    f"{len(runs)} of {len(jobs)}: {name}, {runs[-1]['seconds']} s", file=sys.stderr
                )
        runs.sort(key=self.order)
        distinct = dict.fromkeys(tuple(run[key] for key in self.keys) for run in runs)
        rows = [
            self.row([run for run in runs if tuple(run[key] for key in self.keys) == same])
            for same in distinct
        ]
        print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        for row in rows:
            print(f"| {' | '.join(row.values())} |")
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            about = {
                "benchmark": self.name,
                "commit": commit(),
                "date": time.strftime("%Y-%m-%d"),
                "hardware": hardware(),
            }
            options.json.write_text(json.dumps({**about, "table": rows, "runs": runs}) + "\n")
            self.draw(runs, options.json.with_suffix(".png"))


def accuracy(runs: Sequence[Run]) -> str:
    """Held-out accuracy of the last evaluations: mean over the seeds, lowest and highest."""
    return _spread([statistics.mean(value for _, value in run["held_out"][-LAST:]) for run in runs])


def spread(runs: Sequence[Run], name: str, part: slice = slice(None)) -> str:
    """A curve over the steps in `part`: mean over the seeds, lowest and highest."""
    return _spread([statistics.mean(run[name][part]) for run in runs])


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def mean(runs: Sequence[Run], name: str, part: slice = slice(None)) -> float:
    """The mean of a curve over the steps in `part` and all seeds."""
    return statistics.mean(float(value) for run in runs for value in run[name][part])
