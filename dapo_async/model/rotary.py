"""Rotary position embeddings and their scalings for long contexts.

In: the rotary section of a `config.json`. Out: tables of cosines and sines for the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # preflight reads a config without torch
    from torch import Tensor

Scaling = Literal["default", "linear", "llama3", "yarn"]
REMEDY = "copy the config.json of the base model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Frequencies θ^(-2i/d), scaled for contexts `factor` times as long as `original_positions`.

    - `linear` (2306.15595): divides all frequencies by the factor.
    - `llama3`: divides frequencies that turn fewer than `low` times over the original context,
      keeps those that turn more than `high` times, and interpolates in between.
    - `yarn` (2309.00071): as llama3, but interpolates linearly in the dimension, and multiplies
      cosines and sines by `magnitude`.
    """

    theta: float
    scaling: Scaling = "default"
    factor: float = 1.0
    original_positions: float = 0.0
    low: float = 0.0
    high: float = 0.0
    magnitude: float = 1.0
    truncate: bool = True  # yarn: the ramp starts and ends at whole dimensions

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rope:
        """From a `config.json` of transformers 4 or 5.

        Version 4 has `rope_theta` and `rope_scaling`, version 5 `rope_parameters`. Raises
        ValueError, in one line, for what is not supported, for wrong numbers, and when both
        versions are there and differ.
        """
        old, new = _section(values, "rope_scaling"), _section(values, "rope_parameters")
        rope = cls._from_section(old or new, values)
        # transformers lets `rope_scaling` replace `rope_parameters`
        if old and new and cls._from_section(new, values) != rope:
            raise ValueError(
                f"rope_scaling ({dict(old)}) and rope_parameters ({dict(new)}) differ; remove one"
            )
        return rope

    @classmethod
    def _from_section(cls, section: Mapping[str, Any], values: Mapping[str, Any]) -> Rope:
        scaling: Any = section.get("rope_type") or section.get("type") or "default"
        if scaling not in get_args(Scaling):
            supported = ", ".join(get_args(Scaling))
            raise ValueError(
                f"rope scaling {scaling!r} is not supported; supported are {supported}"
            )
        key = "partial_rotary_factor"
        if (partial := section.get(key) or values.get(key) or 1.0) != 1.0:
            raise ValueError(
                f"{key} ({partial}) is not supported; use a model that rotates whole heads"
            )
        theta = _positive(section, "rope_theta", values.get("rope_theta") or 10_000.0)
        if scaling == "default":
            return cls(theta=theta)
        factor = _positive(section, "factor")
        if scaling == "linear":
            return cls(theta=theta, scaling=scaling, factor=factor)
        key = "original_max_position_embeddings"
        if values.get(key) is not None:  # transformers prefers it to the one of the section
            section = {**section, key: values[key]}
        original = _positive(section, key, values.get("max_position_embeddings"))
        if scaling == "llama3":
            return cls._llama3(section, theta=theta, factor=factor, original=original)
        return cls._yarn(section, theta=theta, factor=factor, original=original)

    @classmethod
    def _llama3(
        cls, section: Mapping[str, Any], *, theta: float, factor: float, original: float
    ) -> Rope:
        low, high = _positive(section, "low_freq_factor"), _positive(section, "high_freq_factor")
        if not low < high:
            raise ValueError(
                f"low_freq_factor ({low:g}) must be below high_freq_factor ({high:g}); {REMEDY}"
            )
        return cls(
            theta=theta,
            scaling="llama3",
            factor=factor,
            original_positions=original,
            low=low,
            high=high,
        )

    @classmethod
    def _yarn(
        cls, section: Mapping[str, Any], *, theta: float, factor: float, original: float
    ) -> Rope:
        if section.get("mscale") or section.get("mscale_all_dim"):
            raise ValueError(
                "yarn with mscale is not supported: none of the supported families has it; "
                f"{REMEDY}"
            )
        default_magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        return cls(
            theta=theta,
            scaling="yarn",
            factor=factor,
            original_positions=original,
            low=_positive(section, "beta_slow", 1.0),
            high=_positive(section, "beta_fast", 32.0),
            magnitude=_positive(section, "attention_factor", default_magnitude),
            truncate=bool(section.get("truncate", True)),
        )

    def frequencies(self, head_dim: int) -> Tensor:
        """`[head_dim / 2]` radians per position, float32."""
        import torch

        powers = self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if self.scaling == "default":
            return 1.0 / powers
        kept = self._kept(1.0 / powers, head_dim)
        return kept / powers + (1.0 - kept) / (self.factor * powers)

    def _kept(self, frequencies: Tensor, head_dim: int) -> Tensor:
        """The share of each frequency that is kept, 0 to 1; the rest is divided by the factor."""
        import torch

        if self.scaling == "linear":
            return torch.zeros_like(frequencies)
        if self.scaling == "llama3":
            turns = self.original_positions * frequencies / (2 * math.pi)
            return ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0)

        def dimension(turns: float) -> float:
            period = self.original_positions / (turns * 2 * math.pi)
            return head_dim * math.log(period) / (2 * math.log(self.theta))

        first, last = dimension(self.high), dimension(self.low)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        dimensions = torch.arange(head_dim // 2, dtype=torch.float32)
        ramp = (dimensions - first) / ((last - first) or 0.001)
        return 1.0 - ramp.clamp(0.0, 1.0)

    def tables(self, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[num_positions, 1, head_dim]`, float32.

        The first half of the sines is negated.
        """
        import torch

        positions = torch.arange(num_positions, dtype=torch.float32)
        angles = torch.outer(positions, self.frequencies(head_dim)).repeat(1, 2)[:, None, :]
        signs = torch.ones(head_dim).index_fill(0, torch.arange(head_dim // 2), -1.0)
        return angles.cos() * self.magnitude, angles.sin() * signs * self.magnitude


def _positive(section: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if section.get(key) is None else section[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or not is_number or not 0 < value < math.inf:
        given = "missing" if value is None else repr(value)
        raise ValueError(f"{key} ({given}) must be a positive number; {REMEDY}")
    return float(value)


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = values.get(key) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{key} ({section!r}) must be an object; {REMEDY}")
    return section
