"""`dapo-async trace`: arguments for `tracking.group_trace`."""

from __future__ import annotations

import argparse

from dapo_async.cli.arguments import Parser, path, say

HELP = "the events of one group, from its admission to its end"


def add_arguments(parser: Parser) -> None:
    """Adds what `trace` takes."""
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR", help="directory of the run")
    parser.add_argument(
        "group_id", type=int, metavar="GROUP_ID", help="number of the admission: 0, 1, 2, …"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the events of the group."""
    from dapo_async.tracking.group_trace import trace_group

    for line in list(trace_group(options.run_dir, options.group_id)):
        say(line)
    return 0
