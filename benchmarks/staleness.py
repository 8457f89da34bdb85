"""What staleness costs, and how much of that each correction saves.

The quickstart's task, without the runtime (support/in_process.py), at three learning rates, with
one and four minibatches per step. After the first S steps, every trained group is exactly S
versions old.

- `coupled`: PPO clipped around the behaviour policy, no correction
- `dual clip`: the same, with the loss of a token with A < 0 limited to 3 times -A
- `truncate 2`: proximal policy, behaviour weights truncated at 2 (the default); `truncate 5`: at 5
- `mask`: proximal policy, tokens with a weight outside [0.5, 2] dropped
- `mask sequences`: the same, with the geometric mean of the weights of a response
- `m2po`: PPO clipped around the behaviour policy, with M2PO's second-moment mask at 0.04
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
from support.study import LAST as EVALUATIONS
from support.study import Study, accuracy

from dapo_async import config as knobs

COUPLED = {"proximal": "behaviour", "correction": "none"}
MASK = {"correction": "mask", "correction_band": (0.5, 2.0)}
FORMS: dict[str, dict[str, Any]] = {
    "coupled": COUPLED,
    "dual clip": {**COUPLED, "dual_clip": 3.0},
    "truncate 2": {},
    "truncate 5": {"correction_band": (None, 5.0)},
    "mask": MASK,
    "mask sequences": {**MASK, "correction_level": "sequence_mean"},
    "m2po": {"proximal": "behaviour", "correction": "m2po"},
}
LRS, MINIBATCHES = (1e-4, 3e-4, 1e-3), (1, 4)
STALENESS, SEEDS = (1, 2, 4, 8, 16), (0, 1, 2)
GROUPS, GROUP_SIZE = 8, 16
LAST = ("kl", "behaviour_ess", "entropy", "grad_norm")  # means over the last quarter of the steps


def num_steps(staleness: int) -> int:
    return max(60, 10 * staleness + staleness)


def measure(
    form: str, lr: float, minibatches: int, staleness: int, seed: int, steps: int
) -> dict[str, Any]:
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    config = knobs.load(CONFIG)
    config = replace(
        config,
        algorithm=replace(config.algorithm, **FORMS[form]),
        learner=replace(config.learner, lr=lr, num_minibatches=minibatches),
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
    last = curves.rows[-max(1, steps // 4) :]
    return {
        "form": form,
        "lr": lr,
        "minibatches": minibatches,
        "S": staleness,
        "seed": seed,
        "steps": steps,
        "seconds": round(time.perf_counter() - start_s, 1),
        "held_out": [(step, round(value, 4)) for step, value in curves.held_out],
        **{name: significant(statistics.mean(row[name] for row in last)) for name in LAST},
    }


def significant(value: float) -> float:
    return float(f"{value:.3g}")


def row(mine: list[dict[str, Any]]) -> dict[str, str]:
    """One form at one setting: means over the seeds, and the lowest and highest accuracy."""
    first = mine[0]
    best = statistics.mean(max(value for _, value in run["held_out"]) for run in mine)
    means = {name: statistics.mean(run[name] for run in mine) for name in LAST}
    return {
        "lr": f"{first['lr']:g}",
        "minibatches": str(first["minibatches"]),
        "S": str(first["S"]),
        "form": first["form"],
        "steps": str(first["steps"]),
        "accuracy": accuracy(mine),
        "best": f"{best:.3f}",
        "KL": f"{means['kl']:.2g}",
        "effective samples": f"{means['behaviour_ess']:.2f}",
        "entropy": f"{means['entropy']:.3f}",
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-out accuracy at the end over S: the mean and the range of the seeds."""
    lrs, minibatches = (
        sorted({run["lr"] for run in runs}),
        sorted({run["minibatches"] for run in runs}),
    )
    figure, axes = pyplot.subplots(
        len(minibatches),
        len(lrs),
        figsize=(5 * len(lrs), 4 * len(minibatches)),
        squeeze=False,
        sharey=True,
    )
    forms = [form for form in FORMS if any(run["form"] == form for run in runs)]
    for down, count in enumerate(minibatches):
        for right, lr in enumerate(lrs):
            panel = axes[down][right]
            panel.set_title(f"lr {lr:g}, {count} minibatch{'es' * (count > 1)}")
            for form in forms:
                ends: dict[int, list[float]] = {}
                for run in runs:
                    if (run["form"], run["lr"], run["minibatches"]) == (form, lr, count):
                        ends.setdefault(run["S"], []).append(end_of(run))
                staleness = sorted(ends)
                means = [statistics.mean(ends[value]) for value in staleness]
                line = panel.plot(staleness, means, marker="o", label=form)[0]
                panel.fill_between(
                    staleness,
                    [min(ends[value]) for value in staleness],
                    [max(ends[value]) for value in staleness],
                    color=line.get_color(),
                    alpha=0.1,
                )
            panel.set_xscale("log", base=2)
            panel.set_xlabel("S: every trained group is S versions old")
        axes[down][0].set_ylabel("held-out accuracy at the end")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def end_of(run: dict[str, Any]) -> float:
    """The held-out accuracy over the last evaluations."""
    return float(statistics.mean(value for _, value in run["held_out"][-EVALUATIONS:]))


def jobs(quick: bool) -> list[tuple[str, float, int, int, int, int]]:
    if quick:
        return [(form, 3e-4, 1 + 3 * (form == "mask"), 2, 0, 5) for form in FORMS]
    return [
        (form, lr, minibatches, staleness, seed, num_steps(staleness))
        for minibatches in MINIBATCHES
        for seed in SEEDS
        for staleness in STALENESS
        for lr in LRS
        for form in FORMS
    ]


def order(run: dict[str, Any]) -> tuple[float, ...]:
    form = list(FORMS).index(run["form"])
    return run["minibatches"], run["lr"], run["S"], form, run["seed"]


STUDY = Study(
    name="staleness",
    doc=__doc__ or "",
    quick="five steps at S = 2, one seed",
    keys=("form", "lr", "minibatches", "S"),
    jobs=jobs,
    measure=measure,
    order=order,
    row=row,
    draw=draw,
)

if __name__ == "__main__":
    STUDY.main()
