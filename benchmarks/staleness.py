"""What staleness costs, and what each correction saves of it: the quickstart's task with every trained group exactly S versions old.

The system without its runtime (support/in_process.py): after the first S steps each trained token is exactly S versions old.

- `truncate`: decoupled, behaviour weights cut at 2 (the default)        - `mask`: decoupled, tokens with a weight outside [0.5, 2] dropped
- `off`: coupled PPO, the clip is around the behaviour policy            - `m2po`: coupled, with M2PO's second-moment mask at 0.04
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

FORMS: dict[str, dict[str, Any]] = {
    "truncate": {},
    "off": {"proximal": "behaviour", "correction": "none"},
    "mask": {"correction": "mask", "correction_floor": 0.5},
    "m2po": {"proximal": "behaviour", "correction": "none", "second_moment": 0.04},
}
STALENESS, SEEDS = (0, 2, 8, 16), (0, 1, 2)
GROUPS, GROUP_SIZE, LR = 16, 16, 3e-4
LAST = 4  # evaluations that the table's final accuracy is the mean of
CURVE = ("entropy", "kl", "behaviour_ess", "response_tokens", "grad_norm", "staleness", "group_staleness_max")


def num_steps(staleness: int) -> int:
    return max(60, 10 * staleness + staleness)


def measure(form: str, staleness: int, seed: int, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    config = knobs.load(CONFIG)
    config = replace(
        config,
        algorithm=replace(config.algorithm, **FORMS[form]),
        learner=replace(config.learner, lr=LR),
        replay=replace(config.replay, groups_per_step=GROUPS, group_size=GROUP_SIZE, dynamic_sampling=False),
    )
    curves = InProcess(config, staleness=staleness, seed=seed, steps=steps).run()
    for step, row in enumerate(curves.rows):
        assert row["oldest"] == row["newest"] == min(step, staleness), "a group is not as old as it was to be"
        # Of the policy that trains against the one that sampled: the coupled forms have no other proximal policy than that.
        row["kl"] = row["current_kl_k3" if config.algorithm.proximal == "behaviour" else "behaviour_kl_k3"]
    head = {"form": form, "S": staleness, "seed": seed, "steps": steps, "seconds": round(time.perf_counter() - start_s, 1)}
    return {**head, **curves.of(CURVE)}


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per form and staleness: mean over the seeds, and the lowest and highest."""
    rows = []
    for form, staleness in dict.fromkeys((run["form"], run["S"]) for run in runs):
        mine = [run for run in runs if (run["form"], run["S"]) == (form, staleness)]
        finals = [statistics.mean(accuracy for _, accuracy in run["held_out"][-LAST:]) for run in mine]
        tail = max(1, mine[0]["steps"] // 4)

        def last(name: str, mine: list[dict[str, Any]] = mine, tail: int = tail) -> float:
            return statistics.mean(value for run in mine for value in run[name][-tail:])

        rows.append(
            {
                "form": form,
                "S": staleness,
                "steps": mine[0]["steps"],
                "accuracy": f"{statistics.mean(finals):.3f} ({min(finals):.3f} to {max(finals):.3f})",
                "best": f"{statistics.mean(max(accuracy for _, accuracy in run['held_out']) for run in mine):.3f}",
                "KL, last quarter": f"{last('kl'):.2g}",
                "effective samples": f"{last('behaviour_ess'):.2f}",
                "entropy": f"{last('entropy'):.3f}",
            }
        )
    return rows


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    staleness = sorted({run["S"] for run in runs})
    figure, axes = pyplot.subplots(3, len(staleness), figsize=(4 * len(staleness), 9), squeeze=False, sharey="row")
    names = list(dict.fromkeys(run["form"] for run in runs))
    for run in runs:
        column, color = staleness.index(run["S"]), f"C{names.index(run['form'])}"
        label = run["form"] if run["seed"] == SEEDS[0] else None
        axes[0][column].plot(*zip(*run["held_out"], strict=True), color=color, label=label)
        axes[1][column].plot(run["kl"], color=color)
        axes[2][column].plot(run["entropy"], color=color)
    for column, value in enumerate(staleness):
        axes[0][column].set_title(f"every group {value} versions old")
        axes[1][column].set_yscale("log")
        axes[2][column].set_xlabel("learner step")
    for row, name in enumerate(("held-out accuracy", "KL to the behaviour policy, nats", "entropy, nats")):
        axes[row][0].set_ylabel(name)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every curve there, and a picture beside it")
    parser.add_argument("--quick", action="store_true", help="five steps at S = 2, one seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.quick:
        jobs = [(form, 2, 0, 5) for form in FORMS]
    else:
        jobs = [(form, staleness, seed, num_steps(staleness)) for staleness in sorted(STALENESS, reverse=True) for form in FORMS for seed in SEEDS]
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = []
        for future in as_completed([pool.submit(measure, *job) for job in jobs]):
            runs.append(future.result())
            print(f"{len(runs)} of {len(jobs)}: {runs[-1]['form']}, S = {runs[-1]['S']}, {runs[-1]['seconds']} s", file=sys.stderr)
    runs.sort(key=lambda run: (list(FORMS).index(run["form"]), run["S"], run["seed"]))
    rows = table(runs)
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "benchmark": "staleness",
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "table": rows,
            "runs": runs,
        }
        options.json.write_text(json.dumps(report) + "\n")
        draw(runs, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
