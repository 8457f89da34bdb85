"""`dapo-async eval`: arguments for `evaluate.command`."""

from __future__ import annotations

import argparse

from dapo_async.cli.arguments import EXAMPLE, Parser, add_config, path, say

HELP = "avg@k, pass@k and maj@k of a checkpoint; without Ray"


def add_arguments(parser: Parser) -> None:
    """Adds what `eval` takes."""
    add_config(parser, needed=False)
    parser.add_argument(
        "--watch",
        type=path,
        metavar="RUN_DIR",
        help="measure each checkpoint of this run as it appears, with the run's config, until "
        "interrupted",
    )
    parser.add_argument(
        "--follow-until-end",
        action="store_true",
        help="with --watch: end when the run has ended and every checkpoint is measured",
    )
    parser.add_argument(
        "--checkpoint",
        type=path,
        metavar="DIR",
        help="plain Hugging Face folder, such as a run's checkpoint (default: model.path)",
    )
    parser.add_argument("--data", metavar="FILE", help="problems to solve (default: data.heldout)")
    parser.add_argument("--k", type=int, default=32, help="responses per problem (default: 32)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="default: 1.0, as DAPO evaluates; 0 is greedy",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.7,
        help="default: 0.7, as DAPO evaluates; 1 samples from the whole distribution",
    )
    parser.add_argument(
        "--seed", type=int, help="of the noise and of the intervals (default: that of the config)"
    )
    parser.add_argument("--max-problems", type=int, metavar="N", help="only the first N problems")
    parser.add_argument(
        "--json",
        type=path,
        metavar="OUT",
        help="file for the result; finished problems are kept beside it, and the same command "
        "continues an interrupted evaluation",
    )


def run(options: argparse.Namespace) -> int:
    """Evaluates a checkpoint, or each one of a run, and prints the totals."""
    _check(options)
    from dapo_async.evaluate.command import Options, run  # takes seconds to import

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
    if options.watch is None:
        return run(options.config, options.overrides, asked, say=say)
    from dapo_async.runtime.watch import Watcher

    until_end = options.follow_until_end
    return Watcher(options.watch, options.overrides, asked, until_end=until_end, say=say).run()


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together."""
    if options.watch is None:
        if options.config is None:
            raise ValueError(f"the config file is missing; give a YAML file, such as {EXAMPLE}")
        if options.follow_until_end:
            raise ValueError("--follow-until-end needs --watch RUN_DIR; give it, or leave it out")
        return
    for name, value in (
        ("CONFIG", options.config),
        ("--checkpoint", options.checkpoint),
        ("--json", options.json),
    ):
        if value is not None:
            raise ValueError(
                f"--watch takes no {name}, because the run directory has it; leave it out"
            )
