"""The names and ranges that the loss knows; checked before a run starts (by whoever reads the config) and again at every call."""

from __future__ import annotations

from dapo_async.algorithm.objectives import CORRECTION_LEVELS, OBJECTIVES

CORRECTIONS = ("truncate", "mask", "none")


def check_name(rule: str, name: str, known: tuple[str, ...]) -> None:
    """Raises a ValueError that lists the known names."""
    if name not in known:
        raise ValueError(f"{rule} ({name!r}) is unknown; set one of {', '.join(known)}")


def check_loss_options(
    objective: str,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    correction: str = "truncate",
    correction_level: str | None = None,
    correction_cap: float | None = 2.0,
    correction_floor: float | None = None,
    entropy_bonus: float = 0.0,
) -> str:
    """Refuses what `policy_loss` does not support, with rule, values and remedy in a ValueError; returns the level that it will use."""
    check_name("objective", objective, tuple(OBJECTIVES))
    check_name("correction", correction, CORRECTIONS)
    known = OBJECTIVES[objective]
    level = correction_level or known.correction_levels[0]
    check_name("correction_level", level, CORRECTION_LEVELS)
    if level not in known.correction_levels:
        allowed = " or ".join(known.correction_levels)
        raise ValueError(
            f"objective {objective} does not take correction_level {level}; set it to {allowed}, or leave it unset"
        )
    # Negated comparisons, so that nan is refused as well.
    if not 0 < clip_low <= 1:
        raise ValueError(
            f"clip_low ({clip_low}) must be in (0, 1]: the ratio is kept above 1 - clip_low; set 0.2, or 1 for no lower clip"
        )
    if not clip_high > 0:
        raise ValueError(
            f"clip_high ({clip_high}) must be positive: the ratio is kept below 1 + clip_high; set 0.28"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(
            f"dual_clip ({dual_clip}) must be greater than 1, the ratio of an unchanged policy; set 3 or 10, or leave it unset"
        )
    if dual_clip is not None and not known.dual_clip:
        raise ValueError(
            f"dual_clip ({dual_clip}) has no meaning for objective {objective}, whose ratio is bounded on both sides; leave it unset"
        )
    if not 0 <= entropy_bonus < float("inf"):
        raise ValueError(
            f"entropy_bonus ({entropy_bonus}) must not be negative: it rewards entropy; set 0.001, or 0 for none"
        )
    _check_band(cap=correction_cap, floor=correction_floor)
    return level


def _check_band(*, cap: float | None, floor: float | None) -> None:
    if cap is not None and not cap > 0:
        raise ValueError(
            f"correction_cap ({cap}) must be positive: it bounds the ratio itself, not its logarithm; set 2, or leave it unset"
        )
    if floor is not None and not floor >= 0:
        raise ValueError(
            f"correction_floor ({floor}) must not be negative: it bounds the ratio itself, not its logarithm; set 0.5, or leave it unset"
        )
    if cap is not None and floor is not None and cap < floor:
        raise ValueError(
            f"correction_cap ({cap}) must not be below correction_floor ({floor}); swap them"
        )
