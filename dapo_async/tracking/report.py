"""The training dynamics of one or several runs, and results of `dapo-async eval`, as one HTML file.

    run directories ─▶ report_reading ─▶ records ─▶ panels, charts: SVG ─▶ report_page: one file

The file needs no network: charts, styles and the script for the pointer are in it. Called by the
command line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from dapo_async.tracking.charts import SERIES, chart, legend, pass_rate_chart
from dapo_async.tracking.panels import PANELS, traces
from dapo_async.tracking.published import curves, is_comparable, measured, rung
from dapo_async.tracking.report_page import (
    chart_figure,
    colour_choice,
    details,
    figures,
    note,
    page,
    plot,
    response,
    table,
    text,
    tiles,
)
from dapo_async.tracking.report_reading import (
    EvalRecord,
    PassRates,
    RunRecord,
    number,
    rates_of,
    read_evaluation,
    read_run,
)
from dapo_async.tracking.rollout_tokens import TokenReader, advantages, spans_of
from dapo_async.tracking.verdict import duration, part, verdict
from dapo_async.utils.files import atomic_write

MAX_LISTED = 100  # problems by row
# Names of `token_flow` whose tokens were generated and not trained.
WASTE = ("rejected", "evicted", "failed", "repeated", "skipped", "unused", "evaluation")
TOTALS = ("avg@{k}", "pass@1", "pass@{k}", "maj@{k}")


def write_report(paths: Sequence[Path], *, out: Path, steps: Sequence[int] | None) -> list[str]:
    """Writes the page; returns a line for each thing that is missing or broken.

    `paths`: run directories and results of evaluations. `steps`: whose rollouts are shown, counted
    from 1; None means the first, middle and last ones. Raises ValueError for any other path, and
    for an `out` that does not end with .html or can't be written.
    """
    if out.suffix not in (".html", ".htm"):
        raise ValueError(
            f"--out {out} must end with .html, so that no other file is overwritten; "
            "give such a name"
        )
    folders = [path for path in paths if path.is_dir()]
    files = [path for path in paths if not path.is_dir()]
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    evaluations = [read_evaluation(file) for file in files]
    sections = [*_sections(runs, steps), *(_evaluations(evaluations) if evaluations else ())]
    notes = [f"{run.name}: {line}" for run in runs for line in run.notes]
    title = "Training dynamics: " + ", ".join(run.name for run in runs) if runs else "Evaluations"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, page(title, [*map(note, notes), *sections]))
    except OSError as error:
        raise ValueError(
            f"--out {out} can't be written: {error.strerror}; give another file"
        ) from error
    return notes


def _sections(runs: Sequence[RunRecord], steps: Sequence[int] | None) -> Iterator[str]:
    if runs:
        yield from _overview(runs)
        yield from _charts(runs)
        yield from _published(runs)
        yield from _solved(runs)
        yield from _rollouts(runs, steps)
        yield from _configs(runs)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folder's own name; where there are several, a number in front keeps them apart."""
    names = [folder.resolve().name for folder in folders]
    if len(names) == 1:
        return names
    return [f"{place}: {name}" for place, name in enumerate(names, start=1)]


def _overview(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Per run its verdict and the numbers of its summary."""
    for place, run in enumerate(runs):
        name = f"<h3>{text(run.name)}</h3>" if len(runs) > 1 else ""
        said = f'<p class="verdict">{text(verdict(run.summary, run.rows))}</p>'
        colour = f"--c:var(--s{place % len(SERIES)})"
        yield f'<section class="run" style="{colour}">{name}{said}{tiles(_facts(run))}</section>'


def _facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    summary = run.summary
    idle, staleness, groups = (part(summary, name) for name in ("idle", "staleness", "groups"))
    if "status" in summary:
        yield "status", f"{text(summary['status'])}: {text(summary.get('reason'))}"
    else:
        yield "status", "no summary: it has not ended, or was killed"
    yield "steps", str(len(run.rows))
    yield "trained tokens", figures(summary.get("tokens"), ",.0f")
    seconds = number(summary.get("train_s"))
    yield "training time", "–" if math.isnan(seconds) else duration(seconds)
    yield "held-out accuracy", _change(summary, "accuracy", ".3f")
    yield "response length", _change(summary, "response_tokens", ".1f")
    bound = f"(max {figures(staleness.get('max'), '.0f')})"
    yield "staleness", f"{figures(staleness.get('mean'), '.2f')} {bound}"
    yield "idle learner", figures(idle.get("learner"), ".0%")
    yield "idle rollout", figures(idle.get("rollout"), ".0%")
    yield "idle rollout slots", figures(summary.get("slots.idle"), ".0%")
    yield "slots of an engine", figures(summary.get("slots_per_engine"), ".0f")
    retracted = figures(summary.get("kv.retractions"), ",.0f")
    yield "KV memory in use", f"{figures(summary.get('kv.use'), '.0%')}, {retracted} retractions"
    yield "prefix hits", figures(summary.get("prefix.hit"), ".0%")
    yield "trained groups", figures(groups.get("trained"), ",.0f")
    rejected = [
        f"{figures(count, ',.0f')} {text(str(reason).replace('_', ' '))}"
        for reason, count in part(groups, "rejected").items()
        if count
    ]
    yield "rejected groups", ", ".join(rejected) or "none"
    rates, flow = part(summary, "tokens_per_s"), part(summary, "token_flow")
    yield "generated tokens/s", figures(rates.get("generated"), ",.0f")
    yield "trained tokens/s", figures(rates.get("trained"), ",.0f")
    yield "efficiency of rollout", figures(summary.get("efficiency.rollout"), ".0%")
    yield "MFU of the learner", figures(summary.get("mfu.learner"), ".1%")
    both = (figures(summary.get(f"{name}.rollout"), ".1%") for name in ("mfu", "mbu"))
    yield "MFU, MBU of rollout", ", ".join(both)
    wasted = [
        f"{figures(count, ',.0f')} {text(str(name))}"
        for name, count in flow.items()
        if name in WASTE and count
    ]
    yield "tokens not trained", ", ".join(wasted) or "none"


def _change(summary: Mapping[str, Any], name: str, form: str) -> str:
    first, last = (summary.get(f"{when}_{name}") for when in ("initial", "final"))
    return f"{figures(first, form)} → {figures(last, form)}"


def _charts(runs: Sequence[RunRecord]) -> Iterator[str]:
    yield "<h2>Over the learner steps</h2>"
    alone, missing, charts = len(runs) == 1, [], []
    for panel in PANELS:
        shown = traces(panel, runs)
        if not shown:
            missing.append(panel.title)
            continue
        keys = legend(shown, alone=alone)
        charts.append(chart_figure(chart(shown, alone=alone), panel.title, panel.caption, keys))
    if charts:
        yield '<p class="faint">Point at a chart, or touch it, to read its values.</p>'
    if any(trace.points.in_blocks for panel in PANELS for trace in traces(panel, runs)):
        yield (
            '<p class="faint">A long run is drawn in blocks of steps: '
            "the line is their mean, the band their range.</p>"
        )
    yield f'<div class="charts">{"".join(charts)}</div>'
    if missing:
        yield note(f"no numbers yet for: {', '.join(missing)}")


TABLE_1_HEAD = (
    "run", "rung of DAPO's Table 1", "published", "best measured", "last measured", "how",
)  # fmt: skip


def _published(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Figure 1 and Table 1 of the DAPO paper, where runs were evaluated with several responses."""
    lines = curves(runs)
    if not lines:
        return
    yield "<h2>Held-out accuracy and published values</h2>"
    alone = len(runs) == 1
    caption = (
        "Mean accuracy of k responses per held-out problem. Published values: avg@32 on AIME 2024 "
        "(arXiv 2503.14476, Figure 1 and Table 1), beside runs that are measured on it."
    )
    keys = legend(lines, alone=alone)
    figure = chart_figure(chart(lines, alone=alone), "Held-out avg@k", caption, keys)
    yield f'<div class="charts">{figure}</div>'
    yield table(TABLE_1_HEAD, [_table_1_row(run) for run in runs if measured(run) is not None])


def _table_1_row(run: RunRecord) -> tuple[str, ...]:
    found = measured(run)
    assert found is not None, "only measured runs have a row"
    name, value = rung(run.config) if is_comparable(run) else ("–", math.nan)
    best, last = (
        f"{figures(row['accuracy'], '.3f')} at step {row['version']:.0f}"
        for row in (found.best, found.last)
    )
    settings = (("temperature", "temperature"), ("top-p", "top_p"), ("problems", "num_prompts"))
    how = ", ".join(f"{word} {figures(found.last.get(key), 'g')}" for word, key in settings)
    return (
        text(run.name), text(name), figures(value, ".2f"), best, last, f"{found.label}, {how}",
    )  # fmt: skip


def _solved(runs: Sequence[RunRecord]) -> Iterator[str]:
    yield "<h2>Held-out problems over training</h2>"
    yield '<div class="charts">'
    for run in runs:
        drawn = pass_rate_chart(run.pass_rates, across="weight version that was evaluated")
        body = note("no evaluation has said which problems it solved")
        if drawn is not None:
            body = plot(drawn) + _courses(run.pass_rates)
        yield f"<div><h3>{text(run.name)}</h3>{body}</div>"
    yield "</div>"


def _courses(rates: PassRates) -> str:
    """How many problems changed between the first and the last evaluation, and how."""
    names = ("solved first and last", "learned", "forgotten", "solved only in between")
    problems: dict[str, list[int]] = {name: [] for name in (*names, "never solved")}
    for problem, values in zip(rates.problems, rates.values, strict=True):
        problems[_course(values)].append(problem)
    rows = []
    for course, those in problems.items():
        listed = ", ".join(map(str, those[:MAX_LISTED])) + (", …" if those[MAX_LISTED:] else "")
        folded = details("rows of the data set", f"<p>{listed}</p>") if those else ""
        rows.append((text(course), str(len(those)), folded))
    return table(("from first to last", "problems", ""), rows)


def _course(values: Sequence[float]) -> str:
    first, last = values[0] == 1.0, values[-1] == 1.0
    if first and last:
        return "solved first and last"
    if last:
        return "learned"
    if first:
        return "forgotten"
    return "solved only in between" if 1.0 in values else "never solved"


def _rollouts(runs: Sequence[RunRecord], steps: Sequence[int] | None) -> Iterator[str]:
    yield "<h2>Rollouts</h2>"
    yield colour_choice()
    for run in runs:
        yield f"<h3>{text(run.name)}</h3>"
        shown = _steps(run, steps)
        if not shown:
            yield note("none to show")
        uncoloured = 0
        for step in shown:
            rows, reader = run.rollouts(step), TokenReader(run, step)
            groups = [list(each) for _, each in groupby(rows, key=_group_of)]
            drawn = [_group(group, run, reader, step) for group in groups]
            uncoloured += sum(count for _, count in drawn)
            count = f"{len(groups)} groups, {len(rows)} rollouts"
            yield details(f"step {step + 1}: {count}", "".join(html for html, _ in drawn))
        if uncoloured:
            yield note(
                f"{uncoloured} responses were sampled by several weight versions and are shown "
                "without their colours: that needs a run with train.record=true, "
                "and the tokenizer in model.path"
            )


def _steps(run: RunRecord, steps: Sequence[int] | None) -> list[int]:
    """As in metrics.jsonl, from 0; `steps` count from 1."""
    there = run.steps_with_rollouts
    if steps is None:
        return sorted({there[0], there[len(there) // 2], there[-1]}) if there else []
    wanted = [step - 1 for step in steps]
    run.notes += [
        f"no rollouts of step {step + 1} were written" for step in wanted if step not in there
    ]
    return [step for step in wanted if step in there]


def _group_of(row: Mapping[str, Any]) -> str:
    return str(row.get("group_id"))


def _group(
    rows: Sequence[Mapping[str, Any]], run: RunRecord, reader: TokenReader, step: int
) -> tuple[str, int]:
    """The siblings of one prompt, and how many of them lack the colours of their versions."""
    first, uncoloured, parts = rows[0], 0, list[str]()
    for row, advantage in zip(rows, advantages(rows, run.config), strict=True):
        pieces = reader.pieces(row)
        uncoloured += any(piece.version is None for piece in pieces)
        parts.append(_sibling_facts(row, advantage))
        parts.append(response(pieces, step=step, advantage=advantage))
    correct = sum(number(row.get("accuracy")) == 1.0 for row in rows)
    start = f'<span class="faint">{text(str(first.get("prompt"))[:80])}</span>'
    summary = f"group {text(first.get('group_id'))}: {correct} of {len(rows)} correct {start}"
    prompt = f"<p>prompt</p><pre>{text(first.get('prompt'))}</pre>"
    gold = f"<p>gold answer: {text(first.get('gold'))}</p>"
    return details(summary, prompt + gold + "".join(parts)), uncoloured


def _sibling_facts(row: Mapping[str, Any], advantage: float) -> str:
    versions = ", ".join(str(version) for version, _, _ in spans_of(row)) or "–"
    facts = (
        ("reward", figures(row.get("reward"), "+.3f")),
        ("accuracy", figures(row.get("accuracy"), "g")),
        ("advantage", figures(advantage, "+.2f")),
        ("answer read", text(row.get("extracted"))),
        ("tokens", f"{figures(row.get('tokens'), '.0f')} ({text(row.get('finish_reason'))})"),
        ("versions", text(versions)),
    )
    said = " · ".join(f"{name} <b>{value}</b>" for name, value in facts)
    return f'<p class="facts">sibling <b>{text(row.get("sibling"))}</b> · {said}</p>'


def _configs(runs: Sequence[RunRecord]) -> Iterator[str]:
    yield "<h2>Configuration</h2>"
    if len(runs) > 1:
        knobs = dict.fromkeys(name for run in runs for name in run.config if name != "run_dir")
        differing = [
            knob for knob in knobs if len({repr(run.config.get(knob)) for run in runs}) > 1
        ]
        rows = [(text(knob), *(text(run.config.get(knob)) for run in runs)) for knob in differing]
        names = [run.name for run in runs]
        yield table(("knob", *names), rows) if rows else "<p>The runs differ in no knob.</p>"
    for run in runs:
        rows = [(text(name), text(value)) for name, value in run.config.items()]
        yield details(f"every knob of {text(run.name)}", table(("knob", "value"), rows))


EVALUATION_HEAD = (
    "result", "k", "avg@k", "pass@1", "pass@k", "maj@k", "length", "truncated", "how", "checkpoint",
)  # fmt: skip


def _evaluations(evaluations: Sequence[EvalRecord]) -> Iterator[str]:
    yield "<h2>Evaluations</h2>"
    yield table(EVALUATION_HEAD, [_evaluation_row(each) for each in evaluations])
    yield (
        '<p class="faint">In brackets: the interval that holds 95 % of the means of a bootstrap '
        "over the problems.</p>"
    )
    for _, alike in groupby(sorted(evaluations, key=_data), key=_data):
        results = list(alike)
        drawn = pass_rate_chart(rates_of(results), across="result")
        names = sorted({str(each.settings.get("data")) for each in results})
        if drawn is not None:
            yield f"<h3>{text(', '.join(names))}</h3>"
            yield f'<div class="charts">{plot(drawn)}</div>'


def _evaluation_row(each: EvalRecord) -> tuple[str, ...]:
    settings, totals = each.settings, each.totals
    k = settings.get("k")
    how = (
        f"{text(settings.get('engine'))}, temperature {text(settings.get('temperature'))}, "
        f"top-p {text(settings.get('top_p'))}"
    )
    return (
        text(each.name),
        text(k),
        *(_interval(totals.get(name.format(k=k))) for name in TOTALS),
        figures(totals.get("mean_response_tokens"), ".1f"),
        figures(totals.get("truncated"), ".1%"),
        how,
        text(settings.get("checkpoint")),
    )


def _data(evaluation: EvalRecord) -> str:
    return str(evaluation.settings.get("problems_sha256"))


def _interval(estimate: Any) -> str:
    values = estimate if isinstance(estimate, dict) else {}
    if math.isnan(number(values.get("mean"))):
        return "–"
    low, high = (figures(values.get(name), ".3f") for name in ("low", "high"))
    return f"{figures(values['mean'], '.3f')} [{low}, {high}]"
