"""DAPO's ladder on a small task: the six configurations of configs/ladder, on policy, same seeds.

Each rung takes from its config the knobs that the ladder varies. Model, data and sizes are those of
the quickstart (support/in_process.py), with sixteen updates per step as published. A response may
have 20 tokens, and a step-by-step solution has 11 to 25, so some are truncated. The soft punishment
begins 4 tokens before the limit: a fifth of the limit, as published.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from support.in_process import CONFIG, InProcess
from support.study import Study, accuracy, mean, spread

from dapo_async import config as knobs
from dapo_async.config import Config

LADDER = sorted((CONFIG.parent / "ladder").glob("*.yaml"))
SEEDS, STEPS = (0, 1, 2), 60
GROUPS, GROUP_SIZE, LR, NUM_MINIBATCHES = 16, 16, 1e-4, 16
LIMIT_TOKENS, CACHE_TOKENS = 20, 4
CURVE = (
    "entropy",
    "response_tokens",
    "truncated",
    "accuracy",
    "with_gradient",
    "generated",
    "clip_high_fraction",
    "clip_low_fraction",
    "grad_norm",
)
TAIL = 15  # the table shows means over the last steps; for entropy over the second half


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
        reward=replace(
            config.reward,
            overlong_cache_tokens=None
            if rung.reward.overlong_cache_tokens is None
            else CACHE_TOKENS,
        ),
        rollout=replace(config.rollout, max_response_tokens=LIMIT_TOKENS),
        replay=replace(
            config.replay,
            groups_per_step=GROUPS,
            group_size=GROUP_SIZE,
            dynamic_sampling=rung.replay.dynamic_sampling,
        ),
        learner=replace(config.learner, lr=LR, num_minibatches=NUM_MINIBATCHES),
    )


def measure(rung: str, seed: int, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    curves = InProcess(
        small(CONFIG.parent / "ladder" / f"{rung}.yaml"), staleness=0, seed=seed, steps=steps
    ).run()
    return {
        "rung": rung,
        "seed": seed,
        "steps": steps,
        "seconds": round(time.perf_counter() - start_s, 1),
        **curves.of(CURVE),
    }


def row(mine: list[dict[str, Any]]) -> dict[str, str]:
    """One rung: means over the seeds, and the lowest and highest accuracy and entropy."""
    end = slice(-TAIL, None)
    return {
        "rung": mine[0]["rung"][2:].replace("_", " "),
        "accuracy": accuracy(mine),
        "entropy, second half": spread(mine, "entropy", slice(mine[0]["steps"] // 2, None)),
        "length": f"{mean(mine, 'response_tokens', end):.1f}",
        "truncated": f"{mean(mine, 'truncated', end):.1%}",
        "trained groups with a gradient": f"{mean(mine, 'with_gradient'):.2f}",
        "generated per trained group": f"{mean(mine, 'generated') / GROUPS:.2f}",
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    figure, axes = pyplot.subplots(1, 4, figsize=(20, 5))
    names = list(dict.fromkeys(run["rung"] for run in runs))
    for run in runs:
        style = {
            "color": f"C{names.index(run['rung'])}",
            "label": run["rung"] if run["seed"] == SEEDS[0] else None,
            "alpha": 0.8,
        }
        axes[0].plot(*zip(*run["held_out"], strict=True), **style)
        for axis, name in zip(
            axes[1:], ("entropy", "response_tokens", "with_gradient"), strict=True
        ):
            axis.plot(run[name], **style)
    for axis, name in zip(
        axes,
        ("held-out accuracy", "entropy, nats", "response tokens", "trained groups with a gradient"),
        strict=True,
    ):
        axis.set_title(name)
        axis.set_xlabel("learner step")
    axes[1].set_yscale("log")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def jobs(quick: bool) -> list[tuple[str, int, int]]:
    return [
        (path.stem, seed, 2 if quick else STEPS)
        for seed in (SEEDS[:1] if quick else SEEDS)
        for path in LADDER
    ]


if __name__ == "__main__":
    Study(
        name="ladder",
        doc=__doc__ or "",
        quick="two steps of each rung, one seed",
        keys=("rung",),
        jobs=jobs,
        measure=measure,
        order=lambda run: (run["rung"], run["seed"]),
        row=row,
        draw=draw,
    ).main()
