"""What staleness costs, and what each correction saves of it: the quickstart's task with every trained group exactly S versions old.

The system without its runtime (support/in_process.py): after the first S steps each trained token is exactly S versions old.

- `truncate`: decoupled, behaviour weights cut at 2 (the default)        - `mask`: decoupled, tokens with a weight outside [0.5, 2] dropped
- `off`: coupled PPO, the clip is around the behaviour policy            - `m2po`: coupled, with M2PO's second-moment mask at 0.04
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from support.in_process import CONFIG, InProcess
from support.study import Study, accuracy, mean

from dapo_async import config as knobs

FORMS: dict[str, dict[str, Any]] = {
    "truncate": {},
    "off": {"proximal": "behaviour", "correction": "none"},
    "mask": {"correction": "mask", "correction_floor": 0.5},
    "m2po": {"proximal": "behaviour", "correction": "none", "second_moment": 0.04},
}
STALENESS, SEEDS = (0, 2, 8, 16), (0, 1, 2)
GROUPS, GROUP_SIZE, LR = 16, 16, 3e-4
CURVE = (
    "entropy",
    "kl",
    "behaviour_ess",
    "response_tokens",
    "grad_norm",
    "staleness",
    "group_staleness_max",
)


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
        replay=replace(
            config.replay, groups_per_step=GROUPS, group_size=GROUP_SIZE, dynamic_sampling=False
        ),
    )
    curves = InProcess(config, staleness=staleness, seed=seed, steps=steps).run()
    for step, row in enumerate(curves.rows):
        assert row["oldest"] == row["newest"] == min(step, staleness), (
            "a group is not as old as it was to be"
        )
        # Of the policy that trains against the one that sampled: the coupled forms have no other proximal policy than that.
        row["kl"] = row[
            "current_kl_k3" if config.algorithm.proximal == "behaviour" else "behaviour_kl_k3"
        ]
    head = {
        "form": form,
        "S": staleness,
        "seed": seed,
        "steps": steps,
        "seconds": round(time.perf_counter() - start_s, 1),
    }
    return {**head, **curves.of(CURVE)}


def row(mine: list[dict[str, Any]]) -> dict[str, str]:
    """Of one form and staleness: means over the seeds, and the lowest and highest accuracy."""
    last = slice(-max(1, mine[0]["steps"] // 4), None)
    return {
        "form": mine[0]["form"],
        "S": str(mine[0]["S"]),
        "steps": str(mine[0]["steps"]),
        "accuracy": accuracy(mine),
        "best": f"{statistics.mean(max(value for _, value in run['held_out']) for run in mine):.3f}",
        "KL, last quarter": f"{mean(mine, 'kl', last):.2g}",
        "effective samples": f"{mean(mine, 'behaviour_ess', last):.2f}",
        "entropy": f"{mean(mine, 'entropy', last):.3f}",
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    staleness = sorted({run["S"] for run in runs})
    figure, axes = pyplot.subplots(
        3, len(staleness), figsize=(4 * len(staleness), 9), squeeze=False, sharey="row"
    )
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
    for row, name in enumerate(
        ("held-out accuracy", "KL to the behaviour policy, nats", "entropy, nats")
    ):
        axes[row][0].set_ylabel(name)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def jobs(quick: bool) -> list[tuple[str, int, int, int]]:
    if quick:
        return [(form, 2, 0, 5) for form in FORMS]
    return [
        (form, staleness, seed, num_steps(staleness))
        for staleness in sorted(STALENESS, reverse=True)
        for form in FORMS
        for seed in SEEDS
    ]


if __name__ == "__main__":
    Study(
        name="staleness",
        doc=__doc__ or "",
        quick="five steps at S = 2, one seed",
        keys=("form", "S"),
        jobs=jobs,
        measure=measure,
        order=lambda run: (list(FORMS).index(run["form"]), run["S"], run["seed"]),
        row=row,
        draw=draw,
    ).main()
