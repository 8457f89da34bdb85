"""`dapo-async status`: arguments for `tracking.run_status`."""

from __future__ import annotations

import argparse
import json
import sys
import time

from dapo_async.cli.arguments import Parser, path, say

HELP = "where a running or ended run stands"
EVERY_S = 2.0  # of --follow
EXIT_CODES = {"done": 0, "ended": 1, "killed": 1, "running": 3, "stuck": 4}


def add_arguments(parser: Parser) -> None:
    """Adds what `status` takes."""
    parser.epilog = "exit code: 0 done, 1 ended otherwise or killed, 3 running, 4 stuck"
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR", help="directory of the run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--follow", action="store_true", help="print it again every 2 s until the run ends"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the status; the exit code is that of `EXIT_CODES`."""
    from dapo_async.tracking.run_status import RunState, lines, read_status

    while True:
        status = read_status(options.run_dir)
        if options.json:
            say(json.dumps(status.to_json()))
        else:
            if options.follow and sys.stdout.isatty():
                sys.stdout.write("\x1b[H\x1b[2J")  # a new screen
            for line in lines(status):
                say(line)
        if not options.follow or status.state not in (RunState.RUNNING, RunState.STUCK):
            return EXIT_CODES[status.state]
        time.sleep(EVERY_S)
        if not options.json and not sys.stdout.isatty():
            say("")
