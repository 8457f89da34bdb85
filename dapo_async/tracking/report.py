"""The training dynamics of one or several runs, and results of `dapo-async eval`, as one HTML page that needs nothing else (L3).

    run directories ─▶ report_reading ─▶ records ─▶ report_charts: PNGs ─▶ report_page: one file, every picture and style within it

Called by the command line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from dapo_async.tracking.report_charts import (
    PANELS,
    draw_panel,
    draw_pass_rates,
    run_colours,
    to_png,
)
from dapo_async.tracking.report_page import (
    chart,
    details,
    figures,
    group,
    image,
    note,
    page,
    table,
    text,
)
from dapo_async.tracking.report_reading import (
    EvalRecord,
    PassRates,
    RunRecord,
    rates_of,
    read_evaluation,
    read_run,
)

MOST_LISTED = 100  # problems by row
TOTALS = ("avg@{k}", "pass@1", "pass@{k}", "maj@{k}")


def write_report(paths: Sequence[Path], *, out: Path, steps: Sequence[int] | None) -> list[str]:
    """Writes the page; returns what is missing or broken, a line each. `steps`: whose rollouts are shown; None: the first, middle and last ones.

    A path is a run directory or the result of an evaluation. Raises ValueError for anything else, and for an `out` that is no HTML file.
    """
    if out.suffix not in (".html", ".htm"):
        raise ValueError(
            f"--out {out} must end with .html, so that no other file is ever written over; give such a name"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out {out} can't be written: {error.strerror}; give another file"
        ) from error
    folders, files = (
        [path for path in paths if path.is_dir()],
        [path for path in paths if not path.is_dir()],
    )
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    evaluations = [read_evaluation(file) for file in files]
    shown = {run.name: _steps(run, steps) for run in runs}
    sections: list[str] = []
    if runs:
        sections += [
            *_overview(runs),
            *_charts(runs),
            *_solved(runs),
            *_rollouts(runs, shown),
            *_configs(runs),
        ]
    if evaluations:
        sections += _evaluations(evaluations)
    notes = [f"{run.name}: {line}" for run in runs for line in run.notes]
    title = "Training dynamics: " + ", ".join(run.name for run in runs) if runs else "Evaluations"
    try:
        partial = out.with_name(out.name + ".partial")
        partial.write_bytes(page(title, [*map(note, notes), *sections]))
        os.replace(partial, out)
    except OSError as error:
        raise ValueError(
            f"--out {out} can't be written: {error.strerror}; give another file"
        ) from error
    return notes


def _names(folders: Sequence[Path]) -> list[str]:
    """Short and different: the folder's own name, with a number in front where there are several."""
    names = [folder.resolve().name for folder in folders]
    return (
        names
        if len(names) == 1
        else [f"{number}: {name}" for number, name in enumerate(names, start=1)]
    )


def _steps(run: RunRecord, steps: Sequence[int] | None) -> list[int]:
    there = run.steps_with_rollouts
    if steps is None:
        return sorted({there[0], there[len(there) // 2], there[-1]}) if there else []
    run.notes += [f"no rollouts of step {step} were written" for step in steps if step not in there]
    return [step for step in steps if step in there]


def _overview(runs: Sequence[RunRecord]) -> Iterator[str]:
    head = (
        "run",
        "status",
        "steps",
        "tokens",
        "training",
        "held-out accuracy",
        "response length",
        "staleness",
        "idle",
        "groups",
    )
    rows = []
    for run, colour in zip(runs, run_colours(len(runs)), strict=True):
        summary = run.summary
        idle, staleness, groups = (_part(summary, name) for name in ("idle", "staleness", "groups"))
        rejected = ", ".join(
            f"{figures(count, '.0f')} {text(reason)}"
            for reason, count in _part(groups, "rejected").items()
            if count
        )
        rows.append(
            (
                f'<span class="chip" style="background:{colour}"></span>{text(run.name)}',
                f"{text(summary['status'])}: {text(summary.get('reason'))}"
                if "status" in summary
                else "no summary: it has not ended, or was killed",
                f"{len(run.rows)}",
                figures(summary.get("tokens"), ",.0f"),
                f"{figures(summary.get('train_s'), ',.0f')} s",
                f"{figures(summary.get('initial_accuracy'), '.3f')} → {figures(summary.get('final_accuracy'), '.3f')}",
                f"{figures(summary.get('initial_response_tokens'), '.1f')} → {figures(summary.get('final_response_tokens'), '.1f')}",
                f"{figures(staleness.get('mean'), '.2f')} (max {figures(staleness.get('max'), '.0f')})",
                f"learner {figures(idle.get('learner'), '.0%')}, rollout {figures(idle.get('rollout'), '.0%')}",
                f"{figures(groups.get('trained'), '.0f')} trained; rejected: {rejected or 'none'}",
            )
        )
    yield table(head, rows)


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = values.get(name)
    return part if isinstance(part, dict) else {}


def _charts(runs: Sequence[RunRecord]) -> Iterator[str]:
    yield "<h2>Over the learner steps</h2>"
    missing, charts = [], []
    for panel in PANELS:
        figure = draw_panel(panel, runs)
        if figure is None:
            missing.append(panel.title)
        else:
            charts.append(chart(to_png(figure), panel.title, panel.line))
    yield f'<div class="charts">{"".join(charts)}</div>'
    if missing:
        yield note(f"no numbers yet for: {', '.join(missing)}")


def _solved(runs: Sequence[RunRecord]) -> Iterator[str]:
    yield "<h2>Held-out problems over training</h2>"
    yield '<div class="charts">'
    for run in runs:
        figure = draw_pass_rates(
            run.pass_rates, across="weight version that was evaluated, greedily"
        )
        drawn = (
            image(to_png(figure), f"pass rate per problem of {run.name}")
            if figure
            else note("no evaluation has said which problems it solved")
        )
        yield f"<div><h3>{text(run.name)}</h3>{drawn}{_courses(run.pass_rates) if figure else ''}</div>"
    yield "</div>"


def _courses(rates: PassRates) -> str:
    """How many problems went which way between the first and the last evaluation."""
    named: dict[str, list[int]] = {
        "solved first and last": [],
        "learned": [],
        "forgotten": [],
        "solved only in between": [],
        "never solved": [],
    }
    for problem, values in zip(rates.problems, rates.values, strict=True):
        first, last, ever = values[0] == 1.0, values[-1] == 1.0, 1.0 in values
        course = (
            "solved first and last"
            if first and last
            else "learned"
            if last
            else "forgotten"
            if first
            else None
        )
        named[course or ("solved only in between" if ever else "never solved")].append(problem)
    rows = []
    for course, problems in named.items():
        listed = ", ".join(map(str, problems[:MOST_LISTED])) + (
            ", …" if len(problems) > MOST_LISTED else ""
        )
        rows.append(
            (
                text(course),
                str(len(problems)),
                details("rows of the data set", f"<p>{listed}</p>") if problems else "",
            )
        )
    return table(("from first to last", "problems", ""), rows)


def _rollouts(runs: Sequence[RunRecord], shown: Mapping[str, Sequence[int]]) -> Iterator[str]:
    yield "<h2>Rollouts</h2>"
    for run in runs:
        yield f"<h3>{text(run.name)}</h3>"
        if not shown[run.name]:
            yield note("none to show")
        for step in shown[run.name]:
            rows = run.rollouts(step)
            groups = [
                list(siblings)
                for _, siblings in groupby(rows, key=lambda row: str(row.get("group_id")))
            ]
            yield details(
                f"step {step}: {len(groups)} groups, {len(rows)} rollouts",
                "".join(map(group, groups)),
            )


def _configs(runs: Sequence[RunRecord]) -> Iterator[str]:
    yield "<h2>Configuration</h2>"
    if len(runs) > 1:
        knobs = [
            knob
            for knob in dict.fromkeys(name for run in runs for name in run.config)
            if knob != "run_dir"
        ]
        differing = [
            knob for knob in knobs if len({repr(run.config.get(knob)) for run in runs}) > 1
        ]
        rows = [(text(knob), *(text(run.config.get(knob)) for run in runs)) for knob in differing]
        yield (
            table(("knob", *(run.name for run in runs)), rows)
            if rows
            else "<p>The runs differ in no knob.</p>"
        )
    for run in runs:
        yield details(
            f"every knob of {text(run.name)}",
            table(
                ("knob", "value"), [(text(name), text(value)) for name, value in run.config.items()]
            ),
        )


def _evaluations(evaluations: Sequence[EvalRecord]) -> Iterator[str]:
    yield "<h2>Evaluations</h2>"
    rows = []
    for each in evaluations:
        k = each.settings.get("k")
        means = [_interval(each.totals.get(name.format(k=k))) for name in TOTALS]
        how = f"{text(each.settings.get('engine'))}, temperature {text(each.settings.get('temperature'))}, top-p {text(each.settings.get('top_p'))}"
        length, truncated = (
            figures(each.totals.get("mean_response_tokens"), ".1f"),
            figures(each.totals.get("truncated"), ".1%"),
        )
        rows.append(
            (
                text(each.name),
                text(k),
                *means,
                length,
                truncated,
                how,
                text(each.settings.get("checkpoint")),
            )
        )
    yield table(
        (
            "result",
            "k",
            "avg@k",
            "pass@1",
            "pass@k",
            "maj@k",
            "length",
            "truncated",
            "how",
            "checkpoint",
        ),
        rows,
    )
    yield '<p class="faint">In brackets: 95 % of the means of a bootstrap over the problems.</p>'
    for data, alike in groupby(sorted(evaluations, key=_data), key=_data):
        figure = draw_pass_rates(
            rates_of([each for each in evaluations if _data(each) == data]), across="result"
        )
        names = {str(each.settings.get("data")) for each in alike}
        if figure is not None:
            yield f"<h3>{text(', '.join(sorted(names)))}</h3>{image(to_png(figure), 'pass rate per problem of each result')}"


def _data(evaluation: EvalRecord) -> str:
    return str(evaluation.settings.get("problems_sha256"))


def _interval(estimate: Any) -> str:
    values = estimate if isinstance(estimate, dict) else {}
    if math.isnan(values.get("mean", math.nan)):
        return "–"
    return f"{figures(values['mean'], '.3f')} [{figures(values.get('low'), '.3f')}, {figures(values.get('high'), '.3f')}]"
