"""Plain lines, the live display, and a run that goes on when either of them fails."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console
from tracking_world import step_row

from dapo_async.tracking.live_display import LiveProgress, clock, formatted, groups
from dapo_async.tracking.sinks import open_progress
from dapo_async.tracking.terminal import Outlet, Progress, step_line

MIDDLE = {"version": 10, "accuracy": 0.875, "mean_response_tokens": 14.5}


def live(**more: Any) -> tuple[LiveProgress, Console, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=110, **more)
    return LiveProgress(Outlet(file), num_steps=30, max_staleness=2, console=console), console, file


def frame(progress: LiveProgress) -> str:
    """What the display shows now, as text."""
    console = Console(file=io.StringIO(), record=True, width=110)
    console.print(progress.render())
    return console.export_text()


def check_frame(text: str) -> None:
    """The display has every fact of a step with its value."""
    facts = (
        "step 12/30",
        "accuracy 2.750",
        "reward 0.500",
        "entropy 0.500",
        "length 7.0",
        "staleness 1.00 (max 2/2)",
        "1,000 tok/s",
        "learner 25%",
        "rollout 50%",
        "accepted 4 of 8",
        "rejected 4 all_wrong (48 in all)",
        "held-out v10",
        "accuracy 0.875",
        "length 14.5",
        "elapsed",
        "about 0:00:27 of training left",
    )
    for fact in facts:
        assert fact in text, f"the display lacks {fact!r}:\n{text}"
    assert "all_equal" not in text, "a reason that did not occur is not shown"


def test_display_shows_the_newest_step_the_last_evaluation_and_the_time_left() -> None:
    progress, _, _ = live()
    for step in range(12):
        progress.step(step_row(step))
    progress.evaluation(MIDDLE)
    check_frame(frame(progress))
    progress.close()


def test_display_check_notices_what_is_missing() -> None:
    progress, _, _ = live()
    progress.step(step_row(11))
    with pytest.raises(AssertionError, match="the display lacks 'held-out v10'"):
        check_frame(frame(progress))
    progress.close()


def test_display_has_a_dash_for_a_missing_number() -> None:
    progress, _, _ = live()
    assert "step 0/30" in frame(progress)
    assert "accuracy –" in frame(progress)
    progress.step(step_row(0, entropy=None))
    assert "entropy –" in frame(progress)
    progress.close()
    assert formatted({"lr": 0.5}, "lr", ".2f") == "0.50"
    assert groups({}) == ["–"]
    assert (clock(59.6), clock(3725.2)) == ("0:01:00", "1:02:05")


def test_lines_are_printed_above_the_display_and_the_last_frame_stays() -> None:
    progress, _, file = live()
    progress.say("[bold]not markup[/bold] " + "x" * 200)
    progress.step(step_row(4))
    progress.close()
    progress.say("the end")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "[bold]not markup[/bold] " + "x" * 200 + "\n" in text
    assert text.rindex("step 5/30") < text.rindex("the end")
    # A killed run must not leave a terminal without its cursor.
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


def test_plain_progress_is_one_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress(num_steps=30, max_staleness=2) as progress:
        assert type(progress) is Progress
        progress.say("run directory runs/a")
        progress.step(step_row(0, **{"rejected.all_correct": 3}))
        progress.evaluation(MIDDLE)
    assert capsys.readouterr().out.splitlines() == [
        "run directory runs/a",
        "step   1/30    1.5 s  accuracy 0.00  length   7.0  entropy 0.50  "
        "staleness 1.00 (max 2/2)    1000 tok/s  idle learner  25% rollout  50%  "
        "-3 all_correct -4 all_wrong",
    ]
    assert progress.caught == {}


def test_step_line_survives_a_skipped_step() -> None:
    row = step_row(0)
    del row["entropy"], row["staleness"]
    assert "entropy nan  staleness nan" in step_line(row, num_steps=30, max_staleness=2)


def test_step_line_warns_of_few_effective_samples() -> None:
    few, enough = (step_row(0) | {"behaviour_ess": share} for share in (0.43, 0.5))
    line = step_line(few, num_steps=30, max_staleness=2)
    assert "rollout  50%  effective samples 43%  -4 all_wrong" in line
    assert "effective" not in step_line(enough, num_steps=30, max_staleness=2)


def test_closed_pipe_loses_the_lines_and_nothing_else() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as file:
        progress = Progress(Outlet(file), num_steps=30, max_staleness=2)
        for step in range(3):
            progress.step(step_row(step))
        assert progress.caught == {"display": 1}


def test_display_on_a_closed_terminal_raises_nothing() -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as file:
        out = Outlet(file)
        console = Console(file=out, force_terminal=True, width=80)  # type: ignore[arg-type]
        progress = LiveProgress(out, num_steps=30, max_staleness=2, console=console)
        progress.step(step_row(0))
        os.close(master)
        progress.say("a line after the end")
        progress.step(step_row(1))
        progress.close()
        assert progress.caught == {"display": 1}


def test_stream_that_lacks_a_character_gets_a_question_mark() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Progress(Outlet(file), num_steps=1, max_staleness=0).say("accuracy – 1")
    assert raw.getvalue() == b"accuracy ? 1\n"


def test_the_command_line_starts_without_what_only_runs_need() -> None:
    names = "mlflow rich ray torch"
    script = (
        "import sys\nfrom dapo_async.cli.main import main\ncode = main(sys.argv[1:])\n"
        f"assert not {{*'{names}'.split()}} & {{*sys.modules}}, 'heavy'\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, "config", "--explain"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "tracking.mlflow = local" in ran.stdout
