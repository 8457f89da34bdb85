"""The planner against runs of this project: predicted from `dapo-async bench`, then measured.

python benchmarks/planner_own_runs.py [--json OUT] [--quick] [--only NAME …]

Two kinds of runs, all with the real replay actor, workers, transport, publishes and loop:

- Emulated engines and a learner that sleep by a latency model (`support/sleeping.py`). The rates of
  both sides are those of the model. Only the control plane has to be measured.
- The native engine, with a learner that sleeps or with the real one. `bench rollout` and `bench
  learner` give the rates of both sides.

`bench replay` and `bench publish` give the time of the control plane and of a publish. Response
lengths and acceptance are the workload: those of the model, or those that the run had. Nothing else
comes from the run that is predicted. Aim: 10 % for step time, generated tokens/s and staleness.

Other work on the machine slows the measured run and not the predicted one: `load` has the load.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import ray
from asynchrony import CpuSeconds, Row, config_of, play, write_inputs
from quickstart import CONFIG
from support.output import show, write_result
from support.sleeping import (
    ACCEPTANCE,
    GROUP_SIZE,
    GROUPS_PER_STEP,
    MEAN_TOKENS,
    RESERVE_TOKENS,
    WORKERS,
    Shape,
    emulated,
)

from dapo_async import config as knobs
from dapo_async.bench.figures import BenchRow, Spread
from dapo_async.bench.replaced import sleeping_learner
from dapo_async.bench.scenario import scenario_of
from dapo_async.config import Config
from dapo_async.planner import EngineSpeed, LearnerSpeed, Lengths, Scenario, simulate
from dapo_async.planner.settings import step_table
from dapo_async.runtime.launch import ActorClasses

BOUND = 0.10
STEPS, WARM_UP, LAST = 40, 14, 4  # of a run; the last steps admit no groups
FIGURES = ("step_s", "generated_tokens_per_s", "staleness")


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration."""

    what: str
    shape: Shape | None = None  # None: the native engine
    learner_s: float | None = None  # of a step of the learner that sleeps; None: the real one
    max_staleness: int = 2


def shape(staleness: int, tail: float, split: float, response: float, **others: Any) -> Shape:
    return Shape(staleness, tail, split, step_s=1.0, response_steps=response, **others)


CASES: Mapping[str, Case] = {
    "learner-bound": Case("emulated, split 2", shape(2, 0.5, 2.0, 0.25)),
    "engine-bound": Case("emulated, split 0.5", shape(2, 0.5, 0.5, 0.25)),
    "balanced": Case("emulated, split 1, long tail", shape(2, 1.2, 1.0, 0.25)),
    "deadline-bound": Case("emulated, long responses, bound 1", shape(1, 1.2, 1.25, 0.4)),
    "two minibatches": Case("emulated, split 1.25", shape(2, 0.5, 1.25, 0.25, minibatches=2)),
    "KV-bound": Case(
        "emulated, cache for half of the slots", shape(2, 0.5, 1.25, 0.25, kv_tokens=4000.0)
    ),
    "native, engine-bound": Case("native engine, learner of 0.05 s", learner_s=0.05),
    "native, learner-bound": Case("native engine, learner of 2 s", learner_s=2.0),
    "native, real learner": Case("native engine and learner"),
}


QUICK = Case("emulated, short steps", Shape(1, 0.5, 1.0, step_s=0.3, response_steps=0.25))


def bench(folder: Path, subject: str, *arguments: str) -> list[Row]:
    """The rows of `dapo-async bench CONFIG subject`."""
    out = folder / f"{subject}_{len(list(folder.iterdir()))}.json"
    command = [sys.executable, "-m", "dapo_async", "bench", str(CONFIG), subject, *arguments]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench {subject} failed: {done.stdout[-500:]} {done.stderr[-500:]}")
    rows: list[Row] = json.loads(out.read_text())["rows"]
    return rows


def median_of(rows: Sequence[Row], figure: str) -> float:
    return float(rows[0]["figures"][figure]["median"])


@dataclass(frozen=True, slots=True)
class Control:
    """The control plane by `bench`: seconds of a step without work, of a publish and its pause."""

    step_s: float
    publish_s: float
    pause_s: float


def control_of(folder: Path, *knobs_: str, tokens: int, repeats: int, quick: bool) -> Control:
    often = ("--repeats", str(repeats))
    lengths = ("--response-tokens", str(tokens), "--sigma", "0.5")
    replay = bench(folder, "replay", *knobs_, *often, *lengths)
    if quick:  # the gate measures a publish elsewhere
        return Control(median_of(replay, "step_s"), 0.0, 0.0)
    kinds = ("--transports", "broadcast", "--modes", "recompute")
    publish = bench(folder, "publish", *knobs_, *often, *kinds)
    return Control(
        median_of(replay, "step_s"),
        median_of(publish, "publish_s"),
        median_of(publish, "standstill_s"),
    )


def emulated_scenario(case: Case, control: Control, steps: int, warm_up: int) -> Scenario:
    """The rates of the latency model with the measured control plane."""
    cell = case.shape
    assert cell is not None
    engine = EngineSpeed.constant(cell.token_s, cell.slots)
    return Scenario(
        num_engines=WORKERS,
        engine=replace(engine, kv_tokens=cell.kv_tokens, reserve_tokens=RESERVE_TOKENS),
        learner=LearnerSpeed(token_s=0.0, group_s=cell.step_s / GROUPS_PER_STEP),
        lengths=cell.simulated().lengths,
        group_size=GROUP_SIZE,
        groups_per_step=GROUPS_PER_STEP,
        num_minibatches=cell.minibatches,
        max_staleness=cell.staleness,
        num_steps=steps,
        warm_up_steps=warm_up,
        acceptance=(ACCEPTANCE, ACCEPTANCE),
        publish_s=control.publish_s,
        pause_s=0.0,  # an emulated engine does not stop while it loads weights
        fetch_s=control.step_s / cell.minibatches,
    )


def native_scenario(
    case: Case, config: Config, control: Control, folder: Path, rows: Sequence[Row], repeats: int
) -> Scenario:
    """Rates by `bench rollout` and `bench learner`; lengths and acceptance of the run's rows."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    prompt = 8
    often = ("--repeats", str(repeats), "--prompt-tokens", str(prompt))
    sweep = ("--running", "1,32,128", "--contexts", f"{longest // 4},{longest // 2}")
    measured = [
        BenchRow(
            row["what"],
            {name: Spread(tuple(each["values"])) for name, each in row["figures"].items()},
        )
        for row in bench(folder, "rollout", *often, *sweep)
        if "figures" in row
    ]
    engine = scenario_of(measured, slots=config.rollout.fixed_slots)["engine"]
    groups, size = config.replay.groups_per_step, config.replay.group_size
    mean = sum(row["tokens"] for row in rows) / sum(
        row["tokens"] / row["response_tokens"] for row in rows
    )
    if case.learner_s is None:
        learner = bench(folder, "learner", "--repeats", str(repeats))
        rate = max(row["figures"]["tokens_per_s"]["median"] for row in learner)
        speed = LearnerSpeed(token_s=1 / rate)
    else:
        speed = LearnerSpeed(token_s=0.0, group_s=case.learner_s / groups)
    offered = sum(row["offered"] for row in rows)
    acceptance = sum(row["acceptance"] * row["offered"] for row in rows) / offered
    return Scenario(
        num_engines=config.rollout.num_workers,
        engine=EngineSpeed(
            step_s=step_table(engine["step_s"], config.rollout.fixed_slots),
            context_s=engine["context_s"],
            prefill_s=engine.get("prefill_s", 0.0),
        ),
        learner=speed,
        lengths=Lengths(tail=0.8, mean_tokens=mean, max_tokens=config.rollout.max_response_tokens),
        prompt_tokens=prompt,
        group_size=size,
        groups_per_step=groups,
        num_minibatches=config.learner.num_minibatches,
        max_staleness=config.replay.max_staleness,
        num_steps=config.train.num_steps,
        warm_up_steps=config.train.num_steps // 3,
        acceptance=(acceptance, acceptance),
        publish_s=control.publish_s,
        pause_s=min(control.pause_s, control.publish_s),
        fetch_s=control.step_s / config.learner.num_minibatches,
    )


def native_config(case: Case, folder: Path, steps: int) -> Config:
    """The quickstart with a learning rate of 0: its responses keep their lengths."""
    return knobs.load(
        CONFIG,
        [
            f"run_dir={folder}",
            f"replay.max_staleness={case.max_staleness}",
            f"train.num_steps={steps}",
            f"train.checkpoint_every_steps={steps + 1}",
            "learner.lr=0",
            "evaluation.every_steps=0",
            "evaluation.num_prompts=0",
            "tracking.sinks=none",
        ],
    )


def classes_of(case: Case, config: Config) -> ActorClasses:
    if case.shape is not None:
        return emulated(case.shape)
    if case.learner_s is None:
        return ActorClasses()
    groups = config.replay.groups_per_step
    return ActorClasses(learner=sleeping_learner(step_s=case.learner_s, groups_per_step=groups))


def figures_of(rows: Sequence[Row], *, groups_per_step: int) -> dict[str, float]:
    """The three figures over the rows; the first one only gives the time of the start.

    Generated tokens are those of the offered groups: an emulated engine draws no tokens that its
    counter could count. Rejected groups are as long as trained ones.
    """
    seconds, measured = rows[-1]["time_s"] - rows[0]["time_s"], rows[1:]
    tokens = sum(row["tokens"] for row in measured)
    per_group = tokens / (len(measured) * groups_per_step)
    return {
        "step_s": seconds / len(measured),
        "generated_tokens_per_s": per_group * sum(row["offered"] for row in measured) / seconds,
        "staleness": sum(row["staleness"] * row["tokens"] for row in measured) / tokens,
    }


def compare(
    name: str, predicted: Mapping[str, float], measured: Mapping[str, float], **facts: Any
) -> Row:
    row: Row = {"case": name}
    for figure in FIGURES:
        row[f"{figure} predicted"] = round(predicted[figure], 4)
        row[f"{figure} measured"] = round(measured[figure], 4)
        wide = measured[figure] or math.nan
        error = predicted[figure] / wide - 1
        row[f"{figure} error"] = f"{error:+.0%}" if math.isfinite(error) else "–"
        row[f"{figure} within"] = abs(error) <= BOUND
    return {**row, **facts}


def run_case(
    name: str, case: Case, controls: Callable[[bool], Control], steps: int, folder: Path
) -> Row:
    """Predicts and measures. A native run is measured first: its lengths are the workload."""
    warm_up = min(WARM_UP, steps // 2)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as inside:
        root = Path(inside)
        if case.shape is not None:
            extra = case.shape.extra_steps
            config = config_of(case.shape, steps + extra, root / "run", write_inputs(root))
        else:
            config = native_config(case, root / "run", steps + case.max_staleness + LAST)
        (root / "run").mkdir()
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            rows, _ = play(config, classes_of(case, config), CpuSeconds(warm_up - 1))
        finally:
            ray.shutdown()
    rows = rows[warm_up - 1 : steps]
    control = controls(case.shape is not None)
    if case.shape is not None:
        scenario = emulated_scenario(case, control, steps + extra, warm_up)
    else:
        scenario = native_scenario(case, config, control, folder, rows, repeats=3)
    outcome = simulate(scenario)
    measured = figures_of(rows, groups_per_step=config.replay.groups_per_step)
    predicted = {figure: float(getattr(outcome, figure)) for figure in FIGURES}
    facts = {
        "control s": round(control.step_s, 3),
        "publish s": round(control.publish_s, 3),
        "learner trains": round(outcome.learner["train"], 2),
        "slots run": round(outcome.engines["running"], 2),
        "load": round(fmean((load, os.getloadavg()[0])), 1),
    }
    return compare(name, predicted, measured, **facts)


def control_planes(folder: Path, *, repeats: int, quick: bool) -> Callable[[bool], Control]:
    """Measured once per kind of run, when it is needed first."""
    known: dict[bool, Control] = {}

    def control(is_emulated: bool) -> Control:
        if is_emulated not in known:
            changes = (
                f"rollout.num_workers={WORKERS}",
                "model.num_cpus=0.1",
                f"replay.groups_per_step={GROUPS_PER_STEP}",
                f"replay.group_size={GROUP_SIZE}",
                "learner.num_minibatches=1",
            )
            known[is_emulated] = control_of(
                folder,
                *(changes if is_emulated else ()),
                tokens=20 if not is_emulated else min(20, MEAN_TOKENS),
                repeats=repeats,
                quick=quick,
            )
        return known[is_emulated]

    return control


def rows_of(
    cases: Mapping[str, Case], steps: int, *, repeats: int, quick: bool = False
) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as inside:
        folder = Path(inside)
        controls = control_planes(folder, repeats=repeats, quick=quick)
        for name, case in cases.items():
            row = run_case(name, case, controls, steps, folder)
            show([row])
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="one case with few steps")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    options = parser.parse_args()
    if options.quick:
        cases, steps, repeats = {"quick": QUICK}, 5, 1
    else:
        cases, steps, repeats = {name: CASES[name] for name in options.only}, STEPS, 5
    rows = list(rows_of(cases, steps, repeats=repeats, quick=options.quick))
    show(rows)
    within = sum(bool(row[f"{figure} within"]) for row in rows for figure in FIGURES)
    print(f"{within} of {len(rows) * len(FIGURES)} figures are within {BOUND:.0%}")
    write_result(options.json, "planner_own_runs", quick=options.quick, steps=steps, cases=rows)


if __name__ == "__main__":
    main()
