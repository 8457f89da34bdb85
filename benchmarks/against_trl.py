"""End to end against TRL's GRPOTrainer: seconds and CPU seconds per step, tokens/s, time to learn.

python benchmarks/against_trl.py [--json OUT] [--quick] [--tasks T …] [--arms A …] [--steps N]
                                 [--seeds S …] [--folder FOLDER]

Three tasks with responses of 3.7, 19 to 57, and 192 tokens (`support/warm_up.py`). All arms have
the same checkpoint, problems, verifier, batch, learning rate and number of threads (two), and no
dynamic sampling, which TRL lacks. The arms take turns, seed by seed:

    trl           TRL with transformers' `generate`, two threads
    default       this system with its default config: engine and learner with one thread each
    synchronous   this system at staleness 0: engine and learner take turns, with two threads each

`--folder` keeps the virtual environment that TRL is installed into, and the warm checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from quickstart import CONFIG, ROOT
from support.output import show, write_result
from support.warm_up import TASKS, Task, warm_checkpoint, write_problems

TRL, TORCH, TRANSFORMERS = "trl==1.16.0", "torch==2.13.0", "transformers==5.12.1"
ARMS = ("trl", "default", "synchronous")
GROUP_SIZE, LR, THREADS = 8, 1e-4, 2
WARM_PROBABILITY, WARM_STEPS = 0.4, 1500
WARM_UP, WINDOW = 5, 8  # steps left out of all rates; steps of a mean accuracy
TARGET = 0.8  # mean accuracy of `WINDOW` training batches
POLL_S = 0.05
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the arms share."""

    task: Task
    model: Path
    data: Path
    steps: int


def environment_with_trl(folder: Path) -> Path:
    """The Python of a virtual environment with TRL; makes it on first use."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"installing {TRL} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pins = ["-c", str(ROOT / "constraints.txt")]
        install = [str(python), "-m", "pip", "install", "-q", *pins, TRL, TORCH, TRANSFORMERS]
        subprocess.run(install, check=True)
        (folder / "installed").touch()
    return python


def trl_command(inputs: Inputs, seed: int, folder: Path, python: Path) -> tuple[list[str], Path]:
    """The command of a run, and the file of its rows."""
    settings = {
        "model": str(inputs.model),
        "data": str(inputs.data),
        "folder": str(folder),
        "rows": str(folder / "rows.jsonl"),
        "steps": inputs.steps,
        "seed": seed,
        "lr": LR,
        "threads": THREADS,
        "groups": inputs.task.groups,
        "group_size": GROUP_SIZE,
        "max_response_tokens": inputs.task.max_response_tokens,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    script = ROOT / "benchmarks" / "support" / "trl_arm.py"
    return [str(python), str(script), str(folder / "settings.json")], folder / "rows.jsonl"


def own_command(
    inputs: Inputs, seed: int, folder: Path, *, synchronous: bool
) -> tuple[list[str], Path]:
    """The same of this system. Only the task, the batch and the learning rate are set."""
    task, run_dir = inputs.task, folder / "run"
    overrides = [
        f"model.path={inputs.model}",
        f"data.train={inputs.data}",
        f"data.heldout={inputs.data}",
        f"run_dir={run_dir}",
        f"seed={seed}",
        f"rollout.num_slots={task.groups * GROUP_SIZE}",
        f"rollout.max_response_tokens={task.max_response_tokens}",
        f"replay.groups_per_step={task.groups}",
        f"replay.group_size={GROUP_SIZE}",
        "replay.dynamic_sampling=false",
        f"learner.lr={LR}",
        "learner.warmup_steps=0",
        "learner.weight_decay=0",
        "learner.num_minibatches=1",
        f"train.num_steps={inputs.steps}",
        f"train.checkpoint_every_steps={inputs.steps}",
        "evaluation.every_steps=0",
        "evaluation.num_prompts=0",
        "tracking.sinks=none",
    ]
    if synchronous:
        overrides += ["replay.max_staleness=0", f"model.num_cpus={THREADS}"]
    command = [sys.executable, "-m", "dapo_async", "train", str(CONFIG), *overrides]
    return command, run_dir / "metrics.jsonl"


def cpu_seconds(root: psutil.Process) -> dict[int, float]:
    """By process, of `root` and its descendants; empty when `root` has ended."""
    seconds: dict[int, float] = {}
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return seconds
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds[process.pid] = times.user + times.system
    return seconds


def num_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(command: Sequence[str], rows_path: Path, *, steps: int) -> tuple[list[Row], float]:
    """The rows of one run, and the CPU seconds of a step after the warm-up."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
    }
    log = rows_path.parent.parent / "output.txt"
    marks: dict[int, dict[int, float]] = {}  # CPU seconds by number of rows
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        ) as process,
    ):
        root, last = psutil.Process(process.pid), 0
        while process.poll() is None and last < steps:
            time.sleep(POLL_S)
            count = num_rows(rows_path)
            if count != last and (count <= WARM_UP or last < WARM_UP or count >= steps - 1):
                marks[count] = cpu_seconds(root)
            last = count
        code = process.wait()
    assert code == 0, log.read_text()
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
    return rows, cpu_per_step(marks, steps)


def cpu_per_step(marks: Mapping[int, Mapping[int, float]], steps: int) -> float:
    """From the CPU seconds of each process by number of steps; without the warm-up if it can be."""
    known = {count: seconds for count, seconds in marks.items() if seconds}
    end = max(known)
    first = min((count for count in known if WARM_UP <= count < end), default=min(known))
    if first == end:  # all rows came at once, which happens in runs of a few steps
        return sum(known[end].values()) / steps
    before = known[first]
    spent = sum(seconds - before.get(pid, 0.0) for pid, seconds in known[end].items())
    return spent / (end - first)


def seconds_to(rows: Sequence[Row], target: float) -> float | None:
    """Seconds of training until `WINDOW` batches in a row have a mean accuracy of `target`."""
    for end in range(WINDOW, len(rows) + 1):
        if statistics.mean(row["accuracy"] for row in rows[end - WINDOW : end]) >= target:
            return float(rows[end - 1]["time_s"])
    return None


def figures(rows: Sequence[Row], cpu_s: float) -> Row:
    """Of one run."""
    first = min(WARM_UP, len(rows) - 2)
    ends = [row["time_s"] for row in rows[first:]]
    tokens = statistics.mean(row["tokens"] for row in rows[first + 1 :])
    step_s = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {
        "step_s": step_s,
        "cpu_s_per_step": cpu_s,
        "tokens_per_step": tokens,
        # Every generated token is trained: nothing is filtered in any arm.
        "tokens_per_s": tokens / step_s,
        "tokens_per_cpu_s": tokens / cpu_s,
        "seconds_to_target": seconds_to(rows, TARGET),
        "first_accuracy": statistics.mean(row["accuracy"] for row in rows[:WINDOW]),
        "last_accuracy": statistics.mean(row["accuracy"] for row in rows[-WINDOW:]),
        "curve": [(round(row["time_s"], 3), row["accuracy"]) for row in rows],
    }


def compare(inputs: Inputs, arms: Sequence[str], seeds: Sequence[int], folder: Path) -> list[Row]:
    """All runs of one task; each seed starts with another arm."""
    runs = []
    python = environment_with_trl(folder / "trl") if "trl" in arms else Path(sys.executable)
    for number, seed in enumerate(seeds):
        turn = number % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            place = folder / "runs" / f"{time.strftime('%H%M%S')}_{inputs.task.name}_{arm}_{seed}"
            place.mkdir(parents=True)
            if arm == "trl":
                (place / "run").mkdir()
                command, rows = trl_command(inputs, seed, place / "run", python)
            else:
                command, rows = own_command(inputs, seed, place, synchronous=arm == "synchronous")
            load = os.getloadavg()[0]
            measured = figures(*run(command, rows, steps=inputs.steps))
            runs.append(
                {"task": inputs.task.name, "arm": arm, "seed": seed, "load": load} | measured
            )
            print(
                f"{inputs.task.name} {arm} seed {seed}: {measured['step_s']:.3f} s/step, "
                f"{measured['cpu_s_per_step']:.3f} CPU s/step, accuracy "
                f"{measured['first_accuracy']:.2f} → {measured['last_accuracy']:.2f}",
                flush=True,
            )
    return runs


def medians(runs: Sequence[Row]) -> list[Row]:
    """One row per task and arm. None: at least half of the runs missed the target."""
    rows = []
    for task, arm in dict.fromkeys((each["task"], each["arm"]) for each in runs):
        own = [each for each in runs if (each["task"], each["arm"]) == (task, arm)]
        row: Row = {
            "task": task,
            "arm": arm,
            "runs": len(own),
            "tokens/step": statistics.mean(each["tokens_per_step"] for each in own),
        }
        for name in ("step_s", "cpu_s_per_step", "tokens_per_s", "seconds_to_target"):
            never = float("inf")
            value = statistics.median(never if each[name] is None else each[name] for each in own)
            row[name] = value if value < never else None
        rows.append(row)
    return rows


def against(rows: Sequence[Row]) -> list[Row]:
    """Adds to each row how many times TRL's seconds and CPU seconds are its own."""
    trl = {row["task"]: row for row in rows if row["arm"] == "trl"}

    def ratios(row: Mapping[str, Any]) -> Row:
        base = trl.get(row["task"])
        names = {"step_s": "TRL / own", "cpu_s_per_step": "TRL / own, CPU"}
        return {shown: base[name] / row[name] for name, shown in names.items()} if base else {}

    return [{**row, **ratios(row)} for row in rows]


def prepared(name: str, options: argparse.Namespace) -> Inputs:
    """The checkpoint and the problems of a task; a checkpoint in the folder is used again."""
    task, folder = TASKS[name], options.folder / ("tiny" if options.quick else "warm") / name
    if options.quick or not (folder / "model.safetensors").exists():
        steps, probability = warm_checkpoint(
            task,
            folder,
            wanted=WARM_PROBABILITY,
            max_steps=20 if options.quick else WARM_STEPS,
            tiny=options.quick,
        )
        print(f"{name}: {steps} warm-up steps, probability {probability:.2f}", flush=True)
    data = folder / "train.jsonl"
    write_problems(task, data, seed=2)
    return Inputs(task, folder, data, options.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="one tiny run of this system, no TRL")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "against_trl")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if options.quick:
        options.tasks, options.arms, options.seeds, options.steps = ["short"], ["default"], [0], 3
    torch.set_num_threads(1)  # of the warm-up
    runs: list[Row] = []
    for name in options.tasks:
        runs += compare(prepared(name, options), options.arms, options.seeds, options.folder)
    show(against(medians(runs)))
    write_result(
        options.json,
        "against_trl",
        quick=options.quick,
        packages=[TRL, TORCH, TRANSFORMERS],
        target=TARGET,
        medians=against(medians(runs)),
        runs=runs,
    )


if __name__ == "__main__":
    main()
