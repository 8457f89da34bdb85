"""The planner against runs of this project: predicted from `dapo-async bench`, then measured.

python benchmarks/planner_own_runs.py [--json OUT] [--quick] [--only NAME …] [--bench FOLDER]

Three kinds of runs, all with the real replay actor, workers, transport, publishes and loop:

- Emulated engines and a learner that sleep by a latency model (`support/sleeping.py`). The rates of
  both sides are those of the model; `bench replay --step-s 1` gives control plane and publish.
- The native engine or an SGLang server, with a learner that sleeps or the real one. `bench
  end-to-end` gives the rates of both sides within the loop, how much they slow each other on the
  cores that they share, and the publish; `bench replay --step-s 1` gives the control plane.

The runs differ from what `bench` measured by the learner's step, the groups of a step, and the
staleness bound. Response lengths and acceptance are the workload: those of the model, or those that
the run had. Nothing else comes from the run that is predicted. Aim: 10 % for step time, generated
tokens/s and staleness.

An SGLang server on two shared cores is not equally fast at each start. So bench and run take turns
there, and the medians of the rounds are compared.

Other work on the machine slows the measured run and not the predicted one: `load` has the load.
`--only` measures these cases again and keeps the other rows of OUT. `--bench` keeps the results of
`dapo-async bench` in a folder, and uses those that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, median
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
from dapo_async.bench.figures import BenchResult, BenchRow
from dapo_async.bench.replaced import sleeping_learner
from dapo_async.bench.scenario import scenario_of
from dapo_async.config import Config
from dapo_async.planner import EngineSpeed, LearnerSpeed, Scenario, simulate
from dapo_async.planner.settings import read_scenario
from dapo_async.runtime.launch import ActorClasses

BOUND = 0.10
STEPS, WARM_UP, LAST = 30, 10, 4  # of a run; the last steps admit no groups
FIGURES = ("step_s", "generated_tokens_per_s", "staleness")
# A random model, whose responses keep their lengths: most of them have the longest one. A learning
# rate of 0 keeps the model.
NATIVE = (
    "model.path=configs/base/random",
    "rollout.max_response_tokens=96",
    "rollout.num_slots=32",
    "reward.overlong_cache_tokens=null",
    "replay.dynamic_sampling=false",
    "replay.groups_per_step=16",
    "replay.group_size=8",
    "learner.num_minibatches=1",
    "learner.lr=0",
)
SGLANG = (*NATIVE, "rollout.engine=sglang", "replay.groups_per_step=8")
KV_TOKENS = 1200  # of an engine with 32 slots: room for a third of them
SMALL_CACHE = (*SGLANG, f"rollout.server_flags=--max-total-tokens {KV_TOKENS}")
EMULATED = (
    f"rollout.num_workers={WORKERS}",
    "model.num_cpus=0.1",
    f"replay.groups_per_step={GROUPS_PER_STEP}",
    f"replay.group_size={GROUP_SIZE}",
    "learner.num_minibatches=1",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration."""

    what: str
    shape: Shape | None = None  # None: a real engine
    benched: tuple[str, ...] = EMULATED  # knobs of the config that `bench` measures
    changes: tuple[str, ...] = ()  # further knobs of the run
    learner_s: float | None = None  # of a step of the learner that sleeps; None: the real one
    rounds: int = 1  # of bench and run, in turn

    @property
    def replaced(self) -> str:
        """Rows of `bench end-to-end`."""
        return "learner" if self.learner_s is not None else "learner,rollout,nothing"


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
    "native, engine-bound": Case(
        "learner of 0.1 s, bound 1",
        benched=NATIVE,
        changes=("replay.max_staleness=1",),
        learner_s=0.1,
    ),
    "native, learner-bound": Case("learner of 1.5 s", benched=NATIVE, learner_s=1.5),
    "native, real learner": Case(
        "twice the groups of a step",
        benched=NATIVE,
        changes=("replay.groups_per_step=32",),
    ),
    "SGLang, engine-bound": Case(
        "learner of 0.5 s, twice the groups of a step",
        benched=SGLANG,
        changes=("replay.groups_per_step=16",),
        learner_s=0.5,
        rounds=3,
    ),
    "SGLang, learner-bound": Case("learner of 3 s", benched=SGLANG, learner_s=3.0, rounds=3),
    "SGLang, KV-bound": Case(
        "cache for a third of the slots, learner of 0.5 s, bound 1",
        benched=SMALL_CACHE,
        changes=("replay.max_staleness=1",),
        learner_s=0.5,
        rounds=3,
    ),
}
QUICK = Case("emulated, short steps", Shape(1, 0.5, 1.0, step_s=0.3, response_steps=0.25))


@dataclass(frozen=True, slots=True)
class Bench:
    """Results of `dapo-async bench`; each is measured once, when it is needed first."""

    folder: Path
    repeats: int

    def rows(
        self, subject: str, overrides: Sequence[str], *options: str, repeats: int = 0
    ) -> list[BenchRow]:
        words = (subject, *overrides, *options, "--repeats", str(repeats or self.repeats))
        return _bench(self.folder, words)

    def learner_step(self, overrides: Sequence[str], *, tokens: int) -> BenchRow:
        """A loop with engines that answer at once and a learner of 1 s: what is left is the control
        plane."""
        lengths = ("--response-tokens", str(tokens), "--sigma", "0.5", "--step-s", "1")
        (row,) = self.rows("replay", overrides, *lengths)
        return row

    def sides(self, case: Case) -> list[BenchRow]:
        lengths = ("--prompt-tokens", "8", "--response-tokens", "80", "--sigma", "0.3")
        rows, repeats = ("--replaced", case.replaced), max(1, 2 * self.repeats // case.rounds)
        return self.rows("end-to-end", case.benched, *lengths, *rows, repeats=repeats)


@cache
def _bench(folder: Path, words: tuple[str, ...]) -> list[BenchRow]:
    name = "".join(each if each.isalnum() else "_" for each in " ".join(words))[-180:]
    out = folder / f"{name}.json"
    if not (out.is_file() and BenchResult.read(out).complete):
        command = [sys.executable, "-m", "dapo_async", "bench", str(CONFIG), *words]
        done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench {words[0]} failed: {done.stdout[-500:]} {done.stderr[-500:]}")
    return BenchResult.read(out).rows


def emulated_scenario(case: Case, bench: Bench, steps: int, warm_up: int) -> Scenario:
    """The rates of the latency model with the measured control plane."""
    cell = case.shape
    assert cell is not None
    row = bench.learner_step(EMULATED, tokens=min(20, MEAN_TOKENS))
    control = scenario_of([row], slots=cell.slots)["control"]
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
        publish_s=row.figures["publish_s"].median,
        pause_s=0.0,  # an emulated engine does not stop while it loads weights
        fetch_s=control["fetch_s"] / cell.minibatches,
    )


def real_scenario(case: Case, config: Config, bench: Bench, samples: Sequence[float]) -> Scenario:
    """The sections of `bench`, and the workload: `samples` are response lengths."""
    sides = bench.sides(case)
    sections = scenario_of(sides, slots=config.rollout.fixed_slots)
    sections |= scenario_of([bench.learner_step(case.benched, tokens=80)], slots=1)
    if case.learner_s is None:
        (alone,) = (row for row in sides if row.what["replaced"] == "rollout")
        wait_s = alone.figures["idle_learner"].median * alone.figures["step_s"].median
        sections["control"] = {"fetch_s": wait_s}  # its rate has the rest of the control plane
    if case.benched == SMALL_CACHE:
        running = sides[0].figures["running"].median
        # The scheduler keeps room for what it expects of each sequence.
        reserve = max(1.0, KV_TOKENS / running - fmean(samples) / 2)
        sections["engine"] |= {"kv_tokens": KV_TOKENS, "reserve_tokens": reserve}
    scenario, _ = read_scenario(
        {
            "learner": {"token_s": 1.0},
            **sections,
            "engines": config.rollout.num_workers,
            "steps": config.train.num_steps,
            "warm_up_steps": config.train.num_steps // 3,
            "lengths": {
                "samples": samples,
                "max": config.rollout.max_response_tokens,
                "shared": 0.0,
            },
            "replay": {
                "groups_per_step": config.replay.groups_per_step,
                "group_size": config.replay.group_size,
                "max_staleness": config.replay.max_staleness,
            },
        }
    )
    if case.learner_s is not None:
        group_s = case.learner_s / config.replay.groups_per_step
        return replace(scenario, learner=LearnerSpeed(token_s=0.0, group_s=group_s))
    return scenario


def real_config(case: Case, folder: Path, steps: int) -> Config:
    return knobs.load(
        CONFIG,
        [
            *case.benched,
            *case.changes,
            f"run_dir={folder}",
            f"train.num_steps={steps + LAST + 2}",
            f"train.checkpoint_every_steps={steps + LAST + 3}",
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


def samples_of(run_dir: Path) -> list[float]:
    """Response lengths of a run, of those that it wrote down."""
    files = sorted((run_dir / "rollouts").glob("step_*.jsonl"))
    lines = [line for file in files for line in file.read_bytes().splitlines()]
    return [float(json.loads(line)["tokens"]) for line in lines]


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


@dataclass(frozen=True, slots=True)
class Round:
    """One run, and what was predicted of it."""

    predicted: dict[str, float]  # by FIGURES
    measured: dict[str, float]
    facts: dict[str, Any]  # about both


def run_case(name: str, case: Case, bench: Bench, steps: int) -> Row:
    """Predicts and measures as often as the case says; compares the medians."""
    rounds = []
    for number in range(case.rounds):
        folder = bench.folder / f"round_{number}"
        folder.mkdir(exist_ok=True)
        rounds.append(run_once(case, replace(bench, folder=folder), steps))
    return compare(
        name,
        {figure: median(each.predicted[figure] for each in rounds) for figure in FIGURES},
        {figure: median(each.measured[figure] for each in rounds) for figure in FIGURES},
        **{fact: [each.facts[fact] for each in rounds] for fact in rounds[0].facts},
    )


def run_once(case: Case, bench: Bench, steps: int) -> Round:
    """The run is first: lengths of its responses are the workload."""
    warm_up = min(WARM_UP, steps // 2)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as inside:
        root = Path(inside)
        (root / "run").mkdir()
        if case.shape is not None:
            num_steps = steps + case.shape.extra_steps
            config = config_of(case.shape, num_steps, root / "run", write_inputs(root))
        else:
            config = real_config(case, root / "run", steps)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            rows, _ = play(config, classes_of(case, config), CpuSeconds(warm_up - 1))
        finally:
            ray.shutdown()
        samples = samples_of(root / "run")
    if case.shape is not None:
        scenario = emulated_scenario(case, bench, num_steps, warm_up)
    else:
        scenario = real_scenario(case, config, bench, samples)
    outcome = simulate(scenario)
    groups = config.replay.groups_per_step
    measured = figures_of(rows[warm_up - 1 : steps], groups_per_step=groups)
    predicted = {figure: float(getattr(outcome, figure)) for figure in FIGURES}
    facts = {
        "control s": round(scenario.control_s, 3),
        "publish s": round(scenario.publish_s, 3),
        "publish s measured": round(fmean(row["publish_s"] for row in rows[warm_up:steps]), 3),
        "slowdowns": f"{scenario.engine_slowdown:.2f}, {scenario.learner_slowdown:.2f}",
        "learner trains": round(outcome.learner["train"], 2),
        "learner trains measured": share_of(rows[warm_up:steps], "idle.learner"),
        "slots run": round(outcome.engines["running"], 2),
        "slots run measured": share_of(rows[warm_up:steps], "slots.idle"),
        "load": round(fmean((load, os.getloadavg()[0])), 1),
    }
    return Round(predicted, measured, facts)


def share_of(rows: Sequence[Row], idle: str) -> float | None:
    """The mean of what is not idle; None if no row knows it."""
    shares = [row.get(idle, math.nan) for row in rows]
    known = [each for each in shares if each is not None and math.isfinite(each)]
    return round(1 - fmean(known), 2) if known else None


def known_rows(path: Path | None) -> dict[str, Row]:
    """By case: those of an earlier result."""
    if path is None or not path.is_file():
        return {}
    return {row["case"]: row for row in json.loads(path.read_text()).get("cases", [])}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="one case with few steps")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME")
    parser.add_argument("--bench", type=Path, metavar="FOLDER", help="results of dapo-async bench")
    options = parser.parse_args()
    known = known_rows(options.json) if options.only else {}
    cases, steps, repeats = {name: CASES[name] for name in options.only or CASES}, STEPS, 6
    if options.quick:
        cases, steps, repeats = {"quick": QUICK}, 5, 1
    with tempfile.TemporaryDirectory() as inside:
        folder = options.bench or Path(inside)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, repeats)
        for name, case in cases.items():
            known[name] = run_case(name, case, bench, steps)
            show([known[name]])
            rows = [known[each] for each in [*CASES, "quick"] if each in known]
            write_result(
                options.json, "planner_own_runs", quick=options.quick, steps=steps, cases=rows
            )
    show(rows)
    within = sum(bool(row[f"{figure} within"]) for row in rows for figure in FIGURES)
    print(f"{within} of {len(rows) * len(FIGURES)} figures are within {BOUND:.0%}")


if __name__ == "__main__":
    main()
