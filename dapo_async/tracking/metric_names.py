"""The names of metrics and parameters that all sinks share: MLflow, TensorBoard and W&B."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from dapo_async.config import Config, redacted

MAX_PARAMETER_CHARACTERS = 6000  # MLflow's limit


def metric_name(name: str) -> str:
    """`idle.learner` as `idle/learner`: the sinks group metrics by the part before `/`."""
    return name.replace(".", "/")


def finite_numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The metrics of a row: its finite numbers, except its step and version."""
    return {
        metric_name(prefix + name): float(value)
        for name, value in row.items()
        if isinstance(value, int | float)
        and math.isfinite(value)
        and name not in ("step", "version")
    }


def flat_parameters(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Knobs as dotted names and texts that MLflow accepts: `("learner.lr", "0.0003")`."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_parameters(value, f"{prefix}{name}.")
        else:
            shown = "null" if value is None else str(value)
            yield prefix + name, shown[:MAX_PARAMETER_CHARACTERS]


def parameters_of(config: Config) -> dict[str, str]:
    """Every knob, without the password of a tracking URI."""
    tracking = replace(config.tracking, mlflow=redacted(config.tracking.mlflow))
    return dict(flat_parameters(asdict(replace(config, tracking=tracking))))
