"""`dapo-async verify`: which files of a run are whole, and whether every admission ended once."""

from __future__ import annotations

import argparse

from dapo_async.cli.arguments import Parser, path, say

HELP = "check the checksums of a run's files, and that every admission ended once"


def add_arguments(parser: Parser) -> None:
    """Adds what `verify` takes."""
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR", help="a run that is not running")


def run(options: argparse.Namespace) -> int:
    """Exit code 0 when everything is whole, 1 otherwise."""
    from dapo_async.tracking.run_dir import RunDir
    from dapo_async.tracking.verify import verify_run

    run_dir = RunDir(options.run_dir.resolve())
    if not run_dir.config.is_file():
        raise ValueError(
            f"{run_dir.root} has no config.yaml, so it is no run directory; "
            "give the folder that a run has printed"
        )
    run_dir.lock()
    num_damaged = 0
    for finding in verify_run(run_dir):
        num_damaged += not finding.is_whole
        say(finding.text if finding.is_whole else f"DAMAGED {finding.text}")
    say(f"{num_damaged} damaged" if num_damaged else "everything is whole")
    return int(num_damaged > 0)
