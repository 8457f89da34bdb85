"""What a benchmark has measured: figures with their repetitions, in rows, in one result.

The subjects make rows; `table` and `compare` read them; `BenchResult.to_json` is the format that
docs/benchmarking.md describes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

FORMAT = 1  # of the JSON file
# The end of a figure's name gives its unit, and whether a higher or a lower value is better.
HIGHER_ENDINGS = ("_per_s", "capacity_tokens", "mfu", "mbu")
LOWER_ENDINGS = ("_s", "_bytes")


@dataclass(frozen=True, slots=True)
class Spread:
    """All repetitions of one figure, without those of the warm-up."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The first quartile: a quarter of the values is at most this."""
        return self._quartile(0)

    @property
    def high(self) -> float:
        """The third quartile."""
        return self._quartile(2)

    def _quartile(self, place: int) -> float:
        if len(self.values) == 1:
            return self.values[0]
        return statistics.quantiles(self.values, n=4, method="inclusive")[place]

    def to_json(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "low": self.low,
            "high": self.high,
            "values": list(self.values),
        }


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One cell of the sweep: what was measured, and its figures by name."""

    what: Mapping[str, str | int | float]
    figures: Mapping[str, Spread]
    failed: str = ""  # why there is no figure

    @property
    def key(self) -> str:
        """Equal for rows of two results that measured the same cell."""
        return json.dumps(dict(self.what), sort_keys=True)


@dataclass(slots=True)
class BenchResult:
    """One run of the command. `rows` grows while it measures."""

    subject: str
    about: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: list[BenchRow] = field(default_factory=list)
    complete: bool = False  # False: it was interrupted

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "subject": self.subject,
            "complete": self.complete,
            **self.about,
            "settings": dict(self.settings),
            "rows": [
                {
                    "what": dict(row.what),
                    "figures": {name: each.to_json() for name, each in row.figures.items()},
                    **({"failed": row.failed} if row.failed else {}),
                }
                for row in self.rows
            ],
        }

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `to_json` gave. Raises ValueError for a file that is something else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [
                BenchRow(
                    row["what"],
                    {
                        name: Spread(tuple(map(float, each["values"])))
                        for name, each in row["figures"].items()
                    },
                    row.get("failed", ""),
                )
                for row in content["rows"]
            ]
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, not {FORMAT}")
            own = ("format", "subject", "complete", "settings", "rows")
            about = {name: value for name, value in content.items() if name not in own}
            return cls(content["subject"], about, content["settings"], rows, content["complete"])
        except OSError as error:
            raise ValueError(
                f"{path} can't be read: {error.strerror}; give a result of dapo-async bench --json"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no result of dapo-async bench ({error}); give a file that --json wrote"
            ) from error


def higher_is_better(name: str) -> bool | None:
    """None: the figure is neither good nor bad."""
    if name.endswith(HIGHER_ENDINGS):
        return True
    return False if name.endswith(LOWER_ENDINGS) else None


def spreads(figures: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """The figures of a row from their values."""
    return {name: Spread(tuple(values)) for name, values in figures.items() if values}
