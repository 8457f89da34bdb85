"""Compares a result with an older one of the same subject.

A figure got worse when its median is worse by more than the tolerance and its quartiles do not
overlap with those of the older result: noise alone rarely does both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dapo_async.bench.figures import BenchResult, BenchRow, Spread, higher_is_better
from dapo_async.bench.session import Cell
from dapo_async.bench.table import aligned, value_text, what_text


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """One figure that both results have."""

    row: BenchRow
    name: str
    before: Spread
    now: Spread
    verdict: str  # "worse", "better" or ""

    @property
    def ratio(self) -> float:
        """Now over before."""
        return self.now.median / self.before.median if self.before.median else float("nan")


def check_comparable(old: BenchResult, subject: str, cells: Sequence[Cell]) -> None:
    """Raises ValueError when no row could be compared, before anything is measured."""
    if old.subject != subject:
        raise ValueError(
            f"--compare has a result of bench {old.subject}, but this is bench {subject}; "
            "give a result of the same subject"
        )
    if not {BenchRow(cell, {}).key for cell in cells} & {row.key for row in old.rows}:
        raise ValueError(
            "--compare has no row that this command measures; give a result with the same sweep"
        )


def compare(old: BenchResult, new: BenchResult, *, tolerance: float) -> list[ComparedFigure]:
    """Every figure of the rows that both have, in the order of `new`."""
    before = {row.key: row for row in old.rows}
    return [
        ComparedFigure(row, name, earlier, now, _verdict(name, earlier, now, tolerance))
        for row in new.rows
        if row.key in before
        for name, now in row.figures.items()
        if (earlier := before[row.key].figures.get(name)) is not None
    ]


def differences(old: BenchResult, new: BenchResult) -> str:
    """One line when the two results can't show a change of the code alone; else empty."""
    names = {"device": "device", "config_sha256": "config", "versions": "versions"}
    found = [
        word
        for key, word in names.items()
        if old.about.get(key) != new.about.get(key)
        and (key != "versions" or _libraries(old) != _libraries(new))
    ]
    found += ["settings"] if old.settings != new.settings else []
    if not found:
        return ""
    parts = []
    for word in found:
        if word == "device":
            parts.append(f"device (then {_device(old)}, now {_device(new)})")
        else:
            parts.append(word)
    return f"the results differ in {', '.join(parts)}: the ratios compare more than the code"


def lines(compared: Sequence[ComparedFigure], missing: int) -> Iterator[str]:
    """A table of the ratios. `missing`: rows of the older result that were not measured now."""
    table = [["", "figure", "before", "now", "ratio", ""]]
    table += [
        [
            what_text(each.row.what),
            each.name,
            value_text(each.name, each.before.median),
            value_text(each.name, each.now.median),
            f"{each.ratio:.3f}",
            each.verdict,
        ]
        for each in compared
    ]
    yield from aligned(table)
    if missing:
        yield f"{missing} rows of the older result were not measured now"


def _verdict(name: str, before: Spread, now: Spread, tolerance: float) -> str:
    higher = higher_is_better(name)
    if higher is None:
        return ""
    if _is_larger(now, before, tolerance):
        return "better" if higher else "worse"
    if _is_larger(before, now, tolerance):
        return "worse" if higher else "better"
    return ""


def _is_larger(one: Spread, other: Spread, tolerance: float) -> bool:
    """By more than the tolerance, and beyond the spread of both."""
    return one.median > other.median * (1 + tolerance) and one.low > other.high


def _libraries(result: BenchResult) -> dict[str, str]:
    versions = dict(result.about.get("versions", {}))
    versions.pop("dapo_async", None)
    return versions


def _device(result: BenchResult) -> str:
    device = result.about.get("device", {})
    name = device.get("gpu") or device.get("cpu") or "unknown"
    return f"{name}, {device.get('cores', '?')} cores, {device.get('threads', '?')} threads"
