"""The options of the loss and its input tensors, checked when they are built.

`LossOptions` is built and checked once: by preflight before a run starts, and by the learner.
`LossInputs` is built for every microbatch; its check compares shapes only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from dapo_async.algorithm.objectives import CORRECTION_LEVELS, OBJECTIVES, Objective

if TYPE_CHECKING:  # preflight checks the options of the loss without torch
    from torch import Tensor

CORRECTIONS = ("truncate", "mask", "none")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """What the loss computes; formulas and sources are at the top of loss.py.

    Raises ValueError with rule, values and remedy for what the loss does not support.
    """

    objective: str = "dapo"  # a name in OBJECTIVES
    clip_low: float  # the ratio is clipped below 1 - clip_low
    clip_high: float  # the ratio is clipped above 1 + clip_high
    dual_clip: float | None = None  # for A < 0 the loss per token is at most -dual_clip * A
    correction: str = "truncate"  # of the behaviour weight: truncate | mask | none
    correction_level: str | None = None  # None: the first level that the objective supports
    correction_cap: float | None = 2.0
    correction_floor: float | None = None
    # Sequences whose geometric mean of π_prox/π_beh is outside (floor, cap) are not trained; this
    # is besides the correction. None: no such rule.
    sequence_band: tuple[float | None, float | None] | None = None
    entropy_bonus: float = 0.0  # subtracts this times the mean entropy from the loss
    kl_coef: float = 0.0  # adds this times the mean KL estimate to the reference policy
    kl_estimator: str = "k3"  # of it: k1 | k2 | k3

    def __post_init__(self) -> None:
        check_name("objective", self.objective, tuple(OBJECTIVES))
        check_name("correction", self.correction, CORRECTIONS)
        check_name("correction_level", self.level, CORRECTION_LEVELS)
        check_name("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        self._check_objective()
        self._check_clips()
        self._check_band()

    @property
    def level(self) -> str:
        """The level of the behaviour ratio: token | sequence | sequence_mean."""
        return self.correction_level or self.rules.correction_levels[0]

    @property
    def rules(self) -> Objective:
        """The objective's formula and what it supports."""
        return OBJECTIVES[self.objective]

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss has to know which tokens form a sequence."""
        corrects_sequences = self.correction != "none" and self.level != "token"
        return self.rules.of_sequences or corrects_sequences or self.sequence_band is not None

    def _check_objective(self) -> None:
        if self.level not in self.rules.correction_levels:
            allowed = " or ".join(self.rules.correction_levels)
            raise ValueError(
                f"objective {self.objective} does not take correction_level {self.level}; "
                f"set it to {allowed}, or leave it unset"
            )
        if self.dual_clip is not None and not self.rules.dual_clip:
            raise ValueError(
                f"dual_clip ({self.dual_clip}) has no meaning for objective {self.objective}, "
                "whose ratio is bounded on both sides; leave it unset"
            )

    def _check_clips(self) -> None:
        # Negated comparisons, so that nan is refused as well.
        if not 0 < self.clip_low <= 1:
            raise ValueError(
                f"clip_low ({self.clip_low}) must be in (0, 1], because the ratio is clipped below "
                "1 - clip_low; set 0.2, or 1 for no lower clip"
            )
        if not self.clip_high > 0:
            raise ValueError(
                f"clip_high ({self.clip_high}) must be positive, because the ratio is clipped "
                "above 1 + clip_high; set 0.28"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(
                f"dual_clip ({self.dual_clip}) must be greater than 1, the ratio of an unchanged "
                "policy; set 3 or 10, or leave it unset"
            )
        if not 0 <= self.entropy_bonus < float("inf"):
            raise ValueError(
                f"entropy_bonus ({self.entropy_bonus}) must not be negative; "
                "set 0.001, or 0 for none"
            )
        if not 0 <= self.kl_coef < float("inf"):
            raise ValueError(
                f"kl_coef ({self.kl_coef}) must not be negative, because the KL term keeps the "
                "policy near the reference; set 0.04, or 0 for none"
            )

    def _check_band(self) -> None:
        self._check_correction_band()
        if self.sequence_band is None:
            return
        floor, cap = self.sequence_band
        lowest, highest = floor or 0.0, math.inf if cap is None else cap
        if not 0 <= lowest <= 1 <= highest:  # also for nan
            raise ValueError(
                f"sequence_band ({floor}, {cap}) must enclose 1, the ratio of an unchanged policy, "
                "with a floor of at least 0; set (0.999, 1.001), or None for no rule"
            )

    def _check_correction_band(self) -> None:
        cap, floor = self.correction_cap, self.correction_floor
        if cap is not None and not cap > 0:
            raise ValueError(
                f"correction_cap ({cap}) must be positive, because it bounds the ratio, not its "
                "logarithm; set 2, or leave it unset"
            )
        if floor is not None and not floor >= 0:
            raise ValueError(
                f"correction_floor ({floor}) must not be negative, because it bounds the ratio, "
                "not its logarithm; set 0.5, or leave it unset"
            )
        if cap is not None and floor is not None and cap < floor:
            raise ValueError(
                f"correction_cap ({cap}) must not be below correction_floor ({floor}); swap them"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """The tensors of one packed microbatch, all [T]. Gradients flow into the first and `entropies`.

    A token with `mask` 0 adds nothing to loss, gradient or diagnostics, even if its logprobs are
    nan. Raises ValueError if the shapes differ.
    """

    current_logprobs: Tensor
    proximal_logprobs: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    sequence_ids: Tensor | None = None  # sequence forms need whole sequences
    num_ids: int | None = None  # the ids are int64 below it; None: any integers
    keep: Tensor | None = None  # bool: tokens that second_moment_mask keeps; None: all
    entropies: Tensor | None = None  # of the current policy; an entropy bonus needs them
    reference_logprobs: Tensor | None = None  # of the frozen reference; a KL term needs them
    token_weights: Tensor | None = None  # multiply each token's loss, entropy and KL; None: 1

    def __post_init__(self) -> None:
        shape = self.current_logprobs.shape
        for field in fields(self):
            values: Tensor | int | None = getattr(self, field.name)
            if values is None or isinstance(values, int):
                continue
            if values.ndim != 1 or values.shape != shape:
                raise ValueError(
                    f"{field.name} {tuple(values.shape)} must have the shape [T] of "
                    f"current_logprobs {tuple(shape)}; pack one entry per token"
                )


def check_name(rule: str, name: str, known: tuple[str, ...]) -> None:
    """Raises a ValueError that lists the known names."""
    if name not in known:
        raise ValueError(f"{rule} ({name!r}) is unknown; set one of {', '.join(known)}")
