"""How long a tiny run takes to start and to end, phase by phase, and how much CPU time it costs.

It starts `dapo-async train` on the quickstart's task with two steps, and reads the times from the
lines that the command prints, from the clocks of the actors (`timeline.json`), and from the
processes. `--against FOLDER` alternates with another checkout, such as the one before a change.
All times are seconds since the command. They depend on what else the machine does; the CPU time
does so less.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from engine import hardware

from dapo_async.bench.about import commit

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "train.num_steps=2",
    "replay.groups_per_step=4",
    "replay.group_size=4",
    "replay.dynamic_sampling=false",
    "evaluation.num_prompts=16",
    "tracking.sinks=none",
)
# Phase → the line of the command that ends it.
LINES = {
    "inputs checked": "run directory ",
    "Ray started": "started a new Ray",
    "actors ready": "replay ",
    "weights published, initial evaluation": "initial evaluation ",
    "first step": "step ",
    "last evaluation": "final evaluation ",
    "run ended": "done: ",
}


class CpuTime:
    """CPU seconds of a process and its descendants, also of those that end before it."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seconds: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for process in processes:
                try:
                    times = process.cpu_times()
                    self._seconds[process.pid] = times.user + times.system
                except psutil.NoSuchProcess:
                    continue

    def finish(self) -> float:
        self._ended.set()
        self._thread.join()
        return sum(self._seconds.values())


def measure(root: Path, folder: Path) -> dict[str, float]:
    """One run of the checkout `root`: seconds at the end of each phase, and CPU seconds."""
    run_dir = folder / "run"
    config = str(root / "configs" / "quickstart.yaml")
    command = [sys.executable, "-m", "dapo_async", "train", config, f"run_dir={run_dir}", *TINY]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    began_s = time.time()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=root,
        env=environment,
    ) as process:
        cpu = CpuTime(process.pid)
        printed: list[str] = []
        ends: dict[str, float] = {}
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            for phase, start in LINES.items():
                if line.startswith(start):
                    ends.setdefault(phase, time.time() - began_s)
        code = process.wait()
        ends["process gone"] = time.time() - began_s
    seconds = cpu.finish()
    assert code == 0, "".join(printed)
    assert ends.keys() >= LINES.keys(), "".join(printed)
    for actor, (entered_s, ready_s) in actor_starts(run_dir).items():
        # The clock of the driver begins right after `inputs checked`.
        ends[f"{actor} entered"] = ends["inputs checked"] + entered_s
        if ready_s is not None:
            ends[f"{actor} loaded"] = ends["inputs checked"] + ready_s
    return {**dict(sorted(ends.items(), key=lambda item: item[1])), "CPU seconds": seconds}


def actor_starts(run_dir: Path) -> dict[str, tuple[float, float | None]]:
    """When each actor's constructor began, and when its first state ended if that was `start`."""
    events: list[dict[str, Any]] = json.loads((run_dir / "timeline.json").read_text())[
        "traceEvents"
    ]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    first: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["ph"] == "X" and re.match("replay|learner|rollout", names[event["pid"]]):
            name = names[event["pid"]]
            if name not in first or event["ts"] < first[name]["ts"]:
                first[name] = event
    return {
        name: (
            event["ts"] / 1e6,
            (event["ts"] + event["dur"]) / 1e6 if event["name"] == "start" else None,
        )
        for name, event in first.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="one run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout")
    options = parser.parse_args()
    checkouts: Sequence[Path] = [ROOT, *([options.against.resolve()] if options.against else [])]
    rounds: dict[str, list[dict[str, float]]] = {str(root): [] for root in checkouts}
    for _ in range(1 if options.quick else options.rounds):
        for root in checkouts:
            with tempfile.TemporaryDirectory() as folder:
                rounds[str(root)].append(measure(root, Path(folder)))
    medians = {
        root: {
            phase: statistics.median(run[phase] for run in runs if phase in run)
            for phase in runs[0]
        }
        for root, runs in rounds.items()
    }
    names = ["this checkout", "against"][: len(checkouts)]
    print(f"{'seconds since the command, medians':<40}" + "".join(f"{name:>16}" for name in names))
    for phase in medians[str(ROOT)]:
        values = "".join(
            f"{medians[str(root)].get(phase, float('nan')):16.2f}" for root in checkouts
        )
        print(f"{phase:<40}{values}")
    if options.json:
        result = {
            "commit": commit(),
            "hardware": hardware(),
            "date": time.strftime("%Y-%m-%d"),
            "load": os.getloadavg(),
            "medians": dict(zip(names, medians.values(), strict=True)),
            "rounds": dict(zip(names, rounds.values(), strict=True)),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
