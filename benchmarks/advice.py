"""The advice of a run, followed: does it give the gain that it promises?

python benchmarks/advice.py [--json OUT] [--quick]

Eight emulated GPUs. A learner of L GPUs sleeps for its work over L; an engine of one GPU sleeps per
token (`support/sleeping.py`). Everything else is a real run: replay actor, workers, transport,
publishes, loop and metrics. The verdict reads the rows of the run, as `train` does after ten steps,
and names a division of the GPUs with its gain. The run is made again with this division.

Aim: at least half of the promised gain. A balanced run gets no advice to move GPUs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import ray
from asynchrony import CpuSeconds, Row, config_of, play, write_inputs
from support.output import show, write_result
from support.sleeping import Shape, emulated

from dapo_async.config import Config
from dapo_async.tracking.bottleneck import Idle, Layout, advised_split, bottleneck

GPUS = 8
CASES = {"learner-bound": 2, "engine-bound": 6, "balanced": 3}  # GPUs of the learner
WORK_S, TOKEN_S, SLOTS = 6.0, 0.006, 32  # GPU seconds of a learner step; of an engine
STEPS, WARM_UP, LAST = 26, 10, 4  # the last steps admit no groups


@dataclass(frozen=True, slots=True)
class Split(Shape):
    """A division of the GPUs."""

    engines: int = 1

    @property
    def slots(self) -> int:
        return SLOTS


def split_of(learner_gpus: int, engines: int, scale: float) -> Split:
    step_s = scale * WORK_S / learner_gpus
    response_steps = scale * TOKEN_S * 128 / step_s
    return Split(2, 0.5, 1.0, step_s, response_steps, engines=engines)


def rows_of(split: Split, steps: int, inputs: tuple[Path, Path]) -> tuple[list[Row], Config]:
    """The rows of one run, and its config."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(split, steps, Path(folder), inputs)
        config = replace(config, rollout=replace(config.rollout, num_workers=split.engines))
        rows, _ = play(config, emulated(split), CpuSeconds(0))
    return rows, config


def on_gpus(config: Config, learner_gpus: int) -> Config:
    """The config as it would be on GPUs, for the verdict."""
    return replace(
        config,
        model=replace(config.model, device="cuda"),
        learner=replace(config.learner, data_parallel=learner_gpus),
    )


def step_s(rows: Sequence[Row], warm_up: int) -> float:
    return fmean(row["step_s"] for row in rows[warm_up : len(rows) - LAST])


def measure(
    name: str,
    learner_gpus: int,
    *,
    steps: int,
    warm_up: int,
    scale: float,
    inputs: tuple[Path, Path],
) -> Row:
    """A run, what it advises, and the run that follows the advice."""
    engines = GPUS - learner_gpus
    rows, config = rows_of(split_of(learner_gpus, engines, scale), steps, inputs)
    seen = rows[warm_up : len(rows) - LAST]
    wanted = on_gpus(config, learner_gpus)
    layout = Layout.of(wanted)
    verdict, idle = bottleneck(seen, layout), Idle.over(seen)
    found = advised_split(idle, layout, seen) if idle is not None else None
    row: Row = {
        "run": name,
        "GPUs, learner + engines": f"{learner_gpus} + {engines}",
        "limited by": verdict.kind if verdict else None,
        "step s": step_s(rows, warm_up),
        "advice": None,
        "promised": 1.0,
        "measured": 1.0,
        "half of the gain": True,
        "load": os.getloadavg()[0],
    }
    print(verdict.line if verdict else "no verdict", flush=True)
    if found is None:
        return row
    other_gpus, other_engines, gain = found
    after, _ = rows_of(split_of(other_gpus, other_engines, scale), steps, inputs)
    measured = row["step s"] / step_s(after, warm_up)
    return row | {
        "advice": f"{other_gpus} + {other_engines}",
        "promised": gain,
        "measured": measured,
        "half of the gain": measured - 1.0 >= 0.5 * (gain - 1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="one short run and its advice")
    options = parser.parse_args()
    cases, steps, warm_up, scale = CASES, STEPS, WARM_UP, 1.0
    if options.quick:
        cases, steps, warm_up, scale = {"learner-bound": 2}, 9, 2, 0.1
    ray.init(num_cpus=GPUS, include_dashboard=False, log_to_driver=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder))
        for name, learner_gpus in cases.items():
            row = measure(
                name, learner_gpus, steps=steps, warm_up=warm_up, scale=scale, inputs=inputs
            )
            rows.append(row)
            show(rows[-1:])
    ray.shutdown()
    show(rows)
    write_result(options.json, "advice", rows=rows)


if __name__ == "__main__":
    main()
