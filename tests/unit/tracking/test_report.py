"""The report: one safe page, which names what is missing or broken; and dynamics.png."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from paths import ROOT
from tracking_world import run_dir_with

from dapo_async.cli.main import main
from dapo_async.tracking.charts import (
    chart,
    colour_of,
    dash_of,
    heat_lines,
    legend,
    pass_rate_chart,
    wait_for_import,
)
from dapo_async.tracking.panels import (
    PANELS,
    Panel,
    blocks,
    has_lonely,
    in_picture,
    series,
    traces,
)
from dapo_async.tracking.plot import draw_dynamics
from dapo_async.tracking.report import write_report
from dapo_async.tracking.report_page import DARK, LIGHT, MAX_CHARACTERS, SCRIPT, text
from dapo_async.tracking.report_reading import PassRates, number, read_evaluation, read_run
from dapo_async.tracking.run_dir import RunDir

NAN = math.nan
EVIL = (
    "</pre><script>alert(1)</script><img src=http://192.0.2.1/x onerror=alert(2)> &amp; "
    "\x00\x1b[31m \ud800 ∑"
)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.said = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.said += data


def a_run(root: Path, *, num_steps: int = 4) -> RunDir:
    """With evaluations and rollouts, as a run leaves it."""
    run_dir = run_dir_with(root, num_steps=num_steps)
    solved = {
        0: [0.0, 1.0, 0.0, 0.0, 1.0],
        2: [1.0, 0.0, 0.0, 1.0, 1.0],
        4: [1.0, 0.0, 0.0, 0.0, 1.0],
    }
    for version, accuracies in solved.items():
        values = {
            "version": version,
            "step": version,
            "accuracy": sum(accuracies) / 5,
            "mean_response_tokens": 3.0 + version,
        }
        run_dir.log_evaluation(values, accuracies=dict(enumerate(accuracies)))
    for step in range(num_steps):
        write_rows(
            run_dir.rollouts / f"step_{step:06d}.jsonl",
            [rollout(step, sibling, f"answer {step}.{sibling}") for sibling in range(2)],
        )
    return run_dir


def rollout(step: int, sibling: int, response: str) -> dict[str, object]:
    return {
        "step": step,
        "group_id": 10 + step,
        "sibling": sibling,
        "prompt": "1+1=",
        "response": response,
        "gold": "2",
        "extracted": None,
        "accuracy": float(sibling),
        "reward": 2.0 * sibling - 1,
        "tokens": 3,
        "finish_reason": "stop",
        "weight_versions": [[3, 0, 2], [4, 2, 3]],
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def reported(*paths: Path, steps: Sequence[int] | None = None) -> tuple[Page, list[str]]:
    out = paths[0].parent / "report.html"
    notes = write_report(paths, out=out, steps=steps)
    return Page(out), notes


def panel_of(title: str) -> Panel:
    return next(panel for panel in PANELS if panel.title.startswith(title))


def test_page_has_every_chart_within_it_and_fetches_nothing(tmp_path: Path) -> None:
    result = evaluation_file(tmp_path / "result.json", [0.5])
    page, notes = reported(
        a_run(tmp_path / "one", num_steps=6).root, result, a_run(tmp_path / "two").root
    )
    assert notes == []
    # Charts that have numbers, a heat map per run, one of the result.
    assert page.source.count('<svg class="plot"') == 10 + 2 + 1
    # The first, middle and last steps of a run.
    shown = [f"answer {step}.1" in page.said for step in range(6)]
    assert shown == [True, False, True, True, False, True]
    assert "The runs differ in no knob." in page.said
    assert {"link", "iframe", "object", "embed"}.isdisjoint(page.tags)
    names = ("src", "href", "srcset", "data", "action")
    sources = [value for name, value in page.attributes if name in names]
    assert len(sources) > 3
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert set(re.findall(r"url\((.)", page.source)) <= {"#"}
    assert re.search(r"https?://", page.source) is None


def test_page_runs_its_own_script_and_no_other(tmp_path: Path) -> None:
    page, _ = reported(a_run(tmp_path / "run").root)
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page.source, re.DOTALL)
    own = [body for attributes, body in scripts if not attributes]
    assert own == [SCRIPT]
    assert {attributes for attributes, _ in scripts} == {"", ' type="application/json"'}
    digest = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    assert ("content", policy) in page.attributes
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "innerHTML" not in SCRIPT


def test_pointer_reads_the_step_and_the_value_of_each_curve(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path / "run").root, "run")
    drawn = chart(traces(panel_of("Accuracy"), [run]), alone=True)
    hover = drawn.hover
    assert hover["head"] == ["step 0", "step 1", "step 2", "step 3", "step 4"]
    assert [(row["name"], row["values"]) for row in hover["rows"]] == [
        ("trained", ["", "0", "0.25", "0.5", "0.75"]),
        ("held out", ["0.4", "", "0.6", "", "0.4"]),
    ]
    assert hover["x"] == sorted(hover["x"])
    # The places are those of the drawn points, in the units of the SVG.
    path = re.findall(r'<path d="M ([\d.]+) [\d.]+ L [^"]*" [^>]*var\(--s0\)', drawn.svg)
    assert [float(x) for x in path] == [hover["x"][1]]


def test_charts_have_their_colours_from_the_page_in_light_and_dark(tmp_path: Path) -> None:
    runs = [read_run(a_run(tmp_path / name).root, name) for name in ("one", "two")]
    drawn = [chart(traces(panel, runs), alone=False).svg for panel in PANELS if traces(panel, runs)]
    assert not re.findall(r"#[0-9a-f]{6}\b", "".join(drawn))
    for name in set(re.findall(r"var\((--\w+)\)", "".join(drawn))):
        assert f"{name}:" in LIGHT
        assert f"{name}:" in DARK


def test_whatever_a_model_wrote_is_shown_as_text(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run")
    rows = [
        {
            **rollout(0, 0, EVIL),
            **dict.fromkeys(
                ("prompt", "gold", "extracted", "finish_reason", "group_id", "sibling"), EVIL
            ),
        }
    ]
    rows.append(
        {**rollout(0, 1, ""), "weight_versions": [[EVIL, 0, 2], 7], "reward": EVIL, "tokens": EVIL}
    )
    write_rows(run_dir.rollouts / "step_000000.jsonl", rows)
    run_dir.write_summary(
        {
            "status": EVIL,
            "reason": EVIL,
            "groups": {"rejected": {EVIL: 3}},
            "idle": EVIL,
            "tokens": EVIL,
        }
    )
    run_dir.config.write_text(json.dumps({"data": {"template": EVIL}, EVIL: 1}))
    page, _ = reported(run_dir.root)
    assert page.source.count("<script>") == 1
    assert "img" not in page.tags
    assert page.said.count(EVIL.replace("\x00\x1b", "␀␀").replace("\ud800", "?")) >= 8
    assert page.tags.count("pre") == page.source.count("</pre>")


def test_text_that_is_too_long_is_cut_and_says_by_how_much() -> None:
    assert text("<" * (MAX_CHARACTERS + 7)) == "&lt;" * MAX_CHARACTERS + " [7 characters more]"
    assert text("a" * MAX_CHARACTERS) == "a" * MAX_CHARACTERS


def test_rollouts_of_the_chosen_steps_are_shown_with_their_rewards(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run", num_steps=6)
    page, notes = reported(run_dir.root, steps=[3, 10])
    assert [f"answer {step}.1" in page.said for step in range(6)] == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]
    assert notes == ["run: no rollouts of step 10 were written"]
    assert notes[0] in page.said
    assert "group 12: 1 of 2 correct" in page.said
    assert "+1.000" in page.said
    assert "-1.000" in page.said
    assert "versions 3, 4" in page.said


def test_broken_rows_are_counted_and_the_others_drawn(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run")
    with run_dir.metrics.open("a") as file:
        file.write(
            '{"step": 5, "reward": NaN, "entropy": 1e999, "loss": true, "accuracy": "0.5", '
            '"probability": ' + "9" * 400 + "}\n"
        )
        file.write('[1]\n{"version": 3}\n{"step": 4, "rew')
    (run_dir.rollouts / "step_000000.jsonl").write_bytes(b"\xff\xfe\n[]\n")
    (run_dir.problems / "version_000002.json").write_text(
        '{"version": 2, "rows": [1], "accuracies": []}'
    )
    run_dir.summary.write_text("{")
    run_dir.config.write_text("a: [")
    page, notes = reported(run_dir.root)
    assert sorted(notes) == [
        "run: config.yaml is not valid YAML; it is left out",
        "run: evaluations/version_000002.json does not say which problems "
        "were solved; it is left out",
        "run: metrics.jsonl: 1 of 6 rows have no step; they are left out",
        "run: metrics.jsonl: 2 of 8 lines are no JSON objects, the first "
        "is line 6; they are left out",
        "run: step_000000.jsonl: 2 of 2 lines are no JSON objects, the "
        "first is line 1; they are left out",
        "run: summary.json is no JSON object; it is left out",
    ]
    assert all(line in page.said for line in notes)
    assert "no summary: it has not ended, or was killed" in page.said
    run = read_run(run_dir.root, "run")
    assert run.rows[-1] == {"step": 5.0}
    assert [row["step"] for row in run.rows] == [0, 1, 2, 3, 5]


def test_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path / "run")
    run_dir.config.write_text("seed: 3\n")
    page, notes = reported(run_dir.root)
    assert notes == ["run: no step has been written yet"]
    assert "no numbers yet for: Accuracy, Reward, " in page.said
    assert "no evaluation has said which problems it solved" in page.said
    assert "svg" not in page.tags


def test_gap_is_drawn_where_steps_or_numbers_are_missing() -> None:
    rows = [
        {"step": 0.0, "loss": 1.0},
        {"step": 1.0},
        {"step": 2.0, "loss": 3.0},
        {"step": 6.0, "loss": 4.0},
    ]
    steps, values = series(rows, "loss")
    assert steps == [1.0, 2.0, 3.0, 4.0, 7.0]
    assert str(values) == str([1.0, NAN, 3.0, NAN, 4.0])
    assert has_lonely(values)
    assert not has_lonely([1.0, 2.0, NAN, 3.0, 4.0])


def test_reason_that_did_not_occur_is_none_rejected_where_groups_were_offered() -> None:
    rows = [
        {"step": 0.0, "offered": 8.0},
        {"step": 1.0, "offered": 8.0, "rejected.all_wrong": 2.0},
        {"step": 2.0},
    ]
    assert str(series(rows, "rejected.all_wrong")[1]) == str([0.0, 2.0, NAN])


@pytest.mark.parametrize("value", [None, True, "1", [1], NAN, math.inf, -math.inf, 10**400])
def test_what_is_no_finite_number_can_not_be_drawn(value: object) -> None:
    assert math.isnan(number(value))
    assert number(3) == 3.0


def test_runs_share_each_chart_a_colour_each_and_a_line_per_curve(tmp_path: Path) -> None:
    runs = [
        read_run(a_run(tmp_path / name, num_steps=num_steps).root, name)
        for name, num_steps in (("one", 4), ("two", 6))
    ]
    shown = traces(panel_of("Accuracy"), runs)
    assert [(trace.points.steps, trace.points.values) for trace in shown] == [
        ([1.0, 2.0, 3.0, 4.0], [0.0, 0.25, 0.5, 0.75]),
        ([0.0, 2.0, 4.0], [0.4, 0.6, 0.4]),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]),
        ([0.0, 2.0, 4.0], [0.4, 0.6, 0.4]),
    ]
    colours = [colour_of(trace, alone=False) for trace in shown]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    names = [name for name, *_ in legend(shown, alone=False)]
    assert names == ["one", "two", "trained", "held out"]
    idle = traces(panel_of("Idle shares"), runs)
    assert [dash_of(trace, alone=False) for trace in idle] == ["", "6 3", "1.5 2.5"] * 2
    assert traces(panel_of("Gradient norm"), runs) == []


def test_report_shows_the_balance_of_the_learner_ranks(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run")
    rows = [
        json.loads(row) | {"imbalance": 1.0 + step / 8}
        for step, row in enumerate(run_dir.metrics.read_text().splitlines())
    ]
    write_rows(run_dir.metrics, rows)
    (trace,) = traces(panel_of("Imbalance"), [read_run(run_dir.root, "run")])
    assert trace.points.values == [1.0, 1.125, 1.25, 1.375]
    page, _ = reported(run_dir.root)
    assert "Imbalance of the learner ranks" in page.said


def test_long_series_is_drawn_as_means_and_ranges_of_blocks() -> None:
    steps = [float(step) for step in range(1, 1001)]
    points = blocks(steps, [step % 2 if step <= 998 else NAN for step in steps])
    assert (len(points.steps), points.steps[:2], points.last_steps[:2]) == (334, [1, 4], [3, 6])
    assert (points.values[0], points.low[0], points.high[0]) == (2 / 3, 0.0, 1.0)
    assert (points.steps[-1], points.last_steps[-1]) == (1000, 1000)
    assert math.isnan(points.values[-1])
    assert points.in_blocks
    assert not blocks(steps[:400], steps[:400]).in_blocks


def test_picture_has_readable_names_and_counts_steps_from_one(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run")
    assert draw_dynamics(run_dir)
    assert run_dir.picture.read_bytes().startswith(b"\x89PNG")
    run = read_run(run_dir.root, "run")
    titles = [panel.title for panel in in_picture()]
    assert "Throughput (trained tokens/s)" in titles
    assert [trace.label for trace in traces(panel_of("Accuracy"), [run])] == ["trained", "held out"]
    rejected = traces(panel_of("Rejected"), [run])
    assert [(trace.label, trace.points.steps[0]) for trace in rejected] == [("all wrong", 1.0)]
    assert not draw_dynamics(RunDir.create(tmp_path / "new"))


@pytest.mark.slow
def test_picture_waits_for_an_import_of_ipython_that_goes_on(tmp_path: Path) -> None:
    (tmp_path / "IPython").mkdir()
    (tmp_path / "IPython" / "__init__.py").write_text(
        "import threading\nrest = threading.Event()\nrest.wait(60)\nversion_info = (9, 0)\n"
    )
    run_dir = a_run(tmp_path / "run")
    script = f"""
import sys, threading, time
import matplotlib.figure
from pathlib import Path
from dapo_async.tracking.plot import draw_dynamics
from dapo_async.tracking.run_dir import RunDir
importing = threading.Thread(target=__import__, args=("IPython",))
importing.start()
while not hasattr(sys.modules.get("IPython"), "rest"):
    time.sleep(0.01)
threading.Timer(0.5, sys.modules["IPython"].rest.set).start()
assert not hasattr(sys.modules["IPython"], "version_info")
assert draw_dynamics(RunDir(Path({str(run_dir.root)!r})))
assert hasattr(sys.modules["IPython"], "version_info")
"""
    subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        check=True,
        timeout=120,
    )


def test_failed_import_of_ipython_is_not_waited_for() -> None:
    wait_for_import("dapo_async.no_such_module")
    sys.modules["dapo_async.broken"] = None  # type: ignore[assignment] # as after a blocked import
    try:
        wait_for_import("dapo_async.broken")
    finally:
        del sys.modules["dapo_async.broken"]


def test_differing_knobs_and_the_names_of_runs_are_told(tmp_path: Path) -> None:
    one, two = a_run(tmp_path / "a" / "$x_{$"), a_run(tmp_path / "b" / "$x_{$")
    one.config.write_text("seed: 0\nrun_dir: a\nlearner:\n  lr: 0.1\n  warmup_steps: 5\n")
    two.config.write_text("seed: 0\nrun_dir: b\nlearner:\n  lr: 0.2\n  warmup_steps: 5\n")
    page, _ = reported(one.root, two.root)
    assert "Training dynamics: 1: $x_{$, 2: $x_{$" in page.said
    assert "<td>learner.lr</td><td>0.1</td><td>0.2</td>" in page.source
    assert page.said.count("warmup_steps") == 2  # in the whole configs alone
    assert page.said.count("run_dir") == 2


def test_problems_are_told_by_their_course_over_the_evaluations(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run")
    rates = read_run(run_dir.root, "run").pass_rates
    assert rates == PassRates(
        [0, 1, 2, 3, 4], ["0", "2", "4"], [[0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
    )
    page, _ = reported(run_dir.root)
    said = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.source))
    for course in (
        "solved first and last 1 rows of the data set 4 ",
        "learned 1 rows of the data set 0 ",
        "forgotten 1 rows of the data set 1 ",
    ):
        assert course in said
    assert (
        "solved only in between 1 rows of the data set 3 never solved 1 rows of the data set 2"
        in said
    )


def test_heat_map_has_the_hardest_problems_on_top_and_gaps_where_none_was_asked() -> None:
    rates = PassRates([3, 5, 8], ["a", "b"], [[0.5, 1.0], [NAN, 0.25], [1.0, NAN]])
    assert str(heat_lines(rates)) == str(([[NAN, 0.25], [0.5, 1.0], [1.0, NAN]], 1))
    many = PassRates(list(range(600)), ["a"], [[float(row % 2)] for row in range(600)])
    lines, size = heat_lines(many)
    assert (len(lines), size) == (200, 3)
    assert lines[0] == [0.0]
    assert lines[100] == [1.0]
    drawn = pass_rate_chart(rates, across="version")
    assert drawn is not None
    assert "3 problems, hardest on top" in drawn.svg
    assert drawn.hover["head"] == ["a", "b"]
    assert drawn.hover["rows"][0]["values"] == ["75.0%", "62.5%"]
    assert pass_rate_chart(PassRates([], [], []), across="version") is None


def evaluation_file(path: Path, accuracies: Sequence[float], *, data: str = "d") -> Path:
    estimate = {"mean": 0.5, "low": 0.25, "high": 0.75}
    totals = {
        "avg@2": estimate,
        "pass@1": estimate,
        "pass@2": estimate,
        "mean_response_tokens": 7.0,
        "truncated": 0.125,
    }
    problems = [{"row": row, "accuracy": accuracy} for row, accuracy in enumerate(accuracies)]
    settings = {
        "k": 2,
        "checkpoint": "/c",
        "data": f"/{data}.jsonl",
        "problems_sha256": data,
        "engine": "torch",
    }
    path.write_text(json.dumps({"settings": settings, "totals": totals, "problems": problems}))
    return path


def test_results_of_evaluations_may_stand_alone(tmp_path: Path) -> None:
    first, second = (
        evaluation_file(tmp_path / "first.json", [0.0, 0.5]),
        evaluation_file(tmp_path / "second.json", [0.5, 1.0]),
    )
    other = evaluation_file(tmp_path / "other.json", [1.0], data="e")
    page, notes = reported(first, second, other)
    assert notes == []
    assert page.source.count('<svg class="plot"') == 2  # one heat map per data file
    assert page.said.count("0.500 [0.250, 0.750]") == 9
    assert "–" in page.said  # maj@2 is not there
    assert "/d.jsonl" in page.said
    assert "Held-out problems over training" not in page.said


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("dapo-async: ")


def test_wrong_input_is_one_line_and_no_other_file_is_written_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = a_run(tmp_path / "run").root
    before = (root / "metrics.jsonl").read_bytes()
    assert refused(capsys, root, "--out", root / "metrics.jsonl").startswith(
        f"--out {root / 'metrics.jsonl'} must end with .html, "
    )
    assert (root / "metrics.jsonl").read_bytes() == before
    assert refused(capsys, tmp_path).startswith(
        f"{tmp_path} is no run directory: it has none of config.yaml, "
    )
    assert refused(capsys, tmp_path / "nowhere").startswith(
        f"{tmp_path / 'nowhere'} is neither a run directory nor the result of dapo-async eval: "
        "no such file"
    )
    assert (
        refused(capsys, root, "--steps", "1,x")
        == "--steps (1,x) must be numbers separated by commas, such as 1,10,20"
    )
    assert refused(capsys, root, "--out", root / "config.yaml" / "x.html").startswith("--out ")
    assert refused(capsys).startswith("the following arguments are required: RUN_DIR; ")
    assert not list(tmp_path.glob("*.html*"))


def test_command_says_what_is_missing_and_where_the_page_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root, out = a_run(tmp_path / "run").root, tmp_path / "new" / "page.html"
    assert main(["report", str(root), "--out", str(out), "--steps", "2,7"]) == 0
    assert capsys.readouterr().out == f"run: no rollouts of step 7 were written\nreport     {out}\n"
    assert "answer 1.0" in Page(out).said


def test_problem_over_which_the_verifier_failed_always_has_no_pass_rate(tmp_path: Path) -> None:
    problems = [
        {"row": row, "accuracy": rate, "num_judged": judged}
        for row, (rate, judged) in enumerate(((0.5, 2), (0.0, 0), (0.0, 4)))
    ]
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"settings": {}, "totals": {}, "problems": problems}))
    accuracies = read_evaluation(path).accuracies
    assert (accuracies[0], math.isnan(accuracies[1]), accuracies[2]) == (0.5, True, 0.0)


def test_picture_is_drawn_from_the_metrics_if_there_are_any(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert not draw_dynamics(run_dir)
    run_dir.metrics.write_text("")
    assert not draw_dynamics(run_dir)
    assert not run_dir.picture.exists()
    names = [curve.column for panel in in_picture() for curve in panel.curves]
    names.append("rejected.all_wrong")
    rows: list[dict[str, float | None]] = [
        {"step": step, **dict.fromkeys(names, step * 0.1)} for step in range(3)
    ]
    rows[1] |= {"entropy": None}  # a skipped step
    del rows[2]["rejected.all_wrong"]  # a step without such rejects
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert draw_dynamics(run_dir)
    without = run_dir.picture.read_bytes()
    assert without.startswith(b"\x89PNG")
    evaluations = (
        {"version": 0, "accuracy": 0.5, "mean_response_tokens": 3.0},
        {"version": 3, "accuracy": 0.75},
    )
    write_rows(run_dir.evaluations, evaluations)
    assert draw_dynamics(run_dir)
    assert run_dir.picture.read_bytes() != without
