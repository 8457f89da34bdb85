"""What staleness costs, and how much of that each correction saves.

The quickstart's task, without the runtime (support/in_process.py). After the first S steps, every
trained group is exactly S versions old.

- `truncate`: proximal policy, behaviour weights truncated at 2 (the default)
- `mask`: proximal policy, tokens with a weight outside [0.5, 2] dropped
- `off`: coupled PPO, clipped around the behaviour policy
- `m2po`: coupled PPO with M2PO's second-moment mask at 0.04
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
    "mask": {"correction": "mask", "correction_band": (0.5, 2.0)},
    "m2po": {"proximal": "behaviour", "correction": "m2po"},
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
            "a group has another staleness than planned"
        )
        # The KL divergence to the behaviour policy, which is the proximal policy of coupled PPO.
        coupled = config.algorithm.proximal == "behaviour"
        row["kl"] = row["current_kl_k3" if coupled else "behaviour_kl_k3"]
    head = {
        "form": form,
        "S": staleness,
        "seed": seed,
        "steps": steps,
        "seconds": round(time.perf_counter() - start_s, 1),
    }
    return {**head, **curves.of(CURVE)}


def best(run: dict[str, Any]) -> float:
    """The highest held-out accuracy of a run."""
    return max(float(value) for _, value in run["held_out"])


def row(mine: list[dict[str, Any]]) -> dict[str, str]:
    """One form and staleness: means over the seeds, and the lowest and highest accuracy."""
    last = slice(-max(1, mine[0]["steps"] // 4), None)
    return {
        "form": mine[0]["form"],
        "S": str(mine[0]["S"]),
        "steps": str(mine[0]["steps"]),
        "accuracy": accuracy(mine),
        "best": f"{statistics.mean(best(run) for run in mine):.3f}",
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
