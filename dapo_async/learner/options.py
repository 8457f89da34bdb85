"""The options of the loss, read from the config once: by preflight, and by each learner rank."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from dapo_async.algorithm import LossOptions
from dapo_async.config import AlgorithmConfig


def loss_options(algorithm: AlgorithmConfig) -> LossOptions:
    """Every other field of `LossOptions` is a knob of the same name in the section `algorithm`.

    M2PO's mask is computed before the loss, which then makes no correction of its own. Raises
    ValueError for options that the loss does not support.
    """
    floor, cap = algorithm.correction_band
    derived: dict[str, Any] = {
        "correction": "none" if algorithm.correction == "m2po" else algorithm.correction,
        "correction_floor": floor,
        "correction_cap": cap,
    }
    names = [field.name for field in fields(LossOptions)]
    same = {name: getattr(algorithm, name) for name in names if name not in derived}
    return LossOptions(**derived, **same)


def needs_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether the loss has a KL term, so that the learner keeps the base model's weights."""
    return algorithm.kl_coef > 0


def needs_start_logprobs(algorithm: AlgorithmConfig) -> bool:
    """Whether every minibatch needs logprobs of the weights at the start of the step."""
    return algorithm.proximal == "recompute" or algorithm.correction == "m2po"
