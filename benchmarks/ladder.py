"""DAPO's ladder in small: the six configurations of configs/ladder on the quickstart's task, on policy, with the same seeds.

Each rung takes from its config the knobs that the ladder is about; model, data and sizes are small (support/in_process.py), four updates per step
(published: sixteen). Responses may have 20 tokens where a solution that adds up step by step takes 11 to 25: some are truncated. Soft punishment
begins 4 tokens before the limit, a fifth of it as published.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine import commit, hardware
from matplotlib import pyplot
from support.in_process import CONFIG, InProcess

from dapo_async import config as knobs
from dapo_async.config import Config

LADDER = sorted((CONFIG.parent / "ladder").glob("*.yaml"))
SEEDS, STEPS = (0, 1, 2), 60
GROUPS, GROUP_SIZE, LR, NUM_MINIBATCHES = 16, 16, 2e-4, 4
LIMIT_TOKENS, CACHE_TOKENS = 20, 4
CURVE = ("entropy", "response_tokens", "truncated", "accuracy", "with_gradient", "generated", "clip_high_fraction", "clip_low_fraction", "grad_norm")
LAST = 4  # evaluations that the table's accuracy is the mean of
TAIL = 15  # steps that its other columns are means over; entropy also at the middle of the run


def small(path: Path) -> Config:
    """The quickstart's task with a rung's knobs."""
    rung, config = knobs.load(path), knobs.load(CONFIG)
    algorithm = replace(
        config.algorithm,
        clip_low=rung.algorithm.clip_low,
        clip_high=rung.algorithm.clip_high,
        overlong_filtering=rung.algorithm.overlong_filtering,
        loss_mean=rung.algorithm.loss_mean,
    )
    return replace(
        config,
        algorithm=algorithm,
        reward=replace(config.reward, overlong_cache_tokens=None if rung.reward.overlong_cache_tokens is None else CACHE_TOKENS),
        rollout=replace(config.rollout, max_response_tokens=LIMIT_TOKENS),
        replay=replace(config.replay, groups_per_step=GROUPS, group_size=GROUP_SIZE, dynamic_sampling=rung.replay.dynamic_sampling),
        learner=replace(config.learner, lr=LR, num_minibatches=NUM_MINIBATCHES),
    )


def measure(rung: str, seed: int, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    curves = InProcess(small(CONFIG.parent / "ladder" / f"{rung}.yaml"), staleness=0, seed=seed, steps=steps).run()
    return {"rung": rung, "seed": seed, "steps": steps, "seconds": round(time.perf_counter() - start_s, 1), **curves.of(CURVE)}


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per rung: means over the seeds, and the lowest and highest accuracy."""
    rows = []
    for rung in dict.fromkeys(run["rung"] for run in runs):
        mine = [run for run in runs if run["rung"] == rung]
        finals = [statistics.mean(accuracy for _, accuracy in run["held_out"][-LAST:]) for run in mine]

        def mean(name: str, part: slice, mine: list[dict[str, Any]] = mine) -> float:
            return statistics.mean(value for run in mine for value in run[name][part])

        middle = slice(mine[0]["steps"] // 3, 2 * mine[0]["steps"] // 3)
        rows.append(
            {
                "rung": rung[2:].replace("_", " "),
                "accuracy": f"{statistics.mean(finals):.3f} ({min(finals):.3f} to {max(finals):.3f})",
                "entropy, middle third": f"{mean('entropy', middle):.3f}",
                "entropy, end": f"{mean('entropy', slice(-TAIL, None)):.4f}",
                "length": f"{mean('response_tokens', slice(-TAIL, None)):.1f}",
                "truncated": f"{mean('truncated', slice(-TAIL, None)):.1%}",
                "trained groups with a gradient": f"{mean('with_gradient', slice(0, None)):.2f}",
                "generated per trained group": f"{mean('generated', slice(0, None)) / GROUPS:.2f}",
            }
        )
    return rows


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    figure, axes = pyplot.subplots(1, 4, figsize=(20, 5))
    names = list(dict.fromkeys(run["rung"] for run in runs))
    for run in runs:
        style = {"color": f"C{names.index(run['rung'])}", "label": run["rung"] if run["seed"] == SEEDS[0] else None, "alpha": 0.8}
        axes[0].plot(*zip(*run["held_out"], strict=True), **style)
        for axis, name in zip(axes[1:], ("entropy", "response_tokens", "with_gradient"), strict=True):
            axis.plot(run[name], **style)
    for axis, name in zip(axes, ("held-out accuracy", "entropy, nats", "response tokens", "trained groups with a gradient"), strict=True):
        axis.set_title(name)
        axis.set_xlabel("learner step")
    axes[1].set_yscale("log")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every curve there, and a picture beside it")
    parser.add_argument("--quick", action="store_true", help="two steps of each rung, one seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    jobs = [(path.stem, seed, 2 if options.quick else STEPS) for seed in (SEEDS[:1] if options.quick else SEEDS) for path in LADDER]
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = []
        for future in as_completed([pool.submit(measure, *job) for job in jobs]):
            runs.append(future.result())
            print(f"{len(runs)} of {len(jobs)}: {runs[-1]['rung']}, seed {runs[-1]['seed']}, {runs[-1]['seconds']} s", file=sys.stderr)
    runs.sort(key=lambda run: (run["rung"], run["seed"]))
    rows = table(runs)
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(row.values())} |")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"benchmark": "ladder", "commit": commit(), "date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "table": rows, "runs": runs}
        options.json.write_text(json.dumps(report) + "\n")
        draw(runs, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
