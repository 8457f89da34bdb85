"""Random kills in a supervised run: what dies, what happens, seconds until it trains again.

python benchmarks/chaos.py [--kills 100] [--seed 0] [--engine torch|sglang] [--ping-s 5]
                           [--json OUT] [--quick]

One run of the quickstart's task with two rollout workers, an evaluator and `train --supervise`. A
victim is drawn, gets SIGKILL (now and then SIGSTOP), and the next one is drawn when the run has
recovered. Then the run trains on to its last step.

- `worker`, `evaluator`, `learner`, `replay`, `server` (of SGLang): recovered when its replacement
  works
- `driver`, `head` (Ray's GCS), `raylet`: recovered when the resumed run has trained a step
- `reaper`, which ends Ray after a killed driver: recovered when the driver has replaced it

Checked at the end:

- exit code 0, and the accuracy is at least `--least-accuracy`
- no step is missing or twice in metrics.jsonl
- no group is trained in two steps, and the recorded batches have as many groups as were counted
- every group of the order was admitted and trained, or has ended for a reason that is counted; only
  the newest ones, as many as the staleness bound allows to be outstanding, may end unused

`throughput_kept` is what the steps would have taken without kills, each at the median of a step,
per second of the run; the run's start and its last evaluation count as lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from support.output import show, write_result
from support.started_run import StartedRun

from dapo_async.config import load
from dapo_async.replay.group_io import read_groups

# How often each victim is drawn.
WEIGHTS = {
    "worker": 6,
    "worker (SIGSTOP)": 2,
    "evaluator": 3,
    "learner": 3,
    "learner (SIGSTOP)": 1,
    "replay": 2,
    "replay (SIGSTOP)": 1,
    "driver": 2,
    "driver (SIGSTOP)": 1,
    "head": 1,
    "raylet": 1,
    "reaper": 1,
}
SERVER_WEIGHTS = {"server": 6, "worker": 3, "learner": 2, "replay": 1, "driver": 1}
RESUMED = {"driver", "head", "raylet"}  # the run starts again
BACK = {  # what the run says when the replacement of another one works
    "evaluator": "evaluator pid",
    "learner": "the learner trains again",
    "replay": "replay goes on after",
    "reaper": "the reaper of this run's Ray ended",
}
STOPPED = " (SIGSTOP)"
NEVER = (  # what must be 0 at the end
    "steps_missing_or_twice",
    "groups_lost",
    "groups_in_flight",
    "groups_trained_twice",
    "groups_trained_unrecorded",
    "groups_never_admitted",
    "prompts_skipped",
)
PING_S = 5.0  # on a quiet machine; a busy one stops the start of a driver for longer
LONGEST_S = 600.0  # for one recovery
SETTINGS = (
    "rollout.num_workers=2",
    "replay.dynamic_sampling=false",  # else the last steps wait for groups that are not solved
    "evaluation.every_steps=6",
    "train.checkpoint_every_steps=2",
    "train.record=true",
    "tracking.sinks=none",
)
QUICK = ("replay.groups_per_step=4", "replay.group_size=8", "evaluation.num_prompts=64")
SGLANG = (
    "rollout.engine=sglang",
    "rollout.num_slots=32",
    "model.num_cpus=0.5",
    "rollout.server_flags=--max-total-tokens 16384",
    "deadlines.start_s=600",  # a server starts slowly beside a run on few cores
)
TRAINED = re.compile(r"^step +(\d+)/", re.MULTILINE)


class Victim(StartedRun):
    """The supervised run."""

    @property
    def tail(self) -> str:
        """The last lines, and where all of them are."""
        lines = [line[:300] for line in self.output.splitlines()[-20:]]
        return "\n".join([f"{self._log}:", *lines])

    @property
    def newest_start(self) -> str:
        """What the run has printed since it was started last."""
        return self.output.rpartition("run directory ")[2]

    @property
    def num_starts(self) -> int:
        return self.output.count("run directory ")

    def wait(self, done: Callable[[], bool], what: str) -> float:
        """Seconds until `done`. Raises RuntimeError with the last lines when that takes too long,
        and when the run has ended."""
        began_s = time.monotonic()
        while not done():
            if self.process.poll() is not None:
                raise RuntimeError(f"{what}: the run has ended\n{self.tail}")
            if time.monotonic() - began_s > LONGEST_S:
                raise RuntimeError(f"{what}: not within {LONGEST_S:g} s\n{self.tail}")
            time.sleep(0.02)
        return time.monotonic() - began_s

    def trains(self) -> bool:
        return bool(TRAINED.search(self.newest_start))

    def pid(self, name: str) -> int:
        """Of an actor's newest process."""
        return int(re.findall(rf"^{name} +pid (\d+) ", self.newest_start, re.MULTILINE)[-1])

    def server(self, name: str) -> int:
        """Of the SGLang server of a worker: the child of the process that writes its log."""
        log = str(self.root / "engines" / f"{name}.log")
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(file.path == log for file in process.open_files()):
                    return process.children()[0].pid
        raise ProcessLookupError(log)

    def descendant(self, title: str) -> int:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if title in " ".join(process.cmdline()):
                return process.pid
        raise ProcessLookupError(title)

    def blow(self, kind: str, rng: random.Random) -> Callable[[], bool]:
        """Strikes; returns what tells that the run has recovered."""
        starts, said = self.num_starts, self.output
        what = kind.removesuffix(STOPPED)
        number = signal.SIGKILL if what == kind else signal.SIGSTOP
        if what in RESUMED:
            pid = {
                "driver": lambda: psutil.Process(self.process.pid).children()[0].pid,
                "head": lambda: self.descendant("gcs_server"),
                "raylet": lambda: self.descendant("raylet/raylet"),
            }[what]()
            os.kill(pid, number)
            return lambda: self.num_starts > starts and self.trains()
        name = what if what in BACK else f"rollout-{rng.randrange(2)}"
        line = BACK.get(what, f"{name} generates again")
        count = said.count(line)
        pid = self.descendant("orphan_reaper") if what == "reaper" else self.pid(name)
        os.kill(self.server(name) if what == "server" else pid, number)
        # More restarts than an actor's budget allows end the run, and it is resumed.
        return lambda: (
            self.output.count(line) > count or (self.num_starts > starts and self.trains())
        )


def kill_at_random(victim: Victim, *, kills: int, seed: int, weights: dict[str, int]) -> Any:
    """Kind and seconds of each recovery."""
    rng, recoveries = random.Random(seed), []
    for number in range(kills):
        victim.wait(victim.trains, "the first step")
        time.sleep(rng.uniform(0.5, 3.0))
        (kind,) = rng.choices([*weights], weights=[*weights.values()])
        try:
            recovered = victim.blow(kind, rng)
        except (ProcessLookupError, psutil.NoSuchProcess, IndexError):
            continue  # between two starts
        took_s = victim.wait(recovered, f"kill {number + 1}, {kind}")
        print(f"{number + 1:4} {kind:18} {took_s:6.1f} s", flush=True)
        recoveries.append((kind, took_s))
    return recoveries


def check(root: Path, wall_s: float) -> dict[str, Any]:
    """Counts of what must not happen, and the throughput, from the files of the run."""
    summary = json.loads((root / "summary.json").read_text())
    groups = dict(summary["groups"])
    admitted, ended = groups.pop("admitted"), dict(groups)
    ended["rejected"] = sum(groups["rejected"].values())
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    step_s = statistics.median(row["step_s"] for row in rows)
    times: Counter[int] = Counter()
    for path in sorted((root / "recorded").glob("step_*.safetensors")):
        times.update(group.group_id for group in read_groups(path))
    # Outstanding groups at the end of the run are the newest ones.
    replay = load(root / "config.yaml", files=False).replay
    most_unused = (replay.max_staleness + 1) * replay.groups_per_step
    untrained = {*range(admitted - most_unused)} - {*times}
    excused = sum(ended[name] for name in ("rejected", "evicted", "failed", "skipped"))
    return {
        "accuracy": summary["final_accuracy"],
        "steps": len(steps),
        "steps_missing_or_twice": len(set(range(len(steps))) ^ set(steps))
        + len(steps)
        - len({*steps}),
        "groups_admitted": admitted,
        "groups_lost": admitted - sum(ended.values()),
        "groups_trained_twice": sum(count > 1 for count in times.values()),
        "groups_trained_unrecorded": ended["trained"] + ended["skipped"] - len(times),
        "groups_never_admitted": len({*times} - {*range(admitted)}),
        "prompts_skipped": max(0, len(untrained) - excused),
        "most_unused": most_unused,
        **{f"groups_{name}": count for name, count in ended.items()},
        "staleness_max": summary["staleness"]["max"],
        "median_step_s": step_s,
        "throughput_kept": len(steps) * step_s / wall_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=400, help="of the run; kills come before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=WEIGHTS, metavar="VICTIM")
    parser.add_argument("--engine", choices=("torch", "sglang"), default="torch")
    parser.add_argument(
        "--least-accuracy", type=float, default=0.9, help="at the end; less is a failure"
    )
    parser.add_argument(
        "--ping-s", type=float, default=PING_S, help="silence after which a process hangs"
    )
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="one kill of a worker, a tiny run")
    options = parser.parse_args()
    weights = WEIGHTS if options.engine == "torch" else SERVER_WEIGHTS
    if options.only:
        weights = {kind: weights[kind] for kind in options.only}
    settings, steps = [*SETTINGS, f"deadlines.ping_s={options.ping_s}"], options.steps
    if options.quick:
        options.kills, steps, weights = 1, 40, {"worker": 1}
        options.least_accuracy = 0.0
        settings += QUICK
    if options.engine == "sglang":
        settings += SGLANG
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))  # kept when the run fails
    victim = Victim(folder, ["--supervise", *settings, f"train.num_steps={steps}"])
    try:
        began_s = time.monotonic()
        recoveries = kill_at_random(victim, kills=options.kills, seed=options.seed, weights=weights)
        code = victim.process.wait(3600)
        wall_s = time.monotonic() - began_s
        if code != 0:
            raise RuntimeError(f"exit code {code}\n{victim.tail}")
        found = check(victim.root, wall_s)
    finally:
        if victim.process.poll() is None:
            os.killpg(victim.process.pid, signal.SIGKILL)
    shutil.rmtree(folder)
    by_kind = defaultdict(list)
    for kind, took_s in recoveries:
        by_kind[kind].append(took_s)
    rows = [
        {
            "what is killed": kind,
            "kills": len(times),
            "median s": statistics.median(times),
            "worst s": max(times),
        }
        for kind, times in sorted(by_kind.items())
    ]
    show(rows)
    show([{**found, "wall_s": wall_s}])
    assert all(found[name] == 0 for name in NEVER), found
    assert found["groups_unused"] <= found["most_unused"], found
    assert found["accuracy"] >= options.least_accuracy, found
    write_result(
        options.json,
        "chaos",
        engine=options.engine,
        seed=options.seed,
        rows=rows,
        wall_s=wall_s,
        **found,
    )


if __name__ == "__main__":
    main()
