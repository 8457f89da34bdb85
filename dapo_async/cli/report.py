"""`dapo-async report`: arguments for `tracking.report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dapo_async.cli.arguments import Parser, path, say

HELP = "training dynamics of one or several runs as one HTML page"


def add_arguments(parser: Parser) -> None:
    """Adds what `report` takes."""
    parser.add_argument(
        "paths",
        type=path,
        nargs="+",
        metavar="RUN_DIR",
        help="run directories, drawn in one chart each; also results of eval --json",
    )
    parser.add_argument(
        "--out",
        type=path,
        default=Path("report.html"),
        metavar="FILE",
        help="default: report.html",
    )
    parser.add_argument(
        "--steps",
        metavar="1,10,20",
        help="steps whose rollouts are shown, counted from 1 (default: first, middle and last)",
    )


def run(options: argparse.Namespace) -> int:
    """Writes the report and prints what it holds."""
    from dapo_async.tracking.report import write_report  # takes seconds to import

    try:
        steps = None if options.steps is None else [int(step) for step in options.steps.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--steps ({options.steps}) must be numbers separated by commas, such as 1,10,20"
        ) from error
    for line in write_report(options.paths, out=options.out, steps=steps):
        say(line)
    say(f"report     {options.out.resolve()}")
    return 0
