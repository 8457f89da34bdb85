"""How long responses are, and which groups the filters keep: drawn from (seed, group).

The same seed and group always give the same lengths, whatever the rest of the run does. So all
splits and staleness bounds of a comparison get the same groups. The simulator calls `Draws`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean

import numpy as np

BLOCK = 256  # groups that are drawn together
QUANTILES = 2000
LARGE_GROUP = 64
MOST_TAIL = 5.0  # wider lognormals have no mean that can be computed


@dataclass(frozen=True, slots=True)
class Lengths:
    """Response lengths in tokens; longer ones than `max_tokens` are cut.

    Lognormal with the mean `mean_tokens` after the cut. With `samples`, the distribution of these
    lengths instead, scaled to the mean (None: their own mean). Siblings correlate: they have the
    share `shared` of the variance in common, in the normal variable behind the length.
    """

    tail: float = 1.0  # sigma of the lognormal; 0: all equal
    shared: float = 0.5
    mean_tokens: float = 500
    max_tokens: int = 2000
    seed: int = 0
    samples: tuple[float, ...] = ()  # quantiles of an empirical or mixed distribution, ascending
    drift: float = 1.0  # the mean at the last step over the mean at the first; linear in between

    def of_group(self, group_id: int, group_size: int) -> tuple[int, ...]:
        """Of the siblings, in tokens, without drift."""
        return tuple(Draws(self, group_size=group_size).lengths(group_id))

    @property
    def context_tokens(self) -> float:
        """Mean tokens so far of a running sequence: E[L²] / (2·E[L]).

        Long responses run longer, so it is more than half of the mean.
        """
        cut = np.minimum(_factor(self) * _quantiles(self), self.max_tokens)
        return float((cut**2).mean() / (2 * cut.mean()))

    def longest_of(self, group_size: int) -> float:
        """The expected longest length of a group over the expected length: M in closed forms."""
        return _longest_of(self, group_size)


def mixture(parts: Sequence[tuple[float, float, float]]) -> tuple[float, ...]:
    """Quantiles of a mixture of lognormals, for `Lengths.samples`.

    `parts`: weight, mean and tail of each. Raises ValueError unless weights and means are positive.
    """
    if not parts or any(
        weight <= 0 or mean <= 0 or not 0 <= tail <= MOST_TAIL for weight, mean, tail in parts
    ):
        raise ValueError(
            f"lengths.mixture ({list(parts)}) must have parts of a positive weight, a positive "
            f"mean and a tail from 0 to {MOST_TAIL:g}; write [[0.8, 500, 0.5], [0.2, 4000, 0.5]]"
        )
    normal = NormalDist()
    z = np.array([normal.inv_cdf((k + 0.5) / QUANTILES) for k in range(QUANTILES)])
    values = np.concatenate([mean * np.exp(tail * z - tail**2 / 2) for _, mean, tail in parts])
    total = sum(weight for weight, _, _ in parts)
    weights = np.concatenate([np.full(QUANTILES, weight / total) for weight, _, _ in parts])
    order = np.argsort(values, kind="stable")
    shares = np.cumsum(weights[order]) / QUANTILES
    wanted = (np.arange(QUANTILES) + 0.5) / QUANTILES
    return tuple(values[order][np.minimum(np.searchsorted(shares, wanted), len(values) - 1)])


class Draws:
    """Lengths and verdicts of the groups of one run, drawn in blocks."""

    def __init__(self, lengths: Lengths, *, group_size: int) -> None:
        self._lengths, self._group_size = lengths, group_size
        self._factor = _factor(lengths)
        self._number = -1  # of the block that is drawn
        self._drawn = np.zeros((0, 0))
        self._block: list[list[int]] = []
        self._uniform: list[float] = []

    def lengths(self, group_id: int, *, scale: float = 1.0) -> list[int]:
        """Tokens of the siblings; `scale` of the mean comes from the drift."""
        self._open(group_id // BLOCK)
        if scale == 1.0:
            return self._block[group_id % BLOCK]
        scaled = np.rint(scale * self._drawn[group_id % BLOCK])
        lengths: list[int] = np.clip(scaled, 1, self._lengths.max_tokens).astype(int).tolist()
        return lengths

    def luck(self, group_id: int) -> float:
        """In [0, 1): the filters keep the group if their acceptance is larger."""
        self._open(group_id // BLOCK)
        return self._uniform[group_id % BLOCK]

    def _open(self, number: int) -> None:
        if number == self._number:
            return
        lengths = self._lengths
        rng = np.random.default_rng((lengths.seed, number))
        common, own = rng.normal(size=(BLOCK, 1)), rng.normal(size=(BLOCK, self._group_size))
        z = math.sqrt(lengths.shared) * common + math.sqrt(1 - lengths.shared) * own
        self._drawn = self._factor * _shape(lengths, z)
        whole = np.clip(np.rint(self._drawn), 1, lengths.max_tokens)
        self._block = whole.astype(np.int64).tolist()
        self._uniform = rng.random(BLOCK).tolist()
        self._number = number


def _shape(lengths: Lengths, z: np.ndarray) -> np.ndarray:
    """Lengths of the normal values `z`, before they are scaled to the mean."""
    if not lengths.samples:
        return np.exp(lengths.tail * z)
    values = np.array(lengths.samples)
    places = np.searchsorted(_normal_grid(len(values)), z)
    return np.asarray(values[np.minimum(places, len(values) - 1)])


@cache
def _normal_grid(count: int) -> np.ndarray:
    """The upper ends of `count` equally likely intervals of a normal variable."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((k + 1) / count) for k in range(count - 1)])


@cache
def _longest_of(lengths: Lengths, size: int) -> float:
    """By drawn groups if these are small, else by the quantile that one of `size` exceeds."""
    if size > 2 * LARGE_GROUP:
        # Siblings correlate, but there are many groups.
        cut = np.sort(np.minimum(_factor(lengths) * _quantiles(lengths), lengths.max_tokens))
        place = min(len(cut) - 1, math.ceil(len(cut) * 0.5614 ** (1 / size)))  # e^-gamma
        return float(cut[place] / cut.mean())
    draws = Draws(lengths, group_size=size)
    groups = [draws.lengths(group_id) for group_id in range(4 * BLOCK)]
    return fmean(map(max, groups)) / fmean(fmean(group) for group in groups)


@cache
def _quantiles(lengths: Lengths) -> np.ndarray:
    """Equally likely lengths, before they are scaled to the mean."""
    if lengths.samples:
        return np.array(lengths.samples)
    normal = NormalDist()
    z = [normal.inv_cdf((k + 0.5) / (2 * QUANTILES)) for k in range(2 * QUANTILES)]
    return np.exp(lengths.tail * np.array(z))


@cache
def _factor(lengths: Lengths) -> float:
    """By what the shape is multiplied so that lengths have their mean after the cut."""
    values = _quantiles(lengths)
    low, high = 0.0, 2 * lengths.max_tokens / float(values.min())
    for _ in range(80):
        middle = (low + high) / 2
        below = np.minimum(middle * values, lengths.max_tokens).mean() < lengths.mean_tokens
        low, high = (middle, high) if below else (low, middle)
    return low
