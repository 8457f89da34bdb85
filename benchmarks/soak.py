"""Memory of every process of a run over time, at the highest rate of groups.

python benchmarks/soak.py [--minutes 30] [--json OUT] [--quick]

The quickstart's model answers with its three or four tokens, its weights hardly change, no group is
filtered: so the control plane handles as many groups per second as this machine can. The resident
memory of each process is read every second. `slope` is a line through the second half, in MiB per
minute; `grown` is the median of the last tenth against that of the tenth after the first half.
Fails if a process has grown by more than 5 % and 5 MiB in the second half.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from support.output import show, write_result
from support.started_run import StartedRun

MIB = 2**20
RATE = (
    "replay.groups_per_step=64",
    "replay.group_size=4",
    "replay.dynamic_sampling=false",
    "rollout.max_response_tokens=4",
    "learner.lr=1e-9",
    "evaluation.num_prompts=64",
    "evaluation.every_steps=200",
    "train.num_steps=10000000",
    "train.checkpoint_every_steps=200",
    "tracking.sinks=none",
)
QUICK = ("evaluation.num_prompts=0", "evaluation.every_steps=0")
START_S = 300.0
GROWN, GROWN_MIB = 0.05, 5.0
RAYS = {"gcs_server": "Ray's GCS", "raylet/raylet": "raylet", "ray::DashboardAgent": "Ray's agent"}


class Soaked(StartedRun):
    """The run and the memory of its processes."""

    def wait_for_step(self) -> None:
        """Raises RuntimeError when the run ends before its first step or takes too long."""
        deadline_s = time.monotonic() + START_S
        while not re.search(r"^step +\d+/", self.output, re.MULTILINE):
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"no step was trained: {self.output[-2000:]}")
            time.sleep(0.05)

    def processes(self) -> dict[str, psutil.Process]:
        """By name: the driver, each actor, and Ray's own."""
        named = re.findall(r"^(\S+) +pid (\d+) on ", self.output, re.MULTILINE)
        found = {name: psutil.Process(int(pid)) for name, pid in named}
        found["driver"] = driver = psutil.Process(self.process.pid)
        for process in driver.children(recursive=True):
            line = " ".join(process.cmdline())
            found |= {name: process for title, name in RAYS.items() if title in line}
        return found

    def sample(self, seconds: float, every_s: float) -> tuple[list[float], dict[str, list[float]]]:
        """Times, and MiB of each process at these."""
        processes, times = self.processes(), list[float]()
        memory: dict[str, list[float]] = {name: [] for name in processes}
        began_s = time.monotonic()
        while (now_s := time.monotonic() - began_s) < seconds:
            if self.process.poll() is not None:
                raise RuntimeError(f"the run has ended: {self.output[-2000:]}")
            times.append(now_s)
            for name, process in processes.items():
                memory[name].append(process.memory_info().rss / MIB)
            time.sleep(every_s)
        return times, memory

    def rows(self) -> Iterator[dict[str, Any]]:
        for line in (self.root / "metrics.jsonl").read_text().splitlines():
            yield json.loads(line)

    def end(self, *, at_once: bool) -> None:
        if self.process.poll() is not None:
            return
        if at_once:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.terminate()
        self.process.wait(120)


def growth(times: list[float], memory: list[float]) -> dict[str, float]:
    """How the memory of one process went."""
    half, tenth = len(times) // 2, max(1, len(times) // 10)
    line = statistics.linear_regression(times[half:], memory[half:])
    before = statistics.median(memory[half : half + tenth])
    after = statistics.median(memory[-tenth:])
    return {
        "start MiB": memory[0],
        "half MiB": before,
        "end MiB": after,
        "most MiB": max(memory),
        "slope MiB/min": 60 * line.slope,
        "grown": after / before - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="one second, and no check")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="knobs of the run")
    options = parser.parse_args()
    seconds, every_s = (1.0, 0.1) if options.quick else (60 * options.minutes, 1.0)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soaked = Soaked(folder, [*RATE, *(QUICK if options.quick else ()), *options.overrides])
    try:
        soaked.wait_for_step()
        times, memory = soaked.sample(seconds, every_s)
        steps = [*soaked.rows()]
    finally:
        soaked.end(at_once=options.quick)
    shutil.rmtree(folder)
    grew = {name: growth(times, each) for name, each in sorted(memory.items())}
    rows = [{"process": name, **each} for name, each in grew.items()]
    show(rows)
    trained = sum(row["groups"] for row in steps)
    rate = trained / max(1e-9, steps[-1]["time_s"] - steps[0]["time_s"]) if steps else 0.0
    show([{"groups": trained, "groups/s": rate, "steps": len(steps), "seconds": times[-1]}])
    every = max(1, len(times) // 60)
    write_result(
        options.json,
        "soak",
        seconds=times[-1],
        groups=trained,
        rate=rate,
        rows=rows,
        times=times[::every],
        memory={name: each[::every] for name, each in memory.items()},
    )
    grown = [
        name
        for name, each in grew.items()
        if each["grown"] > GROWN and each["end MiB"] - each["half MiB"] > GROWN_MIB
    ]
    assert options.quick or not grown, f"memory grows: {', '.join(grown)}"


if __name__ == "__main__":
    main()
