"""What the planner says about a running job: the predicted step, and whether a split is faster.

In: rows of metrics.jsonl and the config of the run. Out: the measured figures, those of a
simulation with the rates of these rows, and the next split with its gain. `bottleneck.py` takes the
advice from here every ten steps, by the closed forms (about 1 ms). `summary.json` has the simulated
figures (about 0.2 s).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from dapo_async.config import Config
from dapo_async.planner.closed_forms import closed_forms
from dapo_async.planner.from_run import (
    GENERATED,
    Measured,
    has_rates,
    measured_in,
    values_of_rows,
)
from dapo_async.planner.scenario import Scenario
from dapo_async.planner.settings import Cluster, read_scenario
from dapo_async.planner.shapes import Shape, scenario_of_shape, smaller
from dapo_async.planner.simulator import simulate

LEAST_GAIN = 1.05  # smaller gains are not advised
STEPS, WARM_UP = 24, 8  # of a simulation
Row = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class NextSplit:
    """A faster division of the same GPUs, by the closed forms."""

    learner_gpus: int
    engines: int
    gain: float  # present step time over the expected one
    scenario: Scenario


def next_split(rows: Sequence[Row], config: Config) -> NextSplit | None:
    """The fastest split of the GPUs of the run; None without rates or without enough gain."""
    known = [row for row in rows if has_rates(row)]
    planned = _scenario(known, config)
    if planned is None or not _can_split(config):
        return None
    return _fastest(*planned)


def compared(rows: Sequence[Row], config: Config) -> dict[str, Any] | None:
    """`split` in summary.json: measured, predicted, recommended. None without rates."""
    known = [row for row in rows if has_rates(row)]
    planned = _scenario(known, config)
    if planned is None:
        return None
    measured, (scenario, cluster) = measured_in(known), planned
    predicted = simulate(_short(scenario))
    found = _fastest(scenario, cluster) if _can_split(config) else None
    return {
        "measured": _measured_figures(measured),
        "predicted": {
            "step_s": predicted.step_s,
            "staleness": predicted.staleness,
            "idle_learner": max(0.0, 1.0 - predicted.learner["train"]),
        },
        "recommended": None if found is None else _recommended(found, measured, predicted.step_s),
    }


def split_line(split: Mapping[str, Any] | None) -> str | None:
    """`split` of a summary as one line; None without one."""
    if not split:
        return None
    measured_s, predicted_s = split["measured"]["step_s"], split["predicted"]["step_s"]
    line = (
        f"planner: {measured_s:.3g} s per step measured in the last steps, {predicted_s:.3g} s "
        f"predicted ({predicted_s / measured_s - 1:+.0%})"
    )
    wanted = split["recommended"]
    if wanted is None:
        return line
    return (
        f"{line}; recommended: {wanted['learner_gpus']} GPUs for the learner and "
        f"rollout.num_workers={wanted['engines']}, {wanted['step_s']:.3g} s "
        f"({wanted['gain']:.2f} times as fast)"
    )


def added_rates(rows: Sequence[Row]) -> dict[str, float]:
    """The rates of several steps as those of one long step; empty if no row has them."""
    known = [row for row in rows if has_rates(row)]
    if not known:
        return {}
    measured, tokens = measured_in(known), sum(row["tokens"] for row in known)
    share = sum(row["step_s"] for row in rows) / sum(row["step_s"] for row in known)
    responses = sum(row["tokens"] / row["response_tokens"] for row in known)
    return {
        "tokens": share * tokens,
        "response_tokens": tokens / responses,
        "staleness": measured.staleness,
        GENERATED: measured.generated_tokens_per_s,
        "publish_s": fmean(row.get("publish_s", 0.0) for row in known),
        "publish_pause_s": fmean(row.get("publish_pause_s", 0.0) for row in known),
        "steps": float(len(rows)),
    }


def _scenario(rows: Sequence[Row], config: Config) -> tuple[Scenario, Cluster] | None:
    """None without rows, or if nothing can be played: no group was accepted, for example."""
    if not rows:
        return None
    try:
        return read_scenario(values_of_rows(config, rows))
    except ValueError:
        return None


def _fastest(scenario: Scenario, cluster: Cluster) -> NextSplit | None:
    (gpus,), rates = cluster.gpus, cluster.rates
    now_s = closed_forms(scenario).step_s
    best: NextSplit | None = None
    unit, engine = rates.tensor_parallel * rates.context_parallel, rates.engine_gpus
    for engines in range(1, (gpus - unit) // engine + 1):
        learner = gpus - engines * engine
        if learner % unit:
            continue
        shape = Shape(
            gpus=gpus,
            learner_gpus=learner,
            tensor_parallel=rates.tensor_parallel,
            context_parallel=rates.context_parallel,
            engine_gpus=engine,
            slots=scenario.engine.num_slots,
        )
        other = scenario_of_shape(scenario, cluster, shape, scenario.max_staleness)
        gain = now_s / closed_forms(other).step_s
        if gain > (best.gain if best else LEAST_GAIN):
            best = NextSplit(learner, engines, gain, other)
    return best


def _can_split(config: Config) -> bool:
    """Whether GPUs can move from one side to the other: both sides have their own."""
    return config.model.torch_device == "cuda" and not config.model.is_shared


def _short(scenario: Scenario) -> Scenario:
    """Few steps on a smaller fleet."""
    return smaller(
        replace(scenario, num_steps=STEPS + 2 * scenario.max_staleness, warm_up_steps=WARM_UP)
    )


def _recommended(found: NextSplit, measured: Measured, predicted_s: float) -> dict[str, Any]:
    """Its simulated step, times measured / predicted of the present split."""
    step_s = simulate(_short(found.scenario)).step_s
    return {
        "learner_gpus": found.learner_gpus,
        "engines": found.engines,
        "step_s": step_s * measured.step_s / predicted_s,
        "gain": predicted_s / step_s,
    }


def _measured_figures(measured: Measured) -> dict[str, float]:
    return {
        "step_s": measured.step_s,
        "staleness": measured.staleness,
        "idle_learner": measured.idle_learner,
    }
