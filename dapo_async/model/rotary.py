"""Rotary position embeddings of the supported families, with the scalings that their configs name: numbers in, tables of cosines and sines out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Scaling = Literal["default", "linear", "llama3", "yarn"]
FIX = "copy the config.json of the base model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Frequencies θ^(-2i/d), scaled for contexts `factor` times as long as `original_positions`.

    - `linear`: all divided by the factor (2306.15595).
    - `llama3`: those that turn fewer than `low` times over the original context divided, more than `high` times kept, in between interpolated.
    - `yarn` (2309.00071): the same between `low` and `high` turns, linearly in the dimension; cosines and sines times `magnitude`.
    """

    theta: float
    scaling: Scaling = "default"
    factor: float = 1.0
    original_positions: float = 0.0
    low: float = 0.0
    high: float = 0.0
    magnitude: float = 1.0
    truncate: bool = True  # yarn: the two dimensions of its ramp are whole numbers

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rope:
        """From a `config.json` of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`). Raises ValueError in one line."""
        section = {**_section(values, "rope_scaling"), **_section(values, "rope_parameters")}
        scaling: Any = section.get("rope_type") or section.get("type") or "default"
        if scaling not in get_args(Scaling):
            raise ValueError(
                f"rope scaling {scaling!r} is not supported; supported are {', '.join(get_args(Scaling))}"
            )

        def number(key: str, default: float | None = None) -> float:
            value = default if section.get(key) is None else section[key]
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 < value < math.inf
            ):
                raise ValueError(
                    f"{key} ({'missing' if value is None else repr(value)}) must be a positive number; {FIX}"
                )
            return float(value)

        if (
            partial := section.get("partial_rotary_factor")
            or values.get("partial_rotary_factor")
            or 1.0
        ) != 1.0:
            raise ValueError(
                f"partial_rotary_factor ({partial}) is not supported; use a model whose heads are rotated whole"
            )
        theta = number("rope_theta", values.get("rope_theta") or 10_000.0)
        if scaling == "default":
            return cls(theta=theta)
        factor = number("factor")
        if scaling == "linear":
            return cls(theta=theta, scaling=scaling, factor=factor)
        original = number("original_max_position_embeddings", values.get("max_position_embeddings"))
        if scaling == "llama3":
            low, high = number("low_freq_factor"), number("high_freq_factor")
            if not low < high:
                raise ValueError(
                    f"low_freq_factor ({low:g}) must be below high_freq_factor ({high:g}); {FIX}"
                )
            return cls(
                theta=theta,
                scaling=scaling,
                factor=factor,
                original_positions=original,
                low=low,
                high=high,
            )
        if section.get("mscale") or section.get("mscale_all_dim"):
            raise ValueError(
                f"yarn with mscale is not supported: none of the supported families has it; {FIX}"
            )
        return cls(
            theta=theta,
            scaling=scaling,
            factor=factor,
            original_positions=original,
            low=number("beta_slow", 1.0),
            high=number("beta_fast", 32.0),
            magnitude=number(
                "attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
            ),
            truncate=bool(section.get("truncate", True)),
        )

    def frequencies(self, head_dim: int) -> Tensor:
        """`[head_dim / 2]` radians per position, float32."""
        powers = self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if self.scaling == "default":
            return 1.0 / powers
        kept = self._kept(1.0 / powers, head_dim)
        return kept / powers + (1.0 - kept) / (self.factor * powers)

    def _kept(self, frequencies: Tensor, head_dim: int) -> Tensor:
        """How much of each frequency stays as it is, 0 to 1; the rest of it is divided by the factor."""
        if self.scaling == "linear":
            return torch.zeros_like(frequencies)
        if self.scaling == "llama3":
            turns = self.original_positions * frequencies / (2 * math.pi)
            return ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0)

        def dimension(turns: float) -> float:
            return (
                head_dim
                * math.log(self.original_positions / (turns * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        first, last = dimension(self.high), dimension(self.low)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - first) / (
            (last - first) or 0.001
        )
        return 1.0 - ramp.clamp(0.0, 1.0)

    def tables(self, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[num_positions, 1, head_dim]` in float32, the sines of the first half negated."""
        angles = torch.outer(
            torch.arange(num_positions, dtype=torch.float32), self.frequencies(head_dim)
        ).repeat(1, 2)
        signs = torch.ones(head_dim).index_fill(0, torch.arange(head_dim // 2), -1.0)
        return (angles.cos() * self.magnitude)[:, None, :], (angles.sin() * signs * self.magnitude)[
            :, None, :
        ]


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = values.get(key) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{key} ({section!r}) must be an object; {FIX}")
    return section
