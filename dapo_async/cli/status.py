"""`dapo-async status`: arguments for `tracking.run_status`."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dapo_async.cli.arguments import Parser, say
from dapo_async.utils.paths import check_path

if TYPE_CHECKING:
    from dapo_async.tracking.run_status import RunStatus

HELP = "where a running or ended run stands"
EVERY_S = 2.0  # of --follow
EXIT_CODES = {"done": 0, "ended": 1, "killed": 1, "running": 3, "stuck": 4}
ADDRESS = re.compile(r"[\w.-]+:\d+|\w+://.+")
GCS_PORT = 6379  # of ray start --head


def add_arguments(parser: Parser) -> None:
    """Adds what `status` takes."""
    parser.epilog = "exit code: 0 done, 1 ended otherwise or killed, 3 running, 4 stuck"
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN_DIR|ADDRESS",
        help="directory of the run, or HOST:PORT of a Ray cluster or http://HOST:8265 of its "
        "dashboard, for its newest run (default: the newest run in DAPO_ASYNC_RUNS or runs/)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--follow", action="store_true", help="print it again every 2 s until the run ends"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the status; the exit code is that of `EXIT_CODES`."""
    from dapo_async.tracking.run_status import RunState, lines

    while True:
        status = _status(options.run)
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


def _status(run: str | None) -> RunStatus:
    from dapo_async.runtime.cluster.environment import run_root
    from dapo_async.tracking.run_status import newest_run, read_status

    if run is None:
        return read_status(newest_run(run_root("", name="any").parent))
    if ADDRESS.fullmatch(run) and not Path(run).exists():
        return _posted_status(run)
    check_path("the path", run)
    return read_status(Path(run))


def _posted_status(address: str) -> RunStatus:
    """Of the newest run of a cluster, running ones first."""
    from dataclasses import replace

    from dapo_async.runtime.cluster.run_board import posted
    from dapo_async.tracking.run_status import RunState, status_of_post

    if "://" in address:
        host = urlsplit(address).hostname or ""
        address = f"{host}:{GCS_PORT}"
    found = [status_of_post(facts) for facts in posted(address)]
    if not found:
        raise ValueError(
            f"the Ray cluster at {address} knows no run; give the run directory of a run that "
            "has its own Ray"
        )
    found.sort(key=lambda status: status.state is not RunState.RUNNING)
    first, *others = found
    more = tuple(f"also here: {each.root} ({each.state}, step {each.step})" for each in others)
    return replace(first, notes=(*first.notes, *more))
