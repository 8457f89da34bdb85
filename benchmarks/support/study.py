"""What the studies share.

Each run has its own process. The results are a table over seeds, all curves as JSON, and a plot.
A study of hours can be stopped: each run is written when it ends, and `--resume` goes on.
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
from dapo_async.utils.files import atomic_write

LAST = 4  # a table's accuracy is the mean over so many last evaluations
Run = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """`measure` is called with each of `jobs(quick)`: the values of `keys`, a seed, and the steps.

    A run has them by name. Runs with equal `keys` and different seeds are one row of the table.
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
        parser.add_argument("--resume", action="store_true", help="keep the runs that OUT has")
        parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
        options = parser.parse_args()
        if options.resume and options.json is None:
            parser.error("--resume needs the --json OUT of the study that it goes on with")
        runs = json.loads(options.json.read_text())["runs"] if options.resume else []
        names = (*self.keys, "seed", "steps")
        done = {tuple(run[name] for name in names) for run in runs}
        jobs = [job for job in self.jobs(options.quick) if job not in done]
        total, now = len(runs) + len(jobs), commit()
        with ProcessPoolExecutor(
            options.processes, mp_context=multiprocessing.get_context("spawn")
        ) as pool:
            for future in as_completed([pool.submit(self.measure, *job) for job in jobs]):
                run = {**future.result(), "commit": now}
                runs.append(run)
                self._write(options.json, runs)
                name = ", ".join(f"{key} {run[key]}" for key in names)
                print(f"{len(runs)} of {total}: {name}, {run['seconds']} s", file=sys.stderr)
        rows = self._table(runs)
        print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        for row in rows:
            print(f"| {' | '.join(row.values())} |")
        if options.json:
            self.draw(runs, options.json.with_suffix(".png"))

    def _table(self, runs: list[Run]) -> list[dict[str, str]]:
        runs.sort(key=self.order)
        distinct = dict.fromkeys(tuple(run[key] for key in self.keys) for run in runs)
        return [
            self.row([run for run in runs if tuple(run[key] for key in self.keys) == same])
            for same in distinct
        ]

    def _write(self, path: Path | None, runs: list[Run]) -> None:
        """One run a line."""
        if path is None:
            return
        about = {
            "benchmark": self.name,
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
        }
        lines = ",\n".join(json.dumps(run) for run in sorted(runs, key=self.order))
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, f'{json.dumps(about)[:-1]}, "runs": [\n{lines}\n]}}\n')


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
