"""The charts of the report: records in, figures and PNG bytes out (L3). Called by `report.py`.

Several runs share each chart: a colour per run, a line style per curve. A number that is missing is a gap.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dapo_async.tracking.report_reading import PassRates, RunRecord

if TYPE_CHECKING:  # it costs most of a second: only when something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
FEW = 40  # points that are each marked
LINE_STYLES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
REJECTED = "rejected."
MOST_TICKS = 16
MOST_LINES = 256  # of a heat map: two pixels each


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: columns of metrics.jsonl, and the column of evaluations.jsonl that belongs beside them."""

    title: str
    columns: tuple[str, ...]
    line: str  # what it says
    evaluated: str | None = None


PANELS = (
    Panel(
        "Accuracy",
        ("accuracy",),
        "Of the trained groups, which dynamic sampling keeps near one half, and held out, greedy.",
        "accuracy",
    ),
    Panel("Reward", ("reward",), "Mean shaped reward of the trained rollouts."),
    Panel(
        "Response length (tokens)",
        ("response_tokens",),
        "Mean over the trained rollouts, and held out.",
        "mean_response_tokens",
    ),
    Panel(
        "Truncated responses (share)",
        ("truncated",),
        "Cut at rollout.max_response_tokens.",
        "truncated",
    ),
    Panel(
        "Entropy (nats)",
        ("entropy",),
        "Mean over the tokens in the loss; near 0 nothing is tried any more.",
    ),
    Panel(
        "Mean probability of the chosen tokens",
        ("probability",),
        "What the learner gives to the tokens that were sampled.",
    ),
    Panel(
        "Clip fractions (share of tokens)",
        ("clip_low_fraction", "clip_high_fraction", "dual_clip_fraction"),
        "Tokens that a clip silences.",
    ),
    Panel(
        "Staleness (versions)",
        ("staleness", "group_staleness_max"),
        "Mean over the tokens, and the largest of any group: what law 1 bounds.",
    ),
    Panel(
        "Rejected groups (per step)",
        (REJECTED,),
        "By reason: all_correct has nothing left to learn, all_wrong nothing to learn from.",
    ),
    Panel("Acceptance (share of groups)", ("acceptance",), "Of the groups that the filters saw."),
    Panel(
        "Idle shares",
        ("idle.learner", "idle.rollout"),
        "Of the learner's time and of the engines' slots.",
    ),
    Panel(
        "Idle slots by cause (share)",
        ("idle.rollout.no_credit", "idle.rollout.tail", "idle.rollout.sync"),
        "No credit: the learner is behind; tail: the last siblings run; sync: weights are swapped.",
    ),
    Panel("Seconds per step", ("step_s",), "From the end of the step before, waiting included."),
    Panel("Throughput (trained tokens/s)", ("tokens_per_s",), "Tokens of a step over its seconds."),
    Panel("Gradient norm", ("grad_norm",), "Before clipping, mean over the updates of a step."),
    Panel(
        "KL of behaviour and proximal policy (nats)",
        ("behaviour_kl_k3", "mismatch_k3"),
        "What staleness, and rounding alone, make of it.",
    ),
    Panel(
        "Effective sample size (share)",
        ("behaviour_ess", "behaviour_weight_ess"),
        "Of the importance ratios before and after the correction.",
    ),
)


@contextmanager
def _literal_text() -> Iterator[None]:
    """A dollar sign in the name of a run is one, and begins no formula."""
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False}):
        yield


@_literal_text()
def draw_panel(panel: Panel, runs: Sequence[RunRecord]) -> Figure | None:
    """None where no run has any number for it."""
    panel = _spelt_out(panel, runs)
    shown = [
        column for column in panel.columns if any(column in row for run in runs for row in run.rows)
    ]
    held_out = panel.evaluated is not None and any(
        panel.evaluated in row for run in runs for row in run.evaluations
    )
    if not shown and not held_out:
        return None
    figure, axes = _figure(6.4, 3.3)
    colours = run_colours(len(runs))
    for number, run in enumerate(runs):
        for place, column in enumerate(shown):
            alone = len(runs) == 1
            style: dict[str, Any] = {
                "color": f"C{place}" if alone else colours[number],
                "linestyle": "-" if alone else LINE_STYLES[place % len(LINE_STYLES)],
            }
            steps, values = series(run.rows, column)
            marker = "." if len(steps) <= FEW or has_lonely(values) else None
            axes.plot(steps, values, linewidth=1.5, marker=marker, markersize=4, **style)
        if held_out:
            assert panel.evaluated is not None
            points = [
                (row["version"], row[panel.evaluated])
                for row in run.evaluations
                if panel.evaluated in row
            ]
            colour = colours[number] if len(runs) > 1 else "C3"
            axes.plot(
                *(zip(*points, strict=True) if points else ((), ())),
                color=colour,
                marker="o",
                markersize=4.5,
                linestyle=":",
                linewidth=1,
            )
    axes.set_xlabel("learner step")
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    _legend(axes, [run.name for run in runs], shown, held_out=held_out)
    return figure


@_literal_text()
def draw_pass_rates(rates: PassRates, *, across: str) -> Figure | None:
    """Problems × evaluations as a heat map, the hardest problems on top; None where nothing was measured."""
    if not rates.problems:
        return None
    import matplotlib as mpl

    lines, size = heat_lines(rates)
    figure, axes = _figure(
        max(6.4, min(13.0, 2.5 + 0.4 * len(rates.evaluations))), min(6.0, 1.8 + 0.05 * len(lines))
    )
    colours = mpl.colormaps["YlGnBu"].with_extremes(bad="0.75")
    image = axes.imshow(lines, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap=colours)
    every = -(-len(rates.evaluations) // MOST_TICKS)
    ticks = range(0, len(rates.evaluations), every)
    labels = [rates.evaluations[tick] for tick in ticks]
    slanted: dict[str, Any] = {"rotation": 25, "ha": "right"} if max(map(len, labels)) > 8 else {}
    axes.set_xticks(list(ticks), labels, **slanted)
    axes.set_xlabel(across)
    axes.set_ylabel(
        f"{len(rates.problems)} problems, hardest on top"
        + (f"; {size} per line" if size > 1 else "")
    )
    axes.set_yticks([])
    figure.colorbar(image, label="pass rate")
    return figure


def heat_lines(rates: PassRates) -> tuple[list[list[float]], int]:
    """The problems by their mean pass rate, ascending, and how many share a line where there are more than can be drawn: then each shows a mean."""
    ordered = sorted(rates.values, key=lambda values: mean_known(values, without=-1.0))
    size = -(-len(ordered) // MOST_LINES)
    blocks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [
        [mean_known(column, without=math.nan) for column in zip(*block, strict=True)]
        for block in blocks
    ], size


def mean_known(values: Iterable[float], *, without: float) -> float:
    """Mean of those that are not nan; `without` where all are."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else without


def run_colours(count: int) -> list[str]:
    """As hex, one per run; they repeat from the 21st on."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    palette = mpl.colormaps["tab10" if count <= 10 else "tab20"]
    return [to_hex(palette(number % palette.N)) for number in range(count)]


def series(rows: Sequence[Mapping[str, float]], column: str) -> tuple[list[float], list[float]]:
    """Steps and values of one curve; where steps or numbers are missing stands a nan, which is drawn as a gap."""
    steps, values = list[float](), list[float]()
    for row in rows:
        # A reason that did not occur has no column: where the filters saw groups, that is none rejected for it.
        missing = 0.0 if column.startswith(REJECTED) and "offered" in row else math.nan
        if steps and row["step"] > steps[-1] + 1:
            steps.append(steps[-1] + 1)
            values.append(math.nan)
        steps.append(row["step"])
        values.append(row.get(column, missing))
    return steps, values


def has_lonely(values: Sequence[float]) -> bool:
    """Whether a value stands between gaps: no line leads to it, so that only a mark can be seen."""
    known = [False, *(not math.isnan(value) for value in values), False]
    return any(
        here and not before and not after
        for before, here, after in zip(known, known[1:], known[2:], strict=False)
    )


def _spelt_out(panel: Panel, runs: Sequence[RunRecord]) -> Panel:
    """With the reasons that occurred."""
    if panel.columns != (REJECTED,):
        return panel
    return replace(
        panel,
        columns=tuple(
            sorted(
                {
                    name
                    for run in runs
                    for row in run.rows
                    for name in row
                    if name.startswith(REJECTED)
                }
            )
        ),
    )


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Not through pyplot, which keeps every figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _legend(axes: Axes, runs: Sequence[str], columns: Sequence[str], *, held_out: bool) -> None:
    from matplotlib.lines import Line2D

    entries: list[tuple[Any, str]] = []
    if len(runs) > 1:
        entries += [
            (Line2D([], [], color=colour), name)
            for colour, name in zip(run_colours(len(runs)), runs, strict=True)
        ]
    if len(columns) > 1 or (columns and held_out):
        for place, column in enumerate(columns):
            style: dict[str, Any] = (
                {"color": f"C{place}"}
                if len(runs) == 1
                else {"color": "0.3", "linestyle": LINE_STYLES[place % len(LINE_STYLES)]}
            )
            entries.append(
                (
                    Line2D([], [], **style),
                    column.removeprefix(REJECTED) if not held_out else "trained",
                )
            )
    if held_out:
        entries.append(
            (
                Line2D(
                    [],
                    [],
                    color="C3" if len(runs) == 1 else "0.3",
                    marker="o",
                    linestyle=":",
                    markersize=4.5,
                ),
                "held out",
            )
        )
    if entries:
        handles, labels = zip(*entries, strict=True)
        axes.legend(handles, labels, fontsize=8, framealpha=0.7)


def to_png(figure: Figure) -> bytes:
    """The file's bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()
