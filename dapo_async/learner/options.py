"""The options of the loss, read from the config once: by preflight, and by each learner rank."""

from __future__ import annotations

from dataclasses import fields

from dapo_async.algorithm import LossOptions
from dapo_async.config import AlgorithmConfig


def loss_options(algorithm: AlgorithmConfig) -> LossOptions:
    """Every field of `LossOptions` is a knob of the same name in the section `algorithm`.

    M2PO's mask is computed before the loss, which then makes no correction of its own. Raises
    ValueError for options that the loss does not support.
    """
    values = {field.name: getattr(algorithm, field.name) for field in fields(LossOptions)}
    if algorithm.correction == "m2po":
        values["correction"] = "none"
    return LossOptions(**values)
