"""`dapo-async scale`: arguments for `runtime.scale_desk`."""

from __future__ import annotations

import argparse
import re

from dapo_async.cli.arguments import Parser, path, say

HELP = "change the number of rollout workers of a running run"
TIMEOUT_S = 30.0
CHANGE = re.compile(r"(?:rollout|rollout\.num_workers)=(\d{1,9})")


def add_arguments(parser: Parser) -> None:
    """Adds what `scale` takes."""
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR", help="directory of the run")
    parser.add_argument(
        "change", metavar="rollout=N", help="the number of rollout workers from now on"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the driver's answer. The exit code is 1 if there is none."""
    from dapo_async.runtime.scale_desk import say_answer

    match = CHANGE.fullmatch(options.change)
    if match is None:
        raise ValueError(
            f"scale does not know {options.change}; write rollout=N, such as rollout=4: only the "
            "number of rollout workers can change while a run goes on"
        )
    return say_answer(options.run_dir, int(match[1]), timeout_s=TIMEOUT_S, say=say)
