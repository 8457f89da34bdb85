"""The recommendation of `dapo-async plan` as one HTML file that needs no network.

In: a `Plan`. Out: the file with the split, its reason, the frontier of the tried splits, the
histogram of the staleness, a strip of both sides over time, and tables. `cli/plan.py` calls it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from dapo_async.planner.closed_forms import closed_forms, differences
from dapo_async.planner.screens import idle, idle_learner, overrides, price, reason
from dapo_async.planner.sweep import Candidate, Plan
from dapo_async.tracking.charts import (
    FAINT,
    INK,
    SERIES,
    project_style,
    svg_figure,
    to_svg,
)
from dapo_async.tracking.report_page import page, table, text, tiles
from dapo_async.utils.files import atomic_write

STRIP_STEPS = 10  # of the strip
WIDTH, HEIGHT, STRIP_HEIGHT = 420.0, 230.0, 130.0  # of a chart, in points
MARGINS = {"left": 56.0, "right": 10.0, "top": 8.0, "bottom": 34.0}


def check_html_name(out: Path) -> None:
    """Raises ValueError unless the name ends with .html, before anything is simulated."""
    if out.suffix not in (".html", ".htm"):
        raise ValueError(
            f"--html {out} must end with .html, so that no other file is overwritten; give such a "
            "name"
        )


def write_plan_page(plan: Plan, out: Path) -> None:
    """Writes the page. Raises ValueError if the file can't be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, page("Plan of a cluster", _sections(plan)))
    except OSError as error:
        raise ValueError(
            f"--html {out} can't be written: {error.strerror}; give another"
        ) from error


def _sections(plan: Plan) -> Iterator[str]:
    best = plan.best
    yield f'<p class="verdict">{text(_verdict(plan))}</p>'
    yield tiles(_facts(plan))
    figures = (
        ("Frontier", _frontier(plan), "each split that was tried: speed against staleness"),
        ("Staleness", _histogram(best), "trained groups by the staleness of their oldest token"),
        ("Both sides over time", _strip(best), "the learner's steps and waits, and the publishes"),
    )
    yield '<div class="charts">'
    for title, svg, caption in figures:
        drawn = svg.replace("<svg ", '<svg class="plot" ', 1)
        yield (
            f"<figure><h3>{text(title)}</h3>{drawn}<figcaption>{text(caption)}</figcaption></figure>"
        )
    yield "</div><h2>Splits</h2>"
    yield _candidates(plan)
    yield "<h2>Closed forms beside the simulation</h2>"
    yield from _on_paper(best)
    yield "<h2>If an assumption is wrong</h2>"
    rows = [
        (text(name), text(ratio) if isinstance(ratio, str) else f"{ratio:.2f}")
        for name, ratio in plan.sensitivity.items()
    ]
    yield table(("what changes", "times the step time"), rows)
    yield "<h2>Overrides for dapo-async train</h2>"
    yield f"<pre>{text(' '.join(overrides(plan)))}</pre>"


def _verdict(plan: Plan) -> str:
    best = plan.best
    shape, scenario = best.shape, best.scenario
    pays = "" if plan.pays else " Asynchrony does not pay here: it saves less than 5 % of a step."
    why = reason(best)
    return (
        f"{best.engine_gpus} GPUs generate with {scenario.num_engines} engines of "
        f"{shape.engine_gpus}, {best.learner_gpus} train. {why[0].upper()}{why[1:]}.{pays}"
    )


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    best, outcome = plan.best, plan.best.outcome
    yield "step", f"{outcome.step_s:.4g} s"
    yield "trained tokens/s", f"{outcome.trained_tokens_per_s:,.0f}{price(plan, best)}"
    yield "staleness", f"{outcome.staleness:.2f} (bound {best.scenario.max_staleness})"
    yield "idle learner", f"{idle_learner(outcome):.0%}"
    yield "idle slots", f"{idle(outcome):.0%}"
    for name, way in (("split", plan.synchronous), ("all GPUs in turns", plan.colocated)):
        yield f"synchronous, {name}", f"{way.step_s / best.step_s:.2f} times as long"


def _frontier(plan: Plan) -> str:
    """Trained tokens/s over the staleness; a colour per number of learner GPUs."""
    with project_style():
        figure, axes = svg_figure(WIDTH, HEIGHT, MARGINS)
        shown = [*plan.tried, *plan.candidates]
        splits = sorted({(each.shape.gpus, each.learner_gpus) for each in shown})
        for place, (gpus, learner) in enumerate(splits):
            of_split = [
                each for each in shown if (each.shape.gpus, each.learner_gpus) == (gpus, learner)
            ]
            axes.plot(
                [each.outcome.staleness for each in of_split],
                [each.scenario.groups_per_step / each.step_s * _tokens(each) for each in of_split],
                linestyle="",
                marker="o",
                markersize=4,
                color=SERIES[place % len(SERIES)],
                label=f"{learner} of {gpus} GPUs train",
            )
        axes.plot(
            [plan.best.outcome.staleness],
            [plan.best.scenario.groups_per_step / plan.best.step_s * _tokens(plan.best)],
            linestyle="",
            marker="o",
            markersize=10,
            markerfacecolor="none",
            color=INK,
            label="chosen",
        )
        axes.set_xlabel("mean staleness of trained tokens")
        axes.set_ylabel("trained tokens/s")
        axes.legend(fontsize=7)
        return to_svg(figure)


def _tokens(candidate: Candidate) -> float:
    """Response tokens of a group. A smaller fleet trains fewer groups in the same time."""
    return candidate.scenario.group_size * candidate.scenario.mean_tokens


def _histogram(best: Candidate) -> str:
    histogram = best.outcome.histogram
    groups = sum(histogram.values())
    with project_style():
        figure, axes = svg_figure(WIDTH, HEIGHT, MARGINS)
        axes.bar(list(histogram), [count / groups for count in histogram.values()], color=SERIES[0])
        axes.set_xticks(range(best.scenario.max_staleness + 1))
        axes.set_xlabel("staleness, versions")
        axes.set_ylabel("share of the groups")
        return to_svg(figure)


def _strip(best: Candidate) -> str:
    """Three lines: the learner trains or waits, publishes, and the occupied slots as a curve."""
    first = best.scenario.warm_up_steps
    rows = best.outcome.rows[first : first + STRIP_STEPS]
    begin_s, end_s = rows[0].begin_s, rows[-1].end_s
    with project_style():
        figure, axes = svg_figure(WIDTH, STRIP_HEIGHT, MARGINS)
        waits = [
            (before.end_s - begin_s, after.begin_s - before.end_s)
            for before, after in pairwise(rows)
        ]
        trains = [(row.begin_s - begin_s, row.end_s - row.begin_s) for row in rows]
        publishes = [
            (start_s - begin_s, stop_s - start_s)
            for start_s, stop_s in best.outcome.publishes
            if begin_s <= start_s <= end_s
        ]
        for number, (place, bars, colour) in enumerate(
            ((2, trains, SERIES[0]), (2, waits, FAINT), (1, publishes, SERIES[1]))
        ):
            height = 0.3 if number == 1 else 0.7
            axes.broken_barh(bars, (place - height / 2, height), facecolors=colour)
        times = [row.end_s - begin_s for row in rows]
        axes.fill_between(
            times, -0.35, [0.7 * row.occupied - 0.35 for row in rows], color=SERIES[2], alpha=0.6
        )
        axes.set_yticks([2, 1, 0], ["learner", "publish", "slots"])
        axes.set_ylim(-0.5, 2.6)
        axes.set_xlabel(f"seconds; {len(rows)} steps")
        return to_svg(figure)


def _candidates(plan: Plan) -> str:
    head = (
        "learner GPUs (cp x tp)", "engine GPUs (each)", "slots", "bound", "update", "step",
        "staleness", "idle learner", "idle slots", "GPU s per 1,000 tokens",
    )  # fmt: skip
    return table(head, (_cells(each) for each in plan.candidates))


def _cells(each: Candidate) -> Sequence[str]:
    shape, outcome = each.shape, each.outcome
    return (
        f"{each.learner_gpus} ({shape.context_parallel} x {shape.tensor_parallel})",
        f"{each.engine_gpus} ({shape.engine_gpus})",
        str(shape.slots),
        str(each.scenario.max_staleness),
        text(each.scenario.weight_update),
        f"{each.step_s:.4g} s",
        f"{outcome.staleness:.2f}",
        f"{idle_learner(outcome):.0%}",
        f"{idle(outcome):.0%}",
        f"{1000 * each.gpu_s_per_token:.3g}",
    )


def _on_paper(best: Candidate) -> Iterator[str]:
    forms, outcome = closed_forms(best.scenario), best.outcome
    paper = "–" if forms.group_staleness is None else f"{forms.group_staleness:.2f}"
    rows = [
        ("step", f"{forms.step_s:.4g} s", f"{outcome.step_s:.4g} s"),
        (
            "trained tokens/s",
            f"{forms.tokens_per_s:,.0f}",
            f"{outcome.trained_tokens_per_s:,.0f}",
        ),
        ("staleness per group", paper, f"{outcome.group_staleness:.2f}"),
    ]
    yield table(("", "closed form", "simulated"), rows)
    for line in differences(best.scenario, forms, outcome):
        yield f'<p class="note">differs: {text(line)}</p>'
