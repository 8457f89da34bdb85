"""`dapo-async grade`: arguments for `reward.grading`."""

from __future__ import annotations

import argparse

from dapo_async.cli.arguments import Parser, path, say

HELP = "judge predictions by their gold answers, row by row"


def add_arguments(parser: Parser) -> None:
    """Adds what `grade` takes."""
    parser.add_argument(
        "--input",
        type=path,
        required=True,
        metavar="IN.jsonl",
        help="rows with prediction and gold, and optionally extraction and prompt",
    )
    parser.add_argument(
        "--output",
        type=path,
        required=True,
        metavar="OUT.jsonl",
        help="the same rows with correct, extracted and reason",
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=5.0,
        metavar="S",
        help="processor time of one symbolic comparison (default: 5)",
    )
    parser.add_argument(
        "--verifier",
        default="math",
        metavar="NAME",
        help="math (the default), marker, exact, or your own module:function",
    )


def run(options: argparse.Namespace) -> int:
    """Exit code 0 when every row has a verdict, 1 when the verifier died over one."""
    from dapo_async.reward.grading import grade
    from dapo_async.reward.math_verifier.verify import MOST_TIMEOUT_S

    if not 0 < options.timeout_s <= MOST_TIMEOUT_S:
        raise ValueError(
            f"--timeout-s ({options.timeout_s:g}) must be positive and at most "
            f"{MOST_TIMEOUT_S:g} (a day); leave it out for 5"
        )
    grades = grade(
        options.input, options.output, verifier=options.verifier, timeout_s=options.timeout_s
    )
    reasons = ", ".join(f"{count} {reason}" for reason, count in grades.reasons.most_common())
    say(f"{grades.num_rows} rows: {reasons or 'none'}; accuracy {grades.accuracy:.4f}")
    return int(grades.num_failed > 0)
