"""`dapo-async dump`: arguments for `runtime.dump`."""

from __future__ import annotations

import argparse

from dapo_async.cli.arguments import Parser, path, say

HELP = "write what every actor of a running run does now"
TIMEOUT_S = 20.0


def add_arguments(parser: Parser) -> None:
    """Adds what `dump` takes."""
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR", help="directory of the run")


def run(options: argparse.Namespace) -> int:
    """Prints the path of the dump. The exit code is 1 if the driver hangs."""
    from dapo_async.runtime.dump import request_dump

    try:
        say(str(request_dump(options.run_dir, timeout_s=TIMEOUT_S, say=say)))
    except TimeoutError as error:
        say(str(error))
        return 1
    return 0
