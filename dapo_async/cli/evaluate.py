"""Part of the command line (L5): what measures and shows, `dapo-async eval` and `dapo-async report`. Its door is `cli.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Adds both to argparse's `commands`; what they run imports on its own, for it takes seconds."""
    evaluation = commands.add_parser(
        "eval", help="avg@k, pass@k and maj@k of a checkpoint; without Ray"
    )
    evaluation.add_argument(
        "config", help="YAML file: engine, template, columns, verifier, lengths"
    )
    evaluation.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    evaluation.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="plain Hugging Face folder, such as a run's checkpoint (model.path)",
    )
    evaluation.add_argument("--data", metavar="FILE", help="problems to solve (data.heldout)")
    evaluation.add_argument("--k", type=int, default=32, help="responses per problem (32)")
    evaluation.add_argument(
        "--temperature", type=float, default=1.0, help="1.0 as DAPO evaluates; 0 is greedy"
    )
    evaluation.add_argument(
        "--top-p",
        type=float,
        default=0.7,
        help="0.7 as DAPO evaluates; 1 samples from the model itself",
    )
    evaluation.add_argument(
        "--seed", type=int, help="of the noise and of the intervals (seed of the config)"
    )
    evaluation.add_argument(
        "--max-problems", type=int, metavar="N", help="only the first N problems"
    )
    evaluation.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        help="the result; finished problems are kept beside it until then, and the same command goes on",
    )
    evaluation.set_defaults(run=_eval)
    report = commands.add_parser(
        "report", help="training dynamics of one or several runs as one HTML page"
    )
    report.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="run directories, overlaid in each chart; also results of eval --json",
    )
    report.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="report.html"
    )
    report.add_argument(
        "--steps",
        metavar="1,10,20",
        help="steps whose rollouts are shown, counted from 1 (first, middle, last)",
    )
    report.set_defaults(run=_report, overrides=[])


def _eval(options: argparse.Namespace) -> int:
    from dapo_async.evaluate.command import Options, run

    asked = Options(
        checkpoint=options.checkpoint,
        data=options.data,
        k=options.k,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        max_problems=options.max_problems,
        out=options.json and options.json.resolve(),
    )
    return run(options.config, options.overrides, asked, say=_say)


def _report(options: argparse.Namespace) -> int:
    from dapo_async.tracking.report import write_report

    if options.overrides:
        raise ValueError(
            f"report takes no overrides ({' '.join(options.overrides)}); leave them away"
        )
    try:
        steps = None if options.steps is None else [int(step) for step in options.steps.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--steps ({options.steps}) must be numbers with commas between them, such as 1,10,20; write them so"
        ) from error
    for line in write_report(options.paths, out=options.out, steps=steps):
        _say(line)
    _say(f"report     {options.out.resolve()}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
