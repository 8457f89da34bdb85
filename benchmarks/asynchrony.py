"""Throughput and cost of the real loop around engines and a learner that sleep.

python benchmarks/asynchrony.py [--json OUT] [--quick] [--virtual] [--staleness S …] [--splits R …]
    [--minibatches N …]

Engines and learner sleep by a latency model (`support/sleeping.py`). Everything else is real:
replay actor, rollout workers, scoring, transport of groups, publishes with their handshake, main
loop, metrics.

A cell has a staleness bound (0 is synchronous, 1 is one step off), a tail (sigma of the lognormal
response lengths; 0: all equal) and a split (accepted production over consumption: 0.5 is
engine-bound by 2, 2 is learner-bound by 2). The ideal rate is
min(production × acceptance, consumption). Production is that of engines with all slots occupied.

The run loses some of the ideal rate for two reasons, which have a column each:

- `tails and bound`: the rate of the same run in virtual time, with the real buffer, pacer and slot
  demand and a control plane that takes no time (`support/simulated_run.py`), over the ideal rate.
  Only another shape of the run can change it. Deterministic.
- `control plane`: the measured rate over the rate in virtual time.

`--virtual` prints only the runs in virtual time, in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import ray
from quickstart import CONFIG
from support.output import show, write_result
from support.simulated_run import simulate
from support.sleeping import (
    ACCEPTANCE,
    CAP,
    GROUP_SIZE,
    GROUPS_PER_STEP,
    MEAN_TOKENS,
    RIGHT,
    WORKERS,
    Shape,
    emulated,
)

from dapo_async import config as knobs
from dapo_async.config import Config
from dapo_async.runtime.launch import ActorClasses
from dapo_async.runtime.loop import train_loop
from dapo_async.runtime.resume import START
from dapo_async.runtime.services import Services, build_services
from dapo_async.tracking.disk_faults import DiskFaults
from dapo_async.tracking.run_dir import RunDir
from dapo_async.utils.state_clock import StateClock

STALENESS, TAILS, SPLITS = (0, 1, 2, 4), (0.0, 0.5, 1.2), (0.5, 1.0, 1.25, 2.0)
ADMISSIONS = ("paced",)
STEPS, WARM_UP = 60, 36  # the pacer needs 30 steps to settle
# What lies between two steps of the learner, where it does not wait for groups.
STATES = (
    ("learner", "fetch"),
    ("learner", "snapshot"),
    ("driver", "wait for batch"),
    ("driver", "wait for publish"),
)
Row = dict[str, Any]


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """The quickstart's model with room for longer responses, and problems of one answer."""
    base, data = folder / "base", folder / "train.jsonl"
    shutil.copytree(CONFIG.parent / "base" / "quickstart", base)
    model = json.loads((base / "config.json").read_text())
    model["max_position_embeddings"] = 2 * int(CAP * MEAN_TOKENS)
    (base / "config.json").write_text(json.dumps(model))
    rows = ({"prompt": str(10**6 + number), "answer": str(RIGHT)} for number in range(2000))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base, data


def config_of(shape: Shape, steps: int, folder: Path, inputs: tuple[Path, Path]) -> Config:
    base, data = inputs
    return knobs.load(
        CONFIG,
        [
            f"model.path={base}",
            f"data.train={data}",
            f"data.heldout={data}",
            f"run_dir={folder}",
            f"rollout.num_workers={WORKERS}",
            f"rollout.num_slots={shape.slots}",
            f"rollout.max_response_tokens={int(CAP * MEAN_TOKENS)}",
            "model.num_cpus=0.1",
            "reward.overlong_cache_tokens=null",
            f"replay.groups_per_step={GROUPS_PER_STEP}",
            f"replay.group_size={GROUP_SIZE}",
            f"replay.max_staleness={shape.staleness}",
            f"learner.num_minibatches={shape.minibatches}",
            f"replay.admission={shape.admission}",
            f"train.num_steps={steps}",
            f"train.checkpoint_every_steps={steps + 1}",
            "evaluation.every_steps=0",
            "evaluation.num_prompts=0",
            "tracking.sinks=none",
        ],
    )


class CpuSeconds:
    """CPU seconds of the driver and of the actors, from the end of one step on."""

    def __init__(self, first_step: int) -> None:
        self._first_step, self.pids = first_step, dict[str, int]()
        self._before: dict[str, float] = {}

    def on_step(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self._first_step:
            self._before = self._now()

    def spent(self) -> dict[str, float]:
        return {name: seconds - self._before[name] for name, seconds in self._now().items()}

    def _now(self) -> dict[str, float]:
        seconds = {"driver": 0.0, "replay": 0.0, "learner": 0.0, "rollout": 0.0}
        for name, pid in {"driver": os.getpid(), **self.pids}.items():
            times = psutil.Process(pid).cpu_times()
            seconds[name.split("-")[0]] += times.user + times.system
        return seconds


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds of the measured steps by process, and seconds of the whole run by state."""

    cpu: Mapping[str, float]
    states: Mapping[str, Mapping[str, float]]  # of learner and driver


async def train(services: Services, config: Config, cpu: CpuSeconds) -> Spent:
    """As `runtime.run` does, without evaluations."""
    system, tracker = services.system, services.tracker

    async def served(version: int) -> None:
        await system.replay.serve(version)

    cpu.pids = {info.name: info.pid for info in await system.start()}
    await tracker.start()
    await system.publisher.publish(await system.learner.snapshot(), on_served=served)

    async def steps() -> dict[str, float]:
        await train_loop(
            system, tracker, services.checkpointer, services.evaluations, config=config
        )
        spent = cpu.spent()
        await system.settle()
        return spent

    spent = await system.watched(steps())
    await system.replay.close()
    await tracker.collect()
    timeline = tracker.timeline
    return Spent(spent, {name: timeline.totals(name) for name in ("learner", "driver")})


def play(config: Config, classes: ActorClasses, cpu: CpuSeconds) -> tuple[list[Row], Spent]:
    """A run of `config` with these actors: the rows of its metrics, and what it spent."""
    run_dir = RunDir(Path(config.run_dir))
    run_dir.rollouts.mkdir()
    sinks: Any = SimpleNamespace(
        step=cpu.on_step,
        say=lambda line: None,
        event=lambda *names, **values: None,
        guards=lambda counts: None,
        disk=DiskFaults(lambda line: None),
        on_evaluation=[],
        newest_bottleneck=None,
    )

    async def run() -> Spent:
        services = build_services(
            config,
            run_dir=run_dir,
            sinks=sinks,
            clock=StateClock("driver"),
            incarnation="bench",
            resume=START,
            driver_state=lambda tracker: {},
            classes=classes,
        )
        try:
            return await train(services, config, cpu)
        finally:
            services.system.kill()

    spent = asyncio.run(run())
    return [json.loads(line) for line in run_dir.metrics.read_text().splitlines()], spent


def measure(shape: Shape, steps: int, warm_up: int, inputs: tuple[Path, Path]) -> Row:
    """One run; figures of the steps from `warm_up` on."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(shape, steps + shape.extra_steps, Path(folder), inputs)
        rows, spent = play(config, emulated(shape), CpuSeconds(warm_up - 1))
    return figures(shape, rows[warm_up - 1 : steps], spent, steps=steps, warm_up=warm_up)


def virtual(shape: Shape, steps: int, warm_up: int) -> Row:
    """The same run in virtual time."""
    outcome = simulate(shape.simulated(steps=steps, warm_up=warm_up))
    ideal = min(shape.production * ACCEPTANCE, shape.consumption)
    return {
        **cell(shape),
        "ideal groups/s": ideal,
        "groups/s": outcome.rate * ideal,
        "tails and bound": outcome.rate,
        "staleness": outcome.staleness,
        "learner waits": outcome.learner_waits,
        "for deadlines": outcome.waits_for_deadlines,
        "occupied slots": outcome.occupancy,
    }


def cell(shape: Shape) -> Row:
    return {
        "staleness bound": shape.staleness,
        "tail": shape.tail,
        "split": shape.split,
        "minibatches": shape.minibatches,
        "response, steps": shape.response_steps,
        "admission": shape.admission,
    }


def figures(shape: Shape, rows: Sequence[Row], spent: Spent, *, steps: int, warm_up: int) -> Row:
    """`rows`: of the last step before the measured ones, then theirs."""
    cpu = spent.cpu
    seconds, measured = rows[-1]["time_s"] - rows[0]["time_s"], rows[1:]
    groups = GROUPS_PER_STEP * len(measured)
    offered = sum(row["offered"] for row in measured)
    acceptance = sum(row["acceptance"] * row["offered"] for row in measured) / offered
    ideal = min(shape.production * acceptance, shape.consumption)
    simulated = virtual(shape, steps, warm_up)
    rate, rate_in_virtual_time = groups / seconds, simulated["groups/s"]
    mean = {
        name: statistics.mean(row[name] for row in measured)
        for name in ("staleness", "idle.learner", "slots.idle", "step_s")
    }
    return {
        **cell(shape),
        "ideal groups/s": ideal,
        "groups/s": rate,
        "efficiency": rate / ideal,
        "tails and bound": rate_in_virtual_time / ideal,
        "control plane": rate / rate_in_virtual_time,
        "staleness": mean["staleness"],
        "staleness in virtual time": simulated["staleness"],
        "idle learner": mean["idle.learner"],
        "idle rollout": mean["slots.idle"],
        **{f"{name} CPU, ms/group": 1e3 * cpu[name] / groups for name in ("replay", "driver")},
        "replay + driver CPU, ms/step": 1e3 * (cpu["replay"] + cpu["driver"]) / len(measured),
        "rollout CPU, ms/group": 1e3 * cpu["rollout"] / groups,
        **{
            f"{actor} {state}, ms/step": 1e3
            * spent.states[actor].get(state, 0.0)
            / (steps + shape.extra_steps)
            for actor, state in STATES
        },
        "acceptance": acceptance,
        "evicted": rows[-1]["groups.evicted"],
    }


def measured_in_turn(cells: Sequence[Shape], steps: int, warm_up: int) -> list[Row]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder))
        for each in cells:
            rows.append(measure(each, steps, warm_up, inputs))
            show(rows[-1:])
    ray.shutdown()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="one cell with short steps")
    parser.add_argument("--staleness", type=int, nargs="+", default=STALENESS)
    parser.add_argument("--tails", type=float, nargs="+", default=TAILS)
    parser.add_argument("--splits", type=float, nargs="+", default=SPLITS)
    parser.add_argument("--minibatches", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=STEPS, help="with the warm-up")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, metavar="STEPS")
    parser.add_argument("--step-s", type=float, default=1.0, help="seconds of a learner step")
    parser.add_argument(
        "--response-steps",
        type=float,
        nargs="+",
        default=[0.25],
        help="a mean response, in learner steps; the longest takes four times as long",
    )
    parser.add_argument("--admission", nargs="+", default=ADMISSIONS, choices=("paced", "eager"))
    parser.add_argument("--virtual", action="store_true", help="only in virtual time")
    options = parser.parse_args()
    if options.quick:
        options.staleness, options.tails, options.splits = [1], [0.5], [1.0]
        options.steps, options.warm_up, options.step_s = 5, 2, 0.3
    cells = [
        Shape(staleness, tail, split, options.step_s, response_steps, minibatches, admission)
        for response_steps in options.response_steps
        for split in options.splits
        for tail in options.tails
        for staleness in options.staleness
        for minibatches in options.minibatches
        for admission in options.admission
    ]
    began_load = os.getloadavg()
    if options.virtual:
        rows = [virtual(each, options.steps, options.warm_up) for each in cells]
    else:
        rows = measured_in_turn(cells, options.steps, options.warm_up)
    show(rows)
    write_result(
        options.json,
        "asynchrony",
        load=[began_load, os.getloadavg()],
        quick=options.quick,
        steps=options.steps,
        warm_up=options.warm_up,
        step_s=options.step_s,
        virtual=options.virtual,
        cells=rows,
    )


if __name__ == "__main__":
    main()
