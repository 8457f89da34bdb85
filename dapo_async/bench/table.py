"""Rows of figures as lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dapo_async.bench.figures import BenchRow, Spread

LARGE = 1000.0  # from here on numbers are shown without decimals


def tables(rows: Sequence[BenchRow]) -> Iterator[str]:
    """One table for all rows that have the same columns; median, and the quartiles in brackets."""
    groups: dict[tuple[str, ...], list[BenchRow]] = {}
    for row in rows:
        kind = str(row.what.get("kind", ""))
        groups.setdefault((kind, *row.what, *row.figures), []).append(row)
    for alike in groups.values():
        first = alike[0]
        names = [name for name in first.what if name != "kind"]
        header = [str(first.what.get("kind", "")), *names, *map(_title, first.figures)]
        lines = [
            [
                "",
                *(str(row.what[name]) for name in names),
                *(_cell(name, each) for name, each in row.figures.items()),
                *([row.failed] if row.failed else []),
            ]
            for row in alike
        ]
        yield ""
        yield from aligned([header, *lines])


def aligned(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of equal width, the numbers to the right."""
    num_columns = max(map(len, lines))
    padded = [[*line, *[""] * (num_columns - len(line))] for line in lines]
    widths = [max(len(line[place]) for line in padded) for place in range(num_columns)]
    for first, *others in padded:
        cells = [f"{first:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join(cells).rstrip()


def what_text(what: Mapping[str, object]) -> str:
    """`{"kind": "decode", "running": 8}` as `decode running 8`."""
    return " ".join(
        str(value) if name == "kind" else f"{name} {value}" for name, value in what.items()
    )


def figure_text(name: str, spread: Spread) -> str:
    """`step 5.1 ms`."""
    return f"{_title(name)} {value_text(name, spread.median)}"


def value_text(name: str, value: float) -> str:
    """A value with the unit that the name of its figure ends with."""
    if name.endswith("_per_s"):
        return f"{_number(value)}/s"
    if name.endswith("_s"):
        return f"{_number(value)} s" if value >= 1 else f"{_number(1000 * value)} ms"
    if name.endswith("_bytes"):
        for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
            if value >= size:
                return f"{value / size:,.1f} {unit}"
        return f"{value / 2**10:,.1f} KiB"
    return _number(value)


def _title(name: str) -> str:
    for ending in ("_per_s", "_s", "_bytes"):
        if name.endswith(ending):
            return name.removesuffix(ending).replace("_", " ")
    return name.replace("_", " ")


def _cell(name: str, spread: Spread) -> str:
    if len(spread.values) == 1:
        return value_text(name, spread.median)
    low, high = value_text(name, spread.low), value_text(name, spread.high)
    return f"{value_text(name, spread.median)} ({low} - {high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= LARGE else f"{value:.3g}"
