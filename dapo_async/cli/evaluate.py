"""`dapo-async eval`: arguments for `evaluate.command`."""

from __future__ import annotations

import argparse

from dapo_async.cli.arguments import Parser, add_config, path, say

HELP = "avg@k, pass@k and maj@k of a checkpoint; without Ray"


def add_arguments(parser: Parser) -> None:
    """Adds what `eval` takes."""
    add_config(parser, needed=True)
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
    """Evaluates a checkpoint and prints its totals."""
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
    return run(options.config, options.overrides, asked, say=say)
