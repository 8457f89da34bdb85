"""Draws traces with matplotlib: onto axes for `dynamics.png`, and as inline SVG for the report.

matplotlib is a dependency anyway, and its SVG holds plain text and paths. Measured alternatives: a
pygal chart of 2 × 500 points is 290 kB, so a report would have 5 MB; plotly puts a script of
4.8 MB into the page and draws when the page is opened; bokeh draws on a canvas, not in SVG. Colours
become CSS variables (light and dark), and a script of some 40 lines shows values under the pointer.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from dapo_async.tracking.panels import Points, Trace, has_lonely, mean_known
from dapo_async.tracking.report_reading import PassRates

if TYPE_CHECKING:  # importing matplotlib takes most of a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The light colours; report_page.py has the dark ones under the same names.
SERIES = (
    "#0b6bcb", "#d9660a", "#14855a", "#8250c4", "#bf3654",
    "#0d8a96", "#8c6a10", "#5b6b7f", "#c04aa8", "#5f8f1f",
)  # fmt: skip
INK, FAINT, GRID, HELD_OUT_COLOUR = "#1d2733", "#5c6876", "#dde2e8", "#bf3654"
NAMES = {colour: f"var(--s{number})" for number, colour in enumerate(SERIES)} | {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
}
DASHES = ("", "6 3", "1.5 2.5", "8 3 2 3", "12 3", "4 2 1 2 1 2")  # per curve, of several runs
HELD_OUT_DASH = "2 2"
FEW = 40  # up to so many points each has a marker
WIDTH, HEIGHT = 340.0, 190.0  # of a chart, in points
MARGINS = {"left": 42.0, "right": 8.0, "top": 6.0, "bottom": 30.0}
MAX_TICKS = 12
MAX_LINES = 256  # of a heat map

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 6),
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in the name of a run stays one
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "dapo-async",
}


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of the report: its SVG and what the pointer shows.

    `hover`: `x`, places in SVG units, ascending; `head`, a text per place; `rows`, per trace its
    name, colour and a text per place.
    """

    svg: str
    hover: dict[str, Any]


@contextmanager
def project_style() -> Iterator[None]:
    """The project's style for every matplotlib figure that is made and drawn within."""
    import matplotlib as mpl

    wait_for_import("IPython")
    settings: Any = STYLE  # the stubs want each key as a literal
    with mpl.rc_context(settings):
        yield


def wait_for_import(name: str) -> None:
    """Returns when no other thread is importing the module `name` any more.

    A matplotlib figure reads `sys.modules["IPython"].version_info`, and MLflow imports IPython in
    its own thread. A module is in `sys.modules` before it has its attributes.
    """
    if name in sys.modules:
        with suppress(ImportError):  # then the import has failed, and nothing is left to wait for
            importlib.import_module(name)  # waits for the lock of the module


def colour_of(trace: Trace, *, alone: bool) -> str:
    """One colour per run; where there is one run, a colour per curve."""
    if not alone:
        return SERIES[trace.run % len(SERIES)]
    return HELD_OUT_COLOUR if trace.held_out else SERIES[trace.curve % len(SERIES)]


def dash_of(trace: Trace, *, alone: bool) -> str:
    """SVG's stroke-dasharray; where there are several runs, a pattern per curve."""
    if trace.held_out:
        return HELD_OUT_DASH
    return "" if alone else DASHES[trace.curve % len(DASHES)]


def draw(axes: Axes, shown: Sequence[Trace], *, alone: bool) -> None:
    """Draws every trace, with the range of each block of steps behind its mean."""
    for trace in shown:
        points, colour = trace.points, colour_of(trace, alone=alone)
        dash = [float(part) for part in dash_of(trace, alone=alone).split()]
        marked = len(points.steps) <= FEW or has_lonely(points.values)
        (line,) = axes.plot(
            points.steps,
            points.values,
            color=colour,
            label=trace.label,
            linewidth=1.1 if trace.held_out else 1.5,
            linestyle=(0, dash) if dash else "-",
            marker="o" if marked or trace.held_out else None,
            markersize=3.6 if trace.held_out else 2.2,
            clip_on=False,
        )
        line.set_zorder(3 if trace.held_out else 2)
        if points.in_blocks:
            axes.fill_between(
                points.steps, points.low, points.high, color=colour, alpha=0.16, linewidth=0
            )
    axes.margins(x=0.02, y=0.08)


def chart(shown: Sequence[Trace], *, alone: bool) -> Chart:
    """The traces of one panel as SVG, without a legend."""
    with project_style():
        figure, axes = svg_figure(WIDTH, HEIGHT, MARGINS)
        draw(axes, shown, alone=alone)
        axes.set_xlabel("learner step")
        whole_steps(axes)
        svg = to_svg(figure)
        hover = _hover_of(axes, shown, alone=alone)
    return Chart(svg, hover)


def whole_steps(axes: Axes) -> None:
    """No tick between two steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _hover_of(axes: Axes, shown: Sequence[Trace], *, alone: bool) -> dict[str, Any]:
    """Values by step over all traces."""
    ends = {
        step: last
        for trace in shown
        for step, last in zip(trace.points.steps, trace.points.last_steps, strict=True)
    }
    steps = sorted(ends)
    places = axes.transData.transform([(step, 0.0) for step in steps])
    rows = []
    for trace in shown:
        texts = dict(zip(trace.points.steps, map(_value_text, *_parts(trace.points)), strict=True))
        name = trace.label if alone else f"{trace.run_name}: {trace.label}"
        colour = NAMES[colour_of(trace, alone=alone)]
        row = {"name": name, "colour": colour, "values": [texts.get(step, "") for step in steps]}
        rows.append(row)
    heads = [
        f"step {step:g}" if ends[step] == step else f"steps {step:g} to {ends[step]:g}"
        for step in steps
    ]
    return {"x": [round(float(place[0]), 1) for place in places], "head": heads, "rows": rows}


def _parts(points: Points) -> tuple[list[float], list[float], list[float]]:
    return points.values, points.low, points.high


def _value_text(value: float, low: float, high: float) -> str:
    """`0.5`, or `0.5 (0.2 to 0.9)` for the mean and range of a block of steps."""
    if math.isnan(value):
        return ""
    return f"{value:.4g}" + (f" ({low:.3g} to {high:.3g})" if low != high else "")


def pass_rate_chart(rates: PassRates, *, across: str) -> Chart | None:
    """Problems × evaluations as a heat map, hardest problem on top; None without problems."""
    if not rates.problems:
        return None
    import matplotlib as mpl

    lines, size = heat_lines(rates)
    count = len(rates.evaluations)
    with project_style():
        slanted = max(map(len, rates.evaluations)) > 8
        height = 60.0 + min(230.0, max(60.0, 2.0 * len(lines))) + (40.0 if slanted else 0.0)
        margins = {"left": 26.0, "right": 8.0, "top": 6.0, "bottom": 70.0 if slanted else 30.0}
        figure, axes = svg_figure(WIDTH, height, margins)
        colours = mpl.colormaps["YlGnBu"].with_extremes(bad="0.75")
        axes.imshow(lines, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap=colours)
        axes.grid(visible=False)
        ticks = list(range(0, count, -(-count // MAX_TICKS)))
        turned: dict[str, Any] = {"rotation": 25, "ha": "right"} if slanted else {}
        axes.set_xticks(ticks, [rates.evaluations[tick] for tick in ticks], **turned)
        axes.set_xlabel(across)
        per_line = f"; {size} per line" if size > 1 else ""
        axes.set_ylabel(f"{len(rates.problems)} problems, hardest on top{per_line}")
        axes.set_yticks([])
        svg = to_svg(figure)
        places = axes.transData.transform([(number, 0.0) for number in range(count)])
    means = [mean_known(column, without=math.nan) for column in zip(*rates.values, strict=True)]
    texts = ["" if math.isnan(mean) else f"{mean:.1%}" for mean in means]
    row = {"name": "mean pass rate", "colour": "var(--s0)", "values": texts}
    x = [round(float(place[0]), 1) for place in places]
    return Chart(svg, {"x": x, "head": rates.evaluations, "rows": [row]})


def heat_lines(rates: PassRates) -> tuple[list[list[float]], int]:
    """The problems by ascending mean pass rate, and how many problems share a line.

    Where there are more problems than lines can be drawn, a line has the mean of several.
    """
    ordered = sorted(rates.values, key=lambda values: mean_known(values, without=-1.0))
    size = -(-len(ordered) // MAX_LINES)
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    lines = [
        [mean_known(column, without=math.nan) for column in zip(*group, strict=True)]
        for group in groups
    ]
    return lines, size


def legend(shown: Sequence[Trace], *, alone: bool) -> list[tuple[str, str, str, bool]]:
    """Entries of a legend: name, colour (CSS), dashes, whether it has markers.

    One run: an entry per curve. Several runs: an entry per run in its colour, then one per curve
    in its dashes. A single entry says nothing and is left out.
    """
    labels = {trace.label: trace for trace in shown}
    if alone:
        entries = [
            (name, NAMES[colour_of(trace, alone=True)], dash_of(trace, alone=True), trace.held_out)
            for name, trace in labels.items()
        ]
        return entries if len(entries) > 1 else []
    runs = {trace.run: trace for trace in shown}
    entries = [
        (trace.run_name, NAMES[colour_of(trace, alone=False)], "", False) for trace in runs.values()
    ]
    if len(labels) > 1:
        entries += [
            (name, "var(--faint)", dash_of(trace, alone=False), trace.held_out)
            for name, trace in labels.items()
        ]
    return entries


def svg_figure(width: float, height: float, margins: dict[str, float]) -> tuple[Figure, Axes]:
    """A figure of points at 72 dpi, so that its coordinates are those of the SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.subplots_adjust(
        left=margins["left"] / width,
        right=1 - margins["right"] / width,
        top=1 - margins["top"] / height,
        bottom=margins["bottom"] / height,
    )
    return figure, figure.subplots()


def to_svg(figure: Figure) -> str:
    """SVG to stand within HTML: no metadata, short numbers, colours as CSS variables."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>", "", text, flags=re.S
    )
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r' d="[^"]*"', lambda path: _shorter(path[0]), text)
    text = re.sub(r' (x|y)="[-\d.]+"', lambda place: _shorter(place[0]), text)
    for colour, name in NAMES.items():
        text = text.replace(colour, name)
    return re.sub(r">\s+<", "><", text)


def _shorter(text: str) -> str:
    """Numbers with one decimal, a path's lines joined."""
    text = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), text)
    return " " + " ".join(text.split())


def hover_json(hover: dict[str, Any]) -> str:
    """For a script element: no `<` can end it."""
    return json.dumps(hover, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def sample(colour: str, dash: str, *, marked: bool) -> str:
    """A short line for a legend, as SVG."""
    dot = f'<circle cx="11" cy="5" r="2.4" fill="{colour}"/>' if marked else ""
    dashes = f' stroke-dasharray="{escape(dash)}"' if dash else ""
    return (
        f'<svg class="sample" viewBox="0 0 22 10"><line x1="0" y1="5" x2="22" y2="5" '
        f'stroke="{colour}" stroke-width="2"{dashes}/>{dot}</svg>'
    )
