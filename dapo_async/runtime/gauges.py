"""The newest numbers of a run as Prometheus gauges, on the endpoint of each Ray node.

In: rows of metrics.jsonl, rows of evaluations and the state of the engines, from the driver. Out:
gauges of `ray.util.metrics`. Ray exports `dapo_async_X` as `ray_dapo_async_X`. Each has the labels
`run` (name of the run directory), `actor` and `engine` (empty for numbers of all engines).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

PREFIX = "dapo_async_"
LABELS = ("run", "actor", "engine")
# Names in metrics.jsonl by the actor that they are about; `.` becomes `_`.
OF_ROW: Mapping[str, Sequence[str]] = {
    "driver": (
        "version",
        "time_s",
        "step_s",
        "engine_restarts",
        "rollout_workers",
        "checkpoint_pause_s",
    ),
    "learner": (
        "tokens_per_s.trained",
        "groups_per_s.trained",
        "idle.learner",
        "mfu.learner",
        "reward",
        "accuracy",
        "response_tokens",
        "truncated",
        "entropy",
        "loss",
        "grad_norm",
        "lr",
        "clip_low_fraction",
        "clip_high_fraction",
        "behaviour_ess",
        "behaviour_kl_k3",
        "mismatch",
        "staleness",
        "group_staleness_max",
        "non_finite",
    ),
    "replay": (
        "acceptance",
        "offered",
        "evicted",
        "buffered",
        "credits_held",
        "groups.admitted",
        "groups.trained",
        "groups.evicted",
        "groups.failed",
        "groups.in_flight",
        "tokens_per_s.accepted",
        "groups_per_s.generated",
        "groups_per_s.accepted",
    ),
    "rollout": (
        "tokens_per_s.generated",
        "tokens_per_s.prefilled",
        "idle.rollout",
        "efficiency.rollout",
        "mfu.rollout",
        "mbu.rollout",
        "engine_time.running",
        "engine_time.queued",
        "engine_time.no_credit",
        "engine_time.tail",
        "engine_time.sync",
        "engine_time.dead",
        "engine_time.asleep",
        "slots.idle",
        "publish_pause_s",
        "handshake.mismatch",
    ),
}
OF_EVALUATION = ("accuracy", "mean_response_tokens", "truncated", "version")
OF_ENGINE = ("version", "tokens_per_s", "running", "slots")


def gauge_name(metric: str) -> str:
    """`tokens_per_s.generated` as `dapo_async_tokens_per_s_generated`."""
    return PREFIX + metric.replace(".", "_")


def all_names() -> set[str]:
    """Every gauge, as Prometheus sees it."""
    names = {name for names in OF_ROW.values() for name in names}
    names |= {f"evaluation.{name}" for name in OF_EVALUATION}
    names |= {f"engine.{name}" for name in OF_ENGINE}
    return {f"ray_{gauge_name(name)}" for name in names}


class AnyGauge(Protocol):
    """Ray's gauge, or a fake."""

    def set(self, value: float, tags: dict[str, str]) -> None: ...


def _ray_gauge(name: str) -> AnyGauge:
    from ray.util.metrics import Gauge

    gauge: AnyGauge = Gauge(name, tag_keys=LABELS)
    return gauge


class Gauges:
    """Sets gauges of one run, in a process that is connected to Ray."""

    def __init__(self, run: str, *, make: Any = _ray_gauge) -> None:
        """`make` returns the gauge of a name."""
        self._run, self._make = run, make
        self._gauges: dict[str, AnyGauge] = {}
        self._engines: set[str] = set()  # of the newest row

    def step(self, row: Mapping[str, Any], engines: Mapping[str, Mapping[str, float]]) -> None:
        """A row of metrics.jsonl, and `Tracker.by_engine`."""
        for actor, names in OF_ROW.items():
            for name in names:
                self._set(name, row.get(name), actor=actor)
        left = dict.fromkeys(OF_ENGINE, 0.0)  # else its last numbers would stand for ever
        gone = dict.fromkeys(self._engines - engines.keys(), left)
        self._engines = {*engines}
        for engine, state in {**gone, **engines}.items():
            for name in OF_ENGINE:
                self._set(f"engine.{name}", state.get(name), actor=engine, engine=engine)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """A row of evaluations.jsonl."""
        for name in OF_EVALUATION:
            self._set(f"evaluation.{name}", row.get(name), actor="evaluator")

    def _set(self, metric: str, value: float | None, *, actor: str, engine: str = "") -> None:
        if value is None or not math.isfinite(value):
            return
        if metric not in self._gauges:
            self._gauges[metric] = self._make(gauge_name(metric))
        self._gauges[metric].set(value, {"run": self._run, "actor": actor, "engine": engine})
